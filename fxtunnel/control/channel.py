"""Task: a control link in use: one reader, one writer, a heartbeat, and the knowledge of whether the peer still lives."""

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from fxtunnel.codes import Code
from fxtunnel.control.messages import TEXT_CHARS, Closing, Message, Ping, Pong, Refused, decode, encode
from fxtunnel.errors import RemoteProtocolError, TunnelClosed

logger = logging.getLogger(__name__)

OUTBOX_MESSAGES: Final = 64  # a peer that lets this many pile up does not read; protects memory
GOODBYE_S: Final = 1.0  # a peer that is gone must not hold up a shutdown
_AT_ONCE_S: Final = 0.25  # a ping that would be due so soon goes now: it saves waking up twice


class Channel:
    """Typed messages both ways over an open WebSocket.

    The one who made it ends it with `goodbye` and closes the stream beneath. `receive` is for the opening messages, before `run`; during
    `run` every message goes to its callback.
    """

    def __init__(self, ws: WebSocketConnection) -> None:
        self._ws = ws
        self._outbox: deque[str] = deque()
        self._outbox_filled = trio.Event()
        self._ending: TunnelClosed | None = None
        self._running: trio.CancelScope | None = None
        self._is_torn = False  # a write was cut short: nothing sensible can follow it
        self._heard_at = 0.0
        self._pings_sent = 0

    def send_nowait(self, message: Message) -> None:
        """Queue a message; `run` sends it in order. Never blocks.

        Raises:
            TunnelClosed: the link is ending, or the peer does not read (then `run` ends too).
            LocalProtocolError: the message is too long to send.
        """
        if self._ending is not None:
            raise TunnelClosed(self._ending.code, str(self._ending), by_peer=self._ending.by_peer)
        text = encode(message)
        if len(self._outbox) >= OUTBOX_MESSAGES:
            self._end(TunnelClosed(Code.OVERLOAD, "the peer does not read its control messages"))
            raise TunnelClosed(Code.OVERLOAD, "the peer does not read its control messages")
        self._outbox.append(text)
        self._outbox_filled.set()

    def end_soon(self, last: Closing) -> None:
        """Let `run` send what is queued and `last`, and end within GOODBYE_S. Never blocks; only the first call counts."""
        if self._ending is not None:
            return
        self._ending = TunnelClosed(last.code, last.message)
        self._outbox.append(encode(last))
        self._outbox_filled.set()
        if self._running is not None:
            self._running.deadline = trio.current_time() + GOODBYE_S

    async def receive(self) -> Message:
        """The next message of a known type. Set a deadline around it. Cancelling it loses nothing.

        Raises:
            TunnelClosed: the link is gone.
            RemoteProtocolError: the peer sent something malformed.
        """
        while True:
            try:
                text = await self._ws.get_message()
            except ConnectionClosed as exc:
                raise _lost(exc) from exc
            if not isinstance(text, str):
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, "a binary message on the control link")
            message = decode(text)
            if message is not None:
                return message

    async def run(
        self,
        on_message: Callable[[Message], None],
        *,
        heartbeat_s: float,
        dead_after_s: float,
        yield_s: float = 0.0,
        is_vouched_for: Callable[[], bool] = lambda: False,
    ) -> None:
        """Carry messages until the link ends. Pings are sent and answered here; `on_message` sees everything else, in order.

        `on_message` must not block; a RemoteProtocolError from it ends the link with that code. A `Closing` is passed on before the
        link ends. `yield_s` is how much longer than the peer this end keeps quiet: it has the peer ping, which does for both.
        `is_vouched_for` says whether the peer proves on a data link that it lives: this link is then pinged after half of `dead_after_s`,
        for the sake of its own path. Cancelling is safe; say `goodbye` afterwards. Run it once.

        Raises:
            TunnelClosed: always, when it ends by itself: closed by the peer, lost, silent for `dead_after_s`, or broken by the peer's
                fault, in which case the peer has been told.
        """
        self._heard_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            self._running = nursery.cancel_scope
            if self._ending is not None:  # ended before it began: send what is queued, no more
                nursery.cancel_scope.deadline = trio.current_time() + GOODBYE_S
            nursery.start_soon(self._write, dead_after_s)
            slowly_s = max(heartbeat_s, dead_after_s / 2)
            nursery.start_soon(self._beat, lambda: yield_s + (slowly_s if is_vouched_for() else heartbeat_s), dead_after_s)
            try:
                await self._read(on_message)
            except RemoteProtocolError as exc:
                self.end_soon(Closing(code=exc.code, message=str(exc)[:TEXT_CHARS]))
            except TunnelClosed as exc:
                self._end(exc)
        assert self._ending is not None
        raise self._ending

    async def goodbye(self, last: Closing | Refused) -> None:
        """Send what is queued and `last`, then close the WebSocket. Takes at most GOODBYE_S, also when cancelled.

        Call it after `run`, or instead of it. If the link has ended already, only the WebSocket is closed. Never raises for a dead peer.
        """
        if self._ending is None:
            self._ending = TunnelClosed(last.code if isinstance(last, Closing) else Code.NORMAL, last.message)
            self._outbox.append(encode(last))
        with trio.move_on_after(GOODBYE_S, shield=True):
            try:
                while self._outbox and not self._is_torn:
                    await self._ws.send_message(self._outbox.popleft())
            except ConnectionClosed:
                logger.debug("the peer left before the goodbye")
            await self._ws.aclose()
        self._outbox.clear()

    def _end(self, why: TunnelClosed) -> None:
        # The first reason is the true one; what follows are its consequences.
        if self._ending is None:
            self._ending = why
        if self._running is not None:
            self._running.cancel()

    async def _read(self, on_message: Callable[[Message], None]) -> None:
        while True:
            message = await self.receive()
            self._heard_at = trio.current_time()
            match message:
                case Ping(n=n):
                    self.send_nowait(Pong(n=n))
                case Pong():
                    pass
                case Closing(code=code, message=text):
                    on_message(message)
                    raise TunnelClosed(code, text, by_peer=True)
                case _:
                    on_message(message)

    async def _write(self, stalled_after_s: float) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled = trio.Event()
            while self._outbox:
                self._is_torn = True
                try:
                    with trio.fail_after(stalled_after_s):
                        await self._ws.send_message(self._outbox.popleft())
                except trio.TooSlowError:
                    self._end(TunnelClosed(Code.LINK_LOST, f"the peer took nothing for {stalled_after_s:g} s"))
                    return
                except ConnectionClosed as exc:
                    self._end(_lost(exc))
                    return
                self._is_torn = False
            if self._ending is not None:
                self._end(self._ending)
                return

    async def _beat(self, quiet_s: Callable[[], float], dead_after_s: float) -> None:
        """Ping whenever nothing was heard for `quiet_s`, until nothing was for `dead_after_s`.

        A peer that talks is alive, and its own pings are answered: one ping and one pong keep both ends sure of each other.
        """
        pinged_at = -math.inf
        while True:
            now, dead_at = trio.current_time(), self._heard_at + dead_after_s
            if now >= dead_at:
                self._end(TunnelClosed(Code.LINK_LOST, f"nothing heard from the peer for {dead_after_s:g} s"))
                return
            due = max(self._heard_at, pinged_at) + quiet_s()
            if due - now < min(_AT_ONCE_S, dead_after_s / 8):
                self._pings_sent += 1
                try:
                    self.send_nowait(Ping(n=self._pings_sent))
                except TunnelClosed:
                    return
                pinged_at, due = now, now + quiet_s()
            await trio.sleep_until(min(due, dead_at))


def _lost(exc: ConnectionClosed) -> TunnelClosed:
    """What a closed WebSocket means for the link (RFC 6455, 7.4.1)."""
    reason = exc.reason
    if reason is None or reason.code == 1006:
        return TunnelClosed(Code.LINK_LOST, "the connection was lost", by_peer=True)
    if reason.code in (1000, 1001):
        return TunnelClosed(Code.NORMAL, "the peer closed the control link", by_peer=True)
    return TunnelClosed(Code.PROTOCOL_ERROR, f"the control link was closed with WebSocket code {reason.code}", by_peer=True)
