"""Pump: a tunnel's stream as a trio stream, for a task that must look inside, until it is given back to the pump.

The endings of TCP are those of the tunnel: FIN reads as the end (`b""`), RESET raises `trio.BrokenResourceError`, and never the other way
round. What arrives waits here, at most the stream's window; credit goes back only for what was received.
"""

from collections.abc import Callable
from typing import Final

import trio

from fxtunnel.codes import Code
from fxtunnel.engine.ports import Carrier
from fxtunnel.engine.reactor import Timer
from fxtunnel.engine.send_scheduler import lately
from fxtunnel.errors import LocalProtocolError
from fxtunnel.kit.conflict_detector import ConflictDetector
from fxtunnel.protocol.stream import Stream

CLOSE_LINGER_S: Final = 60.0
"""How long a stream closed by us waits for the peer's FIN before it is reset: that would overtake bytes that a slow client still reads."""
END_DROPS_BYTES: Final = 262_144
"""How much of what a client goes on sending after `end` is dropped."""
DEFAULT_RECEIVE_BYTES: Final = 65_536
Later = Callable[[float, Callable[[], None]], Timer]


class TunnelStream(trio.abc.HalfCloseableStream):
    """One stream of a session. One task may send while another receives.

    A receive may be cancelled without losing anything. A cancelled `send_all` leaves it open how much was sent: the stream can then only be
    reset. `on_broken` is called, from the reactor, when the peer or the session reset the stream; `on_arrival` when there is something to
    receive, or the end, and no task waits for it.
    """

    def __init__(self, carrier: Carrier, stream: Stream, call_later: Later, on_broken: Callable[[], None] | None = None) -> None:
        self.stream = stream
        self.on_broken = on_broken
        self.on_arrival: Callable[[], None] | None = None
        self.broken: Code | None = None
        self.turn_bytes = 0
        self.session = carrier
        self._call_later = call_later
        self._arrived = bytearray()
        self._fin = False
        self._is_open = True
        self._eof_sent = False
        self._unfinished = False
        self._drops_bytes = 0
        self._linger: Timer | None = None
        self._outgoing: memoryview | None = None
        self._queued = False
        self._receiver: trio.lowlevel.Task | None = None
        self._sender: trio.lowlevel.Task | None = None
        self._receiving = ConflictDetector("another task is receiving on this stream")
        self._sending = ConflictDetector("another task is sending on this stream")
        stream.endpoint = self

    # --- for tasks ---

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte, at most `max_bytes` (65,536 unless told); `b""` after the peer's FIN.

        Raises:
            trio.BrokenResourceError: the stream was reset.
        """
        limit = DEFAULT_RECEIVE_BYTES if max_bytes is None else max_bytes
        if not isinstance(limit, int):
            raise TypeError("max_bytes must be an integer")
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            if self._arrived or self._fin or self.broken is not None or not self._is_open:
                await trio.lowlevel.checkpoint()
            else:
                self._receiver = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_receiving)
            return self._take(limit)

    @property
    def is_at_end(self) -> bool:
        """Whether nothing more will arrive; what has arrived may still be unread."""
        return self._fin or self.broken is not None or not self._is_open

    def receive_nowait(self) -> bytes:
        """What has arrived, or nothing."""
        return self._take(DEFAULT_RECEIVE_BYTES) if self._arrived and self._is_open else b""

    def send_nowait(self, data: bytes) -> bool:
        """Send all of `data` if that needs no waiting; whether it was sent. Nothing of it was, if not."""
        if self._sending.is_busy or not self._is_open or self._eof_sent or self._unfinished or self.broken is not None:
            return False
        if len(data) > self.stream.send_credit or self.session.has_room(len(data)) < len(data):
            return False
        self._outgoing = memoryview(data)
        self._write(len(data))
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`: returns when the session has it, which waits for credit and for the link.

        Raises:
            trio.BrokenResourceError: the stream was reset, or an earlier send did not finish.
        """
        with self._sending:
            self._check_can_send()
            with memoryview(data).cast("B") as view:
                if len(view):
                    self._unfinished = True
                    self._outgoing = view
                    self._push()
                if self._outgoing is None:
                    self._unfinished = False  # all of it is on its way, cancelled or not
                    await trio.lowlevel.checkpoint()
                    self._check_can_send()
                    return
                try:
                    await self._wait_sender()
                finally:
                    self._outgoing = None
            self._check_can_send(was_sending=True)
            self._unfinished = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is credit."""
        with self._sending:
            self._check_can_send()
            if self.stream.send_credit > 0:
                await trio.lowlevel.checkpoint()
            else:
                await self._wait_sender()
            self._check_can_send()

    async def send_eof(self) -> None:
        """FIN: nothing more will be sent. May be repeated."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            if not self._eof_sent:
                self._check_can_send()
                self._eof_sent = True
                self.stream.fin()

    async def aclose(self) -> None:
        """End both directions as TCP's close does: FIN if all was sent and nothing is unread, or else RESET; RESET for what comes later."""
        if self._is_open:
            if self._arrived:
                self.reset(Code.CANCELLED)
            else:
                self._end(0)
        await trio.lowlevel.checkpoint()

    def end(self) -> None:
        """End both directions so that the peer surely gets all that was sent: what it still sends is dropped for a while, not answered with
        RESET. If a send did not finish, RESET. May be repeated.
        """
        if self._is_open:
            self._end(END_DROPS_BYTES)

    def reset(self, code: Code) -> None:
        """RESET: the client must not take what it has for the whole."""
        self._is_open = False
        self._arrived.clear()
        self.stream.reset(code)
        self.stream.emptied()
        self._wake_all()

    def give_back(self, unread: bytes = b"") -> tuple[bytearray, bool]:
        """End the looking inside: the next endpoint carries the stream from here on. `unread` was received, but not used.

        Returns what the next endpoint has to take first (its bytes count as consumed when they have left), and whether the peer has
        sent its FIN.

        Raises:
            LocalProtocolError: the stream is in use, broken or closed.
        """
        if not self._is_open or self.broken is not None or self._unfinished or self._receiving.is_busy or self._sending.is_busy:
            raise LocalProtocolError("cannot give back a stream that is in use, broken or closed")
        self._is_open = False
        self.stream.window.returned(len(unread))
        rest, self._arrived = bytearray(unread) + self._arrived, bytearray()
        return rest, self._fin

    # --- from the session: see Endpoint ---

    def on_accept(self) -> None:
        """See `Endpoint`."""

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        self.on_reset(code)

    def on_redirect(self, relay: str) -> None:
        """See `Endpoint`."""
        self.on_reset(Code.UNSUPPORTED)

    def on_data(self, data: memoryview) -> None:
        """See `Endpoint`."""
        if not self._is_open:
            self._drops_bytes -= len(data)
            if self._drops_bytes < 0:
                self.stream.reset(Code.CANCELLED)
            else:
                self.stream.consumed(len(data))
            return
        self._arrived += data
        self._wake_receiver()
        if self.on_arrival is not None:
            self.on_arrival()

    def on_last_data(self, data: memoryview) -> None:
        """See `Endpoint`."""
        self.on_data(data)

    def on_fin(self) -> None:
        """See `Endpoint`."""
        self._fin = True
        self._wake_receiver()
        self._stop_lingering()
        if self.on_arrival is not None:
            self.on_arrival()

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        self.broken = code
        self._wake_all()
        self._stop_lingering()
        if self._is_open and self.on_broken is not None:
            self.on_broken()

    def on_credit(self) -> None:
        """See `Endpoint`."""
        if self._outgoing is not None:
            self._queue()
        else:
            self._wake_sender()

    def on_crash(self) -> None:
        """See `Endpoint`: the task is told that the stream was reset."""
        self.stream.reset(Code.INTERNAL_ERROR)
        self.on_reset(Code.INTERNAL_ERROR)

    def read_turn(self, limit_bytes: int) -> int:
        """See `StreamSender`."""
        self._queued = False
        count = self._write(limit_bytes)
        self.turn_bytes = lately(self.turn_bytes, count)
        if self._outgoing is None:
            self._wake_sender()
        elif self.stream.send_credit > 0:
            self._queue()
        return count

    # ---

    def _end(self, drops_bytes: int) -> None:
        self._is_open = False
        self._drops_bytes = drops_bytes
        if self._unfinished or self.broken is not None:
            self.stream.reset(Code.CANCELLED)
        else:
            self.stream.consumed(len(self._arrived))
            self.stream.fin()
            if not self.stream.closed:
                self._linger = self._call_later(CLOSE_LINGER_S, self._linger_over)
        self._arrived.clear()
        self.stream.emptied()
        self._wake_all()

    def _stop_lingering(self) -> None:
        if self._linger is not None:
            self._linger.cancel()  # it would keep this stream in memory

    def _linger_over(self) -> None:
        self.stream.reset(Code.CANCELLED)

    def _take(self, limit: int) -> bytes:
        if not self._is_open:
            raise trio.ClosedResourceError("this stream was closed")
        arrived = self._arrived
        if arrived:
            if len(arrived) <= limit:
                data = bytes(arrived)
                self._arrived = bytearray()
                self.stream.emptied()
            else:
                data = bytes(memoryview(arrived)[:limit])
                del arrived[:limit]
            self.stream.consumed(len(data))
            return data
        if self.broken is not None:
            raise trio.BrokenResourceError(f"the stream was reset: {self.broken.label}")
        return b""

    def _push(self) -> None:
        """As much as can go at once; for the rest, a turn."""
        room = self.session.has_room(len(self._outgoing or b""))
        if room:
            self._write(room)
        if self._outgoing is not None and self.stream.send_credit > 0:
            self._queue()

    def _write(self, limit_bytes: int) -> int:
        outgoing, stream = self._outgoing, self.stream
        if outgoing is None or stream.closed:
            return 0
        count = min(limit_bytes, stream.send_credit, len(outgoing))
        if count <= 0:
            return 0
        slot = self.session.mux.ring.slot(count)
        slot[:] = outgoing[:count]
        stream.sent(slot, count)
        self.session.wake()
        self._outgoing = outgoing[count:] if count < len(outgoing) else None
        return count

    def _queue(self) -> None:
        if not self._queued and not self.stream.closed:
            self._queued = True
            self.session.want_turn(self)

    def _check_can_send(self, *, was_sending: bool = False) -> None:
        if not self._is_open or self._eof_sent:
            raise trio.ClosedResourceError("this stream was closed")
        if self.broken is not None:
            raise trio.BrokenResourceError(f"the stream was reset: {self.broken.label}")
        if self._unfinished and not was_sending:
            raise trio.BrokenResourceError("an earlier send on this stream did not finish")

    async def _wait_sender(self) -> None:
        self._sender = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._stop_sending)

    def _stop_receiving(self, _: object) -> trio.lowlevel.Abort:
        self._receiver = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _stop_sending(self, _: object) -> trio.lowlevel.Abort:
        self._sender = None
        if self._queued:
            self._queued = False
            self.session.cancel_turn(self)
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_receiver(self) -> None:
        task, self._receiver = self._receiver, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _wake_sender(self) -> None:
        task, self._sender = self._sender, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _wake_all(self) -> None:
        if self._queued:
            self._queued = False
            self.session.cancel_turn(self)
        self._wake_receiver()
        self._wake_sender()
