"""Pure: candidates in order, with what entries have worked out about each of them: a decision need not look at all of them again."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from fxrelay.balance.model import Candidate
from fxtunnel.model import RelayId

Rank = Callable[[Candidate], int | float]
"""A function of a module: what is kept is kept by it."""

MAX_EDITS: Final = 256
"""Changes that are remembered; who has missed more of them reads the whole list again."""


class Op(IntEnum):
    """What happened at a place of the list."""

    CHANGE = 0
    ENTER = 1
    LEAVE = 2


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of a list of server objects, as texts. `text` is empty for LEAVE."""

    op: Op
    at: int
    text: str = ""


class Offered(list[Candidate]):
    """Candidates in order of id. Who changes them uses `change`, `enter` and `leave`; `copy` gives a plain list.

    A thousand objects are cold memory by the next decision (half a millisecond to walk along them); a list of their ranks is not. Nor does
    a script process, which has the list from before, need more than what was edited since.
    """

    __slots__ = ("_counted", "_edits", "_ids", "_ranks", "key", "mark")

    def __init__(self, candidates: list[Candidate]) -> None:
        super().__init__(candidates)
        self.key = object()
        """What those know this list by who remember what they have had of it."""
        self.mark = 0
        """Edits so far: what to give to `since` the next time."""
        self._edits: deque[Edit] = deque(maxlen=MAX_EDITS)
        self._ranks: dict[Rank, list[int | float]] = {}
        self._counted: dict[int, Candidate] | None = None
        self._ids: frozenset[RelayId] | None = None

    def least(self, rank: Rank) -> Candidate | None:
        """The first candidate of the lowest rank. The first time it asks `rank` about all of them, then only about those that change."""
        ranks = self._ranks.get(rank)
        if ranks is None:
            ranks = self._ranks[rank] = [rank(candidate) for candidate in self]
        return self[ranks.index(min(ranks))] if ranks else None

    def ids(self) -> frozenset[RelayId]:
        """Who they are now. The set does not change with the list."""
        if self._ids is None:
            self._ids = frozenset([candidate.server.server_id for candidate in self])
        return self._ids

    def counted(self) -> list[tuple[int, Candidate]]:
        """Those with placements on their way, each with its place, in order."""
        if self._counted is None:
            self._counted = {place: candidate for place, candidate in enumerate(self) if candidate.in_flight}
        return sorted(self._counted.items())

    def since(self, mark: int) -> list[Edit] | None:
        """What was edited since `mark` was read, in order, placements aside; None: too much, read them all."""
        missed = self.mark - mark
        edits = self._edits
        return [edits[place] for place in range(len(edits) - missed, len(edits))] if missed <= len(edits) else None

    def change(self, place: int, candidate: Candidate) -> None:
        """Another candidate in the place of one of the same id."""
        text = candidate.server.text
        if text is not self[place].server.text:
            self._note(Edit(Op.CHANGE, place, text))
        self[place] = candidate
        for rank, ranks in self._ranks.items():
            ranks[place] = rank(candidate)
        if self._counted is not None:
            if candidate.in_flight:
                self._counted[place] = candidate
            else:
                self._counted.pop(place, None)

    def enter(self, place: int, candidate: Candidate) -> None:
        """One more, before the one at `place`."""
        self._note(Edit(Op.ENTER, place, candidate.server.text))
        self.insert(place, candidate)
        self._ids = self._counted = None
        for rank, ranks in self._ranks.items():
            ranks.insert(place, rank(candidate))

    def leave(self, place: int) -> None:
        """One less."""
        self._note(Edit(Op.LEAVE, place))
        del self[place]
        self._ids = self._counted = None
        for ranks in self._ranks.values():
            del ranks[place]

    def _note(self, edit: Edit) -> None:
        self._edits.append(edit)
        self.mark += 1
