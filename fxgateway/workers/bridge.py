"""Pump: plaintext between two workers, for a client whose TLS is terminated by one and whose relay is connected to the other.

The line is a SOCK_SEQPACKET pair. A packet is b"D" and bytes of the client or the service, or b"E" alone: the orderly end of its direction.
A line that just closes means a reset: whatever happens to either process, a broken transfer never looks complete.
"""

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from fxtunnel.engine.reactor import ERROR, HANGUP, READ, STREAM_EVENTS, WRITE, Reactor
from fxtunnel.engine.splice import CLOSE_CLEANLY, abort
from fxtunnel.engine.tls_socket import TlsSocket

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

PACKET_BYTES: Final = 65_536
TURN_BYTES: Final = 262_144
BUFFER_BYTES: Final = 262_144
"""Send buffer in the kernel, for one direction of one client."""
_DATA, _END = b"D", b"E"


class PlainEnd(socket.socket):
    """One end of such a line, with the interface of a `TlsSocket`, so that the same code can serve both."""

    has_more = False
    read_awaits_write = False
    write_awaits_read = False
    at_end = False
    _unread = b""
    _has_said_end = False

    @property
    def holds_some(self) -> bool:
        """Whether something has left the line that its owner has not read yet: another process that got the descriptor would miss it."""
        return bool(self._unread) or self.at_end

    def recv_into(self, buffer: "WriteableBuffer", nbytes: int = 0, flags: int = 0) -> int:
        """See `TlsSocket.recv_into`."""
        view = buffer if isinstance(buffer, memoryview) else memoryview(buffer)
        limit = nbytes or len(view)
        filled = 0
        while filled < limit:
            if not self._unread and not self.at_end:
                try:
                    self._take_packet()
                except BlockingIOError:
                    break
            if not self._unread:
                break
            count = min(limit - filled, len(self._unread))
            view[filled : filled + count] = self._unread[:count]
            self._unread = self._unread[count:]
            filled += count
        self.has_more = bool(self._unread) or (self.at_end and filled > 0)
        if not filled and not self.at_end:
            raise BlockingIOError(errno.EAGAIN, "not now")
        return filled

    def send(self, data: "ReadableBuffer", flags: int = 0) -> int:
        """See `TlsSocket.send`."""
        sent = 0
        with memoryview(data) as view:
            while sent < len(view):
                part = view[sent : sent + PACKET_BYTES]
                try:
                    self.sendmsg([_DATA, part])
                except BlockingIOError:
                    if not sent:
                        raise
                    break
                sent += len(part)
        return sent

    def shutdown(self, how: int) -> None:
        """See `TlsSocket.shutdown`."""
        if how == socket.SHUT_WR and not self._has_said_end:
            self.sendmsg([_END])
            self._has_said_end = True

    def _take_packet(self) -> None:
        packet = self.recv(PACKET_BYTES + 1)
        if packet[:1] == _DATA:
            self._unread = packet[1:]
        elif packet == _END:
            self.at_end = True
        else:
            raise ConnectionResetError(errno.ECONNRESET, "the other process has dropped the client")


def plain_pair() -> tuple[PlainEnd, PlainEnd]:
    """The two ends of a line for one client, non-blocking."""
    ends = [adopt(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ends[0], ends[1]


def adopt(sock: socket.socket) -> PlainEnd:
    """Make an end of a socket, taking over its descriptor: `sock` cannot be used afterwards."""
    end = PlainEnd(sock.family, sock.type, sock.proto, fileno=sock.detach())
    end.setblocking(False)
    return end


class _Owner(Protocol):
    """A bridge, as its halves see it."""

    def stir(self) -> None: ...
    def fail(self) -> None: ...


class _Half:
    """One socket of a bridge."""

    __slots__ = ("blocked", "finished", "is_plain", "owner", "pending", "readable", "said_end", "sock")

    def __init__(self, owner: _Owner, sock: TlsSocket | PlainEnd) -> None:
        self.owner = owner
        self.sock = sock
        self.is_plain = isinstance(sock, PlainEnd)
        self.readable = True
        self.blocked = False
        self.finished = False
        """It has sent its end: nothing more will be read from it."""
        self.said_end = False
        """The other half's end has been passed on to it."""
        self.pending = b""
        """Bytes of the other half that it has not taken yet."""

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self.sock.read_awaits_write or self.sock.write_awaits_read:
            events |= READ | WRITE
        if events & WRITE:
            self.blocked = False
        if events & (READ | HANGUP | ERROR):
            self.readable = True
        if events & ERROR and not self.is_plain and self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.owner.fail()  # while the other half takes nothing, nobody would read of it
        else:
            self.owner.stir()

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; this client ends, nothing else does."""
        self.owner.fail()


class Bridge:
    """Carries bytes between a client's TLS and another worker, both ways, until both have ended or one breaks. Owns both sockets."""

    def __init__(self, reactor: Reactor, client: TlsSocket | PlainEnd, line: PlainEnd, on_over: Callable[["Bridge"], None]) -> None:
        self._reactor = reactor
        self._on_over = on_over
        self._is_over = False
        self._halves = (_Half(self, client), _Half(self, line))
        for half in self._halves:
            reactor.register(half.sock, half, STREAM_EVENTS)
        reactor.again(self._halves[0])  # bytes that were peeked at have left the kernel: no event will tell of them

    def stir(self) -> None:
        """Carry bytes both ways as far as both sockets go along; close both when both directions have ended."""
        one, other = self._halves
        try:
            self._carry(one, other)
            self._carry(other, one)
        except OSError:
            self.fail()
            return
        if one.said_end and other.said_end and not self._is_over:
            self._end()
            for half in self._halves:
                half.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_CLEANLY)
                half.sock.close()
            self._on_over(self)

    def fail(self) -> None:
        """RST to the client, and the other worker is told. May be repeated."""
        if not self._is_over:
            self._end()
            for half in self._halves:
                abort(half.sock)
            self._on_over(self)

    def _carry(self, source: _Half, sink: _Half) -> None:
        buffer = self._reactor.read_buffer
        moved = 0
        while not self._is_over and not sink.blocked:
            if sink.pending:
                sink.pending = self._offer(sink, sink.pending)
            elif source.finished:
                if not sink.said_end:
                    try:
                        sink.sock.shutdown(socket.SHUT_WR)
                    except BlockingIOError:
                        sink.blocked = True
                        return
                    sink.said_end = True
                return
            elif not source.readable:
                return
            elif moved >= TURN_BYTES:
                self._reactor.again(source)
                return
            else:
                moved += self._fetch(source, sink, buffer)

    def _fetch(self, source: _Half, sink: _Half, buffer: memoryview) -> int:
        try:
            count = source.sock.recv_into(buffer[:PACKET_BYTES])
        except BlockingIOError:
            source.readable = False
            return 0
        if not count:
            source.finished = True
        elif count < PACKET_BYTES and not source.sock.has_more:
            source.readable = source.sock.at_end
        if count:
            sink.pending = self._offer(sink, buffer[:count])
        return count

    def _offer(self, sink: _Half, data: "bytes | memoryview") -> bytes:
        """Send `data`; returns a copy of what the sink has not taken."""
        try:
            sent = sink.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return b""
        sink.blocked = True
        return bytes(data[sent:])

    def _end(self) -> None:
        self._is_over = True
        for half in self._halves:
            self._reactor.unregister(half.sock)
