"""Pure: a queue of bytes that wait for a reader, in pieces: bytes in it are not copied again when more arrive."""

from collections import deque
from typing import Final

PIECE_BYTES: Final = 16_384
"""Smaller ones are put together: a piece costs 100 bytes of its own, and a peer may send a byte at a time."""


class ByteQueue:
    """A queue of bytes. Take from `first`, and say with `left` how much that was; `len` is all that waits."""

    __slots__ = ("_pieces", "_size")

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self._pieces: deque[bytearray] = deque()
        self._size = 0
        if data:
            self.append(data)

    def __len__(self) -> int:
        return self._size

    @property
    def first(self) -> bytearray:
        """The bytes at the front, in one piece. Later the same call begins with the same bytes and is never shorter. Not empty."""
        return self._pieces[0]

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to the end."""
        self._size += len(data)
        if self._pieces and len(self._pieces[-1]) + len(data) <= PIECE_BYTES:
            self._pieces[-1] += data
        else:
            self._pieces.append(bytearray(data))

    def left(self, count: int) -> None:
        """`count` bytes of `first` have gone."""
        self._size -= count
        first = self._pieces[0]
        if count == len(first):
            self._pieces.popleft()
        else:
            del first[:count]

    def joined(self) -> bytearray:
        """All of it."""
        return bytearray().join(self._pieces)
