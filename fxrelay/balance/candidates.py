"""Pure: candidates in order, with what entries have worked out about each of them: a decision need not look at all of them again."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
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


class Pick(IntEnum):
    """How some are picked out of a list."""

    WITHOUT = 0
    ONLY = 1


@dataclass(frozen=True, slots=True)
class Picked:
    """Places of a list: all others WITHOUT them, or ONLY them, in their order."""

    pick: Pick
    places: Sequence[int]


ALL: Final = Picked(Pick.WITHOUT, ())


class CandidateList(list[Candidate]):
    """Candidates in order of id. Who changes them uses `change`, `enter` and `leave`; `without` and `only` give some of them.

    A thousand objects are cold memory by the next decision (half a millisecond to walk along them); a list of their ranks is not. Nor does
    a script process, which has the list from before, need more than what was edited since.
    """

    __slots__ = ("_counted", "_edits", "_ids", "_places", "_ranks", "key", "mark")

    def __init__(self, candidates: list[Candidate]) -> None:
        super().__init__(candidates)
        self.key = object()
        """What those know this list by who remember what they have had of it."""
        self.mark = 0
        """Edits so far: what to give to `since` the next time."""
        self._edits: deque[Edit] = deque(maxlen=MAX_EDITS)
        self._ranks: dict[Rank, list[int | float]] = {}
        self._counted: dict[int, Candidate] | None = None
        self._ids = [candidate.server_id for candidate in candidates]
        self._places: dict[RelayId, int] | None = None

    def place(self, server_id: RelayId) -> int | None:
        """Where this one is."""
        place = bisect_left(self._ids, server_id)
        return place if place < len(self._ids) and self._ids[place] == server_id else None

    def without(self, places: Sequence[int]) -> "CandidateSubset":
        """All but those at these places, which are in order."""
        return CandidateSubset(self, Picked(Pick.WITHOUT, places))

    def only(self, server_ids: Iterable[RelayId]) -> "CandidateSubset":
        """Those with these ids, in this order, as far as they are there."""
        known = self._known_places()
        return CandidateSubset(self, Picked(Pick.ONLY, [known[server_id] for server_id in server_ids if server_id in known]))

    def least(self, rank: Rank) -> Candidate | None:
        """The first candidate of the lowest rank. The first time it asks `rank` about all of them, then only about those that change."""
        ranks = self._ranks.get(rank)
        if ranks is None:
            ranks = self._ranks[rank] = [rank(candidate) for candidate in self]
        return self[ranks.index(min(ranks))] if ranks else None

    def ids(self) -> Container[RelayId]:
        """Who they are now. It does not change with the list."""
        return self._known_places().keys()

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

    def enter(self, candidate: Candidate) -> None:
        """One more, whose id is not there yet."""
        place = bisect_left(self._ids, candidate.server_id)
        self._note(Edit(Op.ENTER, place, candidate.server.text))
        self.insert(place, candidate)
        self._ids.insert(place, candidate.server_id)
        self._places = None
        if self._counted is not None:
            self._counted = {at + (at >= place): each for at, each in self._counted.items()}
            if candidate.in_flight:
                self._counted[place] = candidate
        for rank, ranks in self._ranks.items():
            ranks.insert(place, rank(candidate))

    def leave(self, place: int) -> None:
        """One less."""
        self._note(Edit(Op.LEAVE, place))
        del self[place], self._ids[place]
        self._places = None
        if self._counted is not None:
            self._counted = {at - (at > place): each for at, each in self._counted.items() if at != place}
        for ranks in self._ranks.values():
            del ranks[place]

    def _known_places(self) -> dict[RelayId, int]:
        if self._places is None:
            self._places = {server_id: place for place, server_id in enumerate(self._ids)}  # never changed: `ids` gives it away
        return self._places

    def _note(self, edit: Edit) -> None:
        self._edits.append(edit)
        self.mark += 1


class CandidateSubset(list[Candidate]):
    """Some of what is offered, as they are now: a list of its own. As long as nothing is edited there, `picked` says which they are."""

    __slots__ = ("_counted", "_mark", "offered", "picked")

    def __init__(self, offered: CandidateList, picked: Picked) -> None:
        if picked.pick is Pick.ONLY:
            super().__init__([offered[place] for place in picked.places])
            now_at = {place: at for at, place in enumerate(picked.places)}
            self._counted = sorted((now_at[place], candidate) for place, candidate in offered.counted() if place in now_at)
        else:
            super().__init__(offered)
            gone = picked.places
            for place in reversed(gone):
                del self[place]
            places = frozenset(gone)
            self._counted = [(at - bisect_left(gone, at), candidate) for at, candidate in offered.counted() if at not in places]
        self.offered = offered
        self.picked = picked
        self._mark = offered.mark

    @property
    def is_current(self) -> bool:
        """Whether `picked` still says which they are."""
        return self._mark == self.offered.mark

    def ids(self) -> Container[RelayId]:
        """Who they are."""
        return frozenset([candidate.server.server_id for candidate in self])

    def counted(self) -> list[tuple[int, Candidate]]:
        """Those with placements on their way, each with its place here, in order."""
        return self._counted
