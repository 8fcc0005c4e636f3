"""Pure: values by key, and which of them have changed since somebody last looked."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, NewType, TypeVar

from fxtunnel.model import RelayId

T = TypeVar("T")

Mark = NewType("Mark", tuple[int, int])
"""How far a reader has read: the generation, and the number of the last change in it."""


@dataclass(slots=True)
class _Place(Generic[T]):
    value: T
    change: int


class Roster(Collection[T]):
    """What is known of each server. Two of a thousand may have changed between two decisions: the later one need only look at those."""

    def __init__(self) -> None:
        self._places: dict[RelayId, _Place[T]] = {}  # those changed last come last
        self._generation = 0
        self._changes = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        return (place.value for place in self._places.values())

    def __contains__(self, value: object) -> bool:
        return any(place.value is value for place in self._places.values())

    def get(self, server_id: RelayId) -> T | None:
        """One value."""
        place = self._places.get(server_id)
        return place.value if place is not None else None

    def put(self, server_id: RelayId, value: T) -> None:
        """A new value, or another one."""
        self._changes += 1
        self._places.pop(server_id, None)
        self._places[server_id] = _Place(value, self._changes)

    def remove(self, server_id: RelayId) -> None:
        """It is no more. Everyone has to read all of the others again: that is rare, and nobody needs to remember what was."""
        if self._places.pop(server_id, None) is not None:
            self._generation += 1

    @property
    def mark(self) -> Mark:
        """What to give to `since` the next time."""
        return Mark((self._generation, self._changes))

    def since(self, mark: Mark | None) -> list[T] | None:
        """The values that have changed since `mark` was read, the latest first; None: read them all."""
        if mark is None or mark[0] != self._generation:
            return None
        changed = []
        for place in reversed(self._places.values()):
            if place.change <= mark[1]:
                break
            changed.append(place.value)
        return changed
