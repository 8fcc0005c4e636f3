"""Pure: one ring of bytes that is send queue and replay memory at once.

Three counters over the session's byte sequence, `acked <= sent <= head`:

    ... forgotten | acked ... sent | sent ... head | free ...
                    kept for replay   to be sent

Frames are written once, at `head`, straight from the socket, and go to TLS from there. What the peer acknowledges is free again. A
lost link costs nothing: `sent` goes back to what the peer has. (A deque of buffers was measured first: a 256 KiB buffer
pinned by a 5 KiB frame made the replay memory unbounded in practice.)
"""

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.protocol.frames import DATA, HEADER, HEADER_BYTES, MAX_DATA_BYTES

SLACK_BYTES: Final = MAX_DATA_BYTES + HEADER_BYTES
"""Room behind the ring so that a frame that crosses its end is still read and written in one piece."""


class ReplayRing:
    """The sending half of a session's byte sequence.

    With `keep=False` bytes count as acknowledged once they are sent: no resumption.
    Memory is `size_bytes` + 256 KiB, touched only as far as it is used.
    """

    __slots__ = ("_buffer", "_peer_ack", "_view", "acked", "head", "keep", "sent", "size_bytes")

    def __init__(self, size_bytes: int, *, keep: bool = True) -> None:
        self.size_bytes = size_bytes
        self._buffer: mmap | bytearray = _untouched(size_bytes + SLACK_BYTES)
        self._view = memoryview(self._buffer)
        self._peer_ack = 0
        self.keep = keep
        self.acked = 0
        self.sent = 0
        self.head = 0

    @property
    def free_bytes(self) -> int:
        """How much may be written now."""
        return self.size_bytes - (self.head - self.acked)

    @property
    def unsent_bytes(self) -> int:
        """How much waits to be sent."""
        return self.head - self.sent

    def append(self, frame: bytes | bytearray) -> None:
        """Queue whole frames. The caller has checked `free_bytes`."""
        length = len(frame)
        if length > self.size_bytes - (self.head - self.acked):
            raise LocalProtocolError("replay ring overrun")
        position = self.head % self.size_bytes
        end = position + length
        if end <= self.size_bytes:
            self._buffer[position:end] = frame
        else:
            first = self.size_bytes - position
            self._buffer[position : self.size_bytes] = frame[:first]
            self._buffer[: length - first] = frame[first:]
        self.head += length

    def slot(self, limit_bytes: int) -> memoryview:
        """Where the payload of a DATA frame of up to `limit_bytes` may be read into; then call `commit_data`.

        The caller keeps `limit_bytes` within `free_bytes - 8` and within 256 KiB.
        """
        start = self.head % self.size_bytes + HEADER_BYTES
        return self._view[start : start + limit_bytes]

    def commit_data(self, stream_id: int, length: int) -> None:
        """Turn the first `length` bytes of the slot into a DATA frame."""
        position = self.head % self.size_bytes
        HEADER.pack_into(self._buffer, position, DATA << 24 | length, stream_id)
        over = position + HEADER_BYTES + length - self.size_bytes
        if over > 0:
            self._buffer[:over] = self._buffer[self.size_bytes : self.size_bytes + over]
        self.head += HEADER_BYTES + length

    def unsent(self, limit_bytes: int) -> memoryview:
        """The next bytes to send, in one piece. The same call later starts with the same bytes and is never shorter."""
        position = self.sent % self.size_bytes
        length = self.head - self.sent
        if length > limit_bytes:
            length = limit_bytes
        if position + length > self.size_bytes:
            length = self.size_bytes - position
        return self._view[position : position + length]

    def advance(self, length: int) -> None:
        """`length` bytes have been given to the link."""
        self.sent += length
        if not self.keep:
            self.acked = self.sent
        elif self._peer_ack > self.acked:
            self.acked = min(self._peer_ack, self.sent)

    def acknowledge(self, received: int) -> None:
        """The peer has `received` bytes. A write that is under way keeps its bytes until `advance`.

        Raises:
            RemoteProtocolError: the peer claims bytes that were never written.
        """
        if received > self.head:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"ACK of {received}, written {self.head}")
        if received > self._peer_ack:
            self._peer_ack = received
            if self.keep:
                self.acked = max(self.acked, min(received, self.sent))

    def rewind(self, received: int) -> None:
        """Go on at the byte the peer has not seen, on a new link.

        Raises:
            RemoteProtocolError: that byte is not kept any more, or was never written.
        """
        if not self.acked <= received <= self.head or received < self._peer_ack:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"resume at {received}, kept {self.acked} to {self.head}")
        self._peer_ack = received
        self.sent = received
        self.acked = received

    def grow(self, size_bytes: int) -> None:
        """Make room for more unacknowledged bytes; contents and counters stay.

        While bytes wait to be sent the size becomes a multiple of the old one, or stays, so that `unsent` does not become shorter.
        """
        if self.sent != self.head:
            size_bytes -= size_bytes % self.size_bytes
        if size_bytes > self.size_bytes:
            self._resize(size_bytes)

    def shrink(self, size_bytes: int) -> bool:
        """Make do with less again; contents and counters stay. False: something waits to be sent, or more than that is kept."""
        if self.sent != self.head or self.head - self.acked > size_bytes:
            return False
        self._resize(size_bytes)
        return True

    def _resize(self, size_bytes: int) -> None:
        old_view, old_size = self._view, self.size_bytes
        self.size_bytes = size_bytes
        self._buffer = _untouched(size_bytes + SLACK_BYTES)
        self._view = memoryview(self._buffer)
        at = self.acked
        while at < self.head:
            source, target = at % old_size, at % size_bytes
            step = min(self.head - at, old_size - source, size_bytes - target)
            self._view[target : target + step] = old_view[source : source + step]
            at += step

    def dispose(self) -> None:
        """Give the memory back: nothing is written or sent any more. May be repeated."""
        self._buffer = bytearray()
        self._view = memoryview(self._buffer)


def _untouched(size_bytes: int) -> mmap:
    """Memory that costs nothing until it is written to; a bytearray is filled with zeros, page by page."""
    return mmap(-1, size_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
