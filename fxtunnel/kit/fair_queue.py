"""Pure: a queue that takes sources in turn, so that a crowd from one source only delays itself."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within a source; sources are served round robin. Not bounded: that is up to the caller of `put`."""

    __slots__ = ("_by_source",)

    def __init__(self) -> None:
        self._by_source: OrderedDict[str, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._by_source)

    def __len__(self) -> int:
        return sum(map(len, self._by_source.values()))

    def put(self, source: str, item: T) -> None:
        """Wait behind the others of the source."""
        waiting = self._by_source.get(source)
        if waiting is None:
            self._by_source[source] = deque((item,))
        else:
            waiting.append(item)

    def take(self) -> T:
        """The next one; its source is behind all others then.

        Raises:
            KeyError: nothing waits.
        """
        source, waiting = self._by_source.popitem(last=False)
        item = waiting.popleft()
        if waiting:
            self._by_source[source] = waiting
        return item

    def discard(self, source: str, item: T) -> None:
        """It waits no more. It must be waiting."""
        waiting = self._by_source[source]
        waiting.remove(item)
        if not waiting:
            del self._by_source[source]
