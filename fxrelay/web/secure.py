"""Task: TLS ended at the relay: for browsers, so TLS 1.2 and later, HTTP/1.1 only; over a tunnel's stream, which has no descriptor."""

import ssl
from contextlib import suppress
from typing import Final

import trio

from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.fair_queue import FairQueue
from fxtunnel.kit.waiter import Waiter

GOODBYE_S: Final = 1.0
STEPS_AT_ONCE: Final = 8
"""Steps of handshakes that are computed in one turn of trio's loop. One takes up to a millisecond, and everything else waits meanwhile."""


class HandshakeFailed(Exception):
    """A client's TLS handshake failed. It has been sent the alert."""


class HandshakeTurns:
    """Who may compute: a few steps of handshakes in one turn of the loop, the sources of clients one after the other. One for a relay."""

    def __init__(self) -> None:
        self.waiting: FairQueue[trio.Event] = FairQueue()
        self._left = STEPS_AT_ONCE
        self._used_up = Waiter()

    async def run(self) -> None:
        """Let those who wait have their steps, until cancelled."""
        while True:
            if self._left:
                await self._used_up.wait()  # so steps that nobody waits for wake this once in eight
            else:
                await trio.lowlevel.checkpoint()
            self._left = STEPS_AT_ONCE
            while self._left and self.waiting:
                self.waiting.take().set()
                self._left -= 1

    def begin_nowait(self) -> bool:
        """Whether a step may be done at once."""
        if not self._left:
            return False
        self._left -= 1
        if not self._left:
            self._used_up.wake()
        return True

    async def begin(self, source: str) -> None:
        """Returns when a client of this source may do a step. Cancelling gives its place up."""
        turn = trio.Event()
        self.waiting.put(source, turn)
        try:
            await turn.wait()
        except trio.Cancelled:
            self.waiting.discard(source, turn)
            raise


class EndingTransport(trio.abc.Stream):
    """The tunnel's stream under TLS: closing lets the client read what was sent. What it receives is handed over when it is the source's
    turn, while it has `turns`: what it has during the handshake.
    """

    def __init__(self, tunnel: TunnelStream, turns: HandshakeTurns, source: str) -> None:
        self.turns: HandshakeTurns | None = turns
        self._tunnel = tunnel
        self._source = source

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._tunnel.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._tunnel.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        data = await self._tunnel.receive_some(max_bytes)
        if self.turns is not None and not self.turns.begin_nowait():
            await self.turns.begin(self._source)
        return data

    async def aclose(self) -> None:
        """See `TunnelStream.end`."""
        self._tunnel.end()
        await trio.lowlevel.checkpoint()


async def end_tls(
    tunnel: TunnelStream, context: ssl.SSLContext, timeout_s: float, turns: HandshakeTurns, source: str
) -> trio.SSLStream[EndingTransport]:
    """Terminate a client's TLS. `source` is the source that the client counts as.

    Raises:
        HandshakeFailed: none came about in time; the client was sent its alert and the stream is ended.
    """
    transport = EndingTransport(tunnel, turns, source)
    stream = trio.SSLStream(transport, context, server_side=True)
    why = "no TLS handshake in time"
    with trio.move_on_after(timeout_s):
        try:
            await stream.do_handshake()
            return stream
        except (trio.BrokenResourceError, ssl.CertificateError) as exc:
            why = f"TLS: {getattr(exc.__cause__, 'reason', None) or exc}"
        finally:
            transport.turns = None
    # trio's SSLStream leaves the alert in its buffer, and the client would wait for it.
    alert = stream._outgoing.read()
    with trio.move_on_after(GOODBYE_S, shield=True), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        if alert:
            await tunnel.send_all(alert)
    tunnel.end()
    raise HandshakeFailed(why)
