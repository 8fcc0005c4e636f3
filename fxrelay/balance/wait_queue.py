"""Task: streams that wait in line for a server, first come, first served; one line per service of this relay."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class QueueTicket:
    """A place in a line. `since`: when it was taken; a stream that lost a race and comes back keeps its place."""

    __slots__ = ("line", "since", "turn")

    def __init__(self, line: "WaitQueue", since: float) -> None:
        self.line = line
        self.since = since
        self.turn = trio.Event()

    @property
    def position(self) -> int:
        """1 is the front: its turn to try."""
        return self.line.places.index(self) + 1


class WaitQueue:
    """The streams that wait. The first one tries; those behind wait until it has got a server or has given up."""

    def __init__(self) -> None:
        self.places: list[QueueTicket] = []

    def __len__(self) -> int:
        return len(self.places)

    @contextmanager
    def place(self, since: float) -> Iterator[QueueTicket]:
        """Stand in line, behind everyone who came before `since`, until the block ends."""
        place = QueueTicket(self, since)
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
