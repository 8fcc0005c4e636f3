"""Task: a line of those who wait for a server, first come first served; one line for each service of a relay."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Place:
    """Somebody's place in a line. `since`: when he came; who lost a race and comes back keeps his."""

    __slots__ = ("line", "since", "turn")

    def __init__(self, line: "Line", since: float) -> None:
        self.line = line
        self.since = since
        self.turn = trio.Event()

    @property
    def position(self) -> int:
        """1: it is his turn."""
        return self.line.places.index(self) + 1


class Line:
    """Who waits. The first one tries; those behind him wait for him to get something, or to give up."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    def __len__(self) -> int:
        return len(self.places)

    @contextmanager
    def place(self, since: float) -> Iterator[Place]:
        """Stand in line, behind everyone who came before `since`, until the block ends."""
        place = Place(self, since)
        index = sum(other.since <= since for other in self.places)
        self.places.insert(index, place)
        self._call_first()
        try:
            yield place
        finally:
            self.places.remove(place)
            self._call_first()

    def _call_first(self) -> None:
        for index, place in enumerate(self.places):
            if index == 0:
                place.turn.set()
            elif place.turn.is_set():
                place.turn = trio.Event()
