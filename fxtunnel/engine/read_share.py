"""Pure: how much of a link is read at once, so that no peer keeps a turn of the loop to itself."""

from typing import Final

LONG_S: Final = 0.005
"""What is read at once should be handled within this time. 256 KiB in one frame take less; in tiny frames they take many times as long."""


class ReadShare:
    """Bytes that a link may have in one turn: halved after one that took long, doubled after one that was full and did not."""

    __slots__ = ("_largest", "_smallest", "limit_bytes")

    def __init__(self, smallest_bytes: int, largest_bytes: int) -> None:
        self._smallest = smallest_bytes
        self._largest = largest_bytes
        self.limit_bytes = largest_bytes

    def dealt_with(self, size_bytes: int, took_s: float) -> None:
        """So many bytes were read at once, and took so long."""
        if took_s > LONG_S:
            self.limit_bytes = max(min(size_bytes, self.limit_bytes) // 2, self._smallest)
        elif size_bytes >= self.limit_bytes < self._largest:
            self.limit_bytes = min(2 * self.limit_bytes, self._largest)
