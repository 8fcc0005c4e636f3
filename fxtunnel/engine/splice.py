"""Pump: a plain socket joined to a stream, bytes both ways, with TCP's own endings: FIN for FIN, RST for RST."""

import socket
import struct
from contextlib import suppress
from typing import ClassVar, Final

from fxtunnel.codes import Code
from fxtunnel.engine.ports import Carrier
from fxtunnel.engine.reactor import ERROR, HANGUP, INCOMING, ROOMY_EVENTS, STREAM_EVENTS, URGENT, WRITE, Reactor
from fxtunnel.engine.send_scheduler import lately
from fxtunnel.kit.unpaced import unpace_within_host
from fxtunnel.protocol.byte_queue import ByteQueue
from fxtunnel.protocol.stream import Stream

RESET_GRACE_S: Final = 0.5
"""How long bytes that arrived before a RESET may still drain to a reader that moves, before it gets its RST."""
PROVEN_WINDOW_BYTES: Final = 524_288
PROVEN_NOTSENT_BYTES: Final = 262_144
"""Unsent bytes that the kernel holds for a reader whose window has grown to that much. The budget of growth bounds how many there are."""
_DRAINED, _ENDED, _UNSURE = 0, 1, 2
"""What is behind a short read: nothing, and the next byte makes a new edge (epoll(7), question 9); the FIN, which had come before the
read; or perhaps more, since it stops at an urgent byte as well."""
UNHEARD, HEARD, MADE = 0, 1, 2
"""Of room in the socket: no event tells, for it was never full; an event tells; and the kernel holds more for its reader."""
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER for every spliced socket from its first moment: if this process is killed, the kernel's close is a RST, not a clean end."""
CLOSE_CLEANLY: Final = struct.pack("ii", 0, 0)
"""SO_LINGER for a socket whose conversation has ended in order: what the kernel still holds is delivered."""


def abort(sock: socket.socket) -> None:
    """Close with RST, so that the other end can never take a broken transfer for a complete one."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    finally:
        sock.close()


class Splice:
    """A socket and the stream it is joined to. Owns the socket; `released` is called once, when it has been closed.

    Subclasses say how the two come together (`on_accept`, `on_refuse`) and what is to be released.
    """

    fin_is_end: ClassVar = True
    """Whether the socket's FIN is the end of what can be read from it."""

    __slots__ = (
        "_aborting",
        "_behind",
        "_fin_wanted",
        "_pending",
        "_queued",
        "_read_done",
        "_readable",
        "_room",
        "_write_blocked",
        "closed",
        "reactor",
        "session",
        "sock",
        "stream",
        "turn_bytes",
    )

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self.reactor = reactor
        self.sock = sock
        self.session: Carrier | None = None
        self.stream: Stream | None = None
        self.closed = False
        self.turn_bytes = 0
        self._pending: ByteQueue | None = None
        self._readable = False
        self._queued = False
        self._read_done = False
        self._behind = _DRAINED
        self._room = UNHEARD
        self._write_blocked = False
        self._fin_wanted = False
        self._aborting = False

    def join(self, session: Carrier, stream: Stream) -> None:
        """Carry the socket's bytes on this stream from now on."""
        if self._queued and self.session is not None:
            self.session.cancel_turn(self)
            self._queued = False
        self.session = session
        self.stream = stream
        stream.endpoint = self
        if self._readable:
            self._queue_read()

    def reads_short(self) -> None:
        """Its reads may stop short of what is there: those of a unix socket do where a descriptor was passed (unix(7))."""
        self._behind = _UNSURE

    def start(self) -> None:
        """Begin to listen to the socket."""
        self._room = HEARD if self._write_blocked else UNHEARD
        self.reactor.register(self.sock, self, STREAM_EVENTS if self._write_blocked else ROOMY_EVENTS)

    @property
    def moved_bytes(self) -> int:
        """Bytes moved so far, both ways. What waits for the socket to take it has not moved yet."""
        stream, pending = self.stream, self._pending
        return 0 if stream is None else stream.bytes_in + stream.bytes_out - (len(pending) if pending is not None else 0)

    def released(self) -> None:
        """The socket is closed; give back what was claimed for it."""

    def read_turn(self, limit_bytes: int) -> int:
        """Called by the session: read at most `limit_bytes` from the socket into one DATA frame. Returns how many there were."""
        self._queued = False
        stream, session = self.stream, self.session
        if stream is None or session is None or stream.closed or not self._readable:
            return 0
        if limit_bytes > stream.send_credit:
            limit_bytes = stream.send_credit
        if limit_bytes <= 0:
            return 0
        slot = session.mux.ring.slot(limit_bytes)
        try:
            count = self.sock.recv_into(slot)
        except BlockingIOError:
            self._readable = False
            return 0
        except OSError:
            self.fail(Code.PEER_RESET)
            return 0
        if not count:
            self._read_to_end(stream)
            return 0
        stream.sent(slot, count)
        self.turn_bytes = lately(self.turn_bytes, count)
        if count < limit_bytes and self._behind != _UNSURE:
            if self._behind == _ENDED:
                self._read_to_end(stream)
            self._readable = False
        elif stream.send_credit > 0:
            self._queue_read()
        elif self._behind:
            self._fail_if_reset()
        return count

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if events & WRITE and self._write_blocked:
            self._write_blocked = False
            self._drain()
            if self.closed:
                return
        if events & INCOMING:
            if events & (HANGUP | URGENT):
                is_end = self._behind == _DRAINED and self.fin_is_end and not events & (ERROR | URGENT)
                self._behind = _ENDED if is_end else _UNSURE
                if events & URGENT:
                    # Here and not on every socket: hardly anyone sends such a byte, but where one is (telnet), it belongs to the stream.
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            self._readable = True
            stream = self.stream
            if self._read_done or stream is None or stream.send_credit <= 0:
                if events & ERROR:
                    self._fail_if_reset()
            elif not self._queued:
                self._queue_read()

    def _read_to_end(self, stream: Stream) -> None:
        self._readable = False
        self._read_done = True
        stream.fin()
        self._close_if_done()

    def on_crash(self) -> None:
        """From the reactor or the session: a bug of ours; this stream ends, nothing else does."""
        self.fail(Code.INTERNAL_ERROR)

    def on_accept(self) -> None:
        """See `Endpoint`."""

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        self.abort()

    def on_redirect(self, relay: str) -> None:
        """See `Endpoint`."""
        self.abort()

    def on_data(self, data: memoryview) -> None:
        """See `Endpoint`."""
        if self.closed:
            return
        if not self._write_blocked and not self._pending:
            try:
                count = self.sock.send(data)
            except BlockingIOError:
                count = 0
            except OSError:
                self.fail(Code.PEER_RESET)
                return
            if count:
                self.stream.consumed(count)  # type: ignore[union-attr]  # data comes from a stream
                if count == len(data):
                    return
            self._wait_for_room()
            data = data[count:]
        if self._pending is None:
            self._pending = ByteQueue()
            self._make_room()
        self._pending.append(data)

    def on_last_data(self, data: memoryview) -> None:
        """See `Endpoint`. The kernel keeps the bytes for the FIN that `on_fin` gives it, and both leave as one segment."""
        if not self._write_blocked and not self._pending and not self.closed:
            try:
                count = self.sock.send(data, socket.MSG_MORE)
            except OSError:
                count = 0  # `on_data` deals with it
            if count:
                self.stream.consumed(count)  # type: ignore[union-attr]  # data comes from a stream
                if count == len(data):
                    return
                data = data[count:]
        self.on_data(data)

    def on_fin(self) -> None:
        """See `Endpoint`."""
        self._fin_wanted = True
        if not self._pending and not self._write_blocked:
            self._shut_write()

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        if self._pending and not self.closed:
            self._aborting = True
            self.reactor.call_later(RESET_GRACE_S, self.abort)
        else:
            self.abort()

    def on_credit(self) -> None:
        """See `Endpoint`."""
        if self._readable:
            self._queue_read()

    def fail(self, code: Code) -> None:
        """The socket is broken, or has to go: RESET to the stream, RST to the socket."""
        try:
            if self.stream is not None:
                self.stream.reset(code)
        finally:
            self.abort()

    def abort(self) -> None:
        """RST to the socket. The stream has been dealt with. May be repeated."""
        if not self.closed:
            self._let_go()
            abort(self.sock)
            self.released()

    def _wait_for_room(self) -> None:
        """The socket is full; the next event says that it is not."""
        self._write_blocked = True
        if self._room == UNHEARD:
            self._room = HEARD
            self.reactor.modify(self.sock, STREAM_EVENTS)

    def _make_room(self) -> None:
        """A reader that has proven itself, and is slower than the tunnel, gets more of it from the kernel, and less through `_pending`.

        On this host the kernel does not pace it, either: here and not at `connect`, where a short connection would pay for it.
        """
        if self._room != MADE and self.stream is not None and self.stream.window.window_bytes >= PROVEN_WINDOW_BYTES:
            self._room = MADE
            with suppress(OSError):  # a unix socket has no such thing
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PROVEN_NOTSENT_BYTES)
                unpace_within_host(self.sock)

    def _fail_if_reset(self) -> None:
        # Nobody will read this socket soon, so a reset would not be seen on the way.
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.fail(Code.PEER_RESET)

    def _queue_read(self) -> None:
        if not self._queued and not self._read_done and self.session is not None:
            self._queued = True
            self.session.want_turn(self)

    def _drain(self) -> None:
        pending = self._pending
        while pending:
            first = pending.first
            try:
                count = self.sock.send(first)
            except BlockingIOError:
                self._wait_for_room()
                return
            except OSError:
                self.fail(Code.PEER_RESET)
                return
            pending.left(count)
            self.stream.consumed(count)  # type: ignore[union-attr]  # pending bytes came from a stream
            if count < len(first):
                self._wait_for_room()
                return
        self._forget_pending()
        if self._aborting:
            self.abort()
        elif self._fin_wanted:
            self._shut_write()

    def _shut_write(self) -> None:
        if self._read_done:
            self._close_if_done()
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.fail(Code.PEER_RESET)

    def _close_if_done(self) -> None:
        if self._read_done and self._fin_wanted and not self._pending and not self._write_blocked and not self.closed:
            self._let_go()
            try:
                # Both directions have ended in order, so what the kernel still holds may be delivered.
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_CLEANLY)
            finally:
                self.sock.close()
                self.released()

    def _forget_pending(self) -> None:
        if self._pending is not None:
            self._pending = None
            if self.stream is not None:
                self.stream.emptied()

    def _let_go(self) -> None:
        self.closed = True
        self._forget_pending()
        self._readable = False
        self.reactor.forget(self.sock)
