"""Pure: candidates in order, with what entries have worked out about each of them: a decision need not look at all of them again."""

from collections.abc import Callable

from fxrelay.balance.model import Candidate

Rank = Callable[[Candidate], int | float]
"""A function of a module: what is kept is kept by it."""


class Offered(list[Candidate]):
    """Candidates in order of id. Who changes them uses `change`, `enter` and `leave`; `copy` gives a plain list.

    A thousand objects are cold memory by the next decision (half a millisecond to walk along them); a list of their ranks is not.
    """

    __slots__ = ("_ranks",)

    def __init__(self, candidates: list[Candidate]) -> None:
        super().__init__(candidates)
        self._ranks: dict[Rank, list[int | float]] = {}

    def least(self, rank: Rank) -> Candidate | None:
        """The first candidate of the lowest rank. The first time it asks `rank` about all of them, then only about those that change."""
        ranks = self._ranks.get(rank)
        if ranks is None:
            ranks = self._ranks[rank] = [rank(candidate) for candidate in self]
        return self[ranks.index(min(ranks))] if ranks else None

    def change(self, place: int, candidate: Candidate) -> None:
        """Another candidate in the place of one."""
        self[place] = candidate
        for rank, ranks in self._ranks.items():
            ranks[place] = rank(candidate)

    def enter(self, place: int, candidate: Candidate) -> None:
        """One more, before the one at `place`."""
        self.insert(place, candidate)
        for rank, ranks in self._ranks.items():
            ranks.insert(place, rank(candidate))

    def leave(self, place: int) -> None:
        """One less."""
        del self[place]
        for ranks in self._ranks.values():
            del ranks[place]
