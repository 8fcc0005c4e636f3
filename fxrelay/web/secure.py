"""Task: TLS ended at the relay: for browsers, so TLS 1.2 and later, HTTP/1.1 only; over a tunnel's stream, which has no descriptor."""

import ssl
from contextlib import suppress
from typing import Final

import trio

from fxtunnel.engine.stream import TunnelStream

GOODBYE_S: Final = 1.0


class HandshakeFailed(Exception):
    """A client with which no TLS comes about. It has its alert."""


class EndingTransport(trio.abc.Stream):
    """The tunnel's stream under TLS: closing lets the client read what was sent."""

    def __init__(self, tunnel: TunnelStream) -> None:
        self._tunnel = tunnel

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._tunnel.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._tunnel.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        return await self._tunnel.receive_some(max_bytes)

    async def aclose(self) -> None:
        """See `TunnelStream.end`."""
        self._tunnel.end()
        await trio.lowlevel.checkpoint()


async def end_tls(tunnel: TunnelStream, context: ssl.SSLContext, timeout_s: float) -> trio.SSLStream[EndingTransport]:
    """The client's TLS, ended here.

    Raises:
        HandshakeFailed: none came about in time; the client was sent its alert and the stream is ended.
    """
    stream = trio.SSLStream(EndingTransport(tunnel), context, server_side=True)
    why = "no TLS handshake in time"
    with trio.move_on_after(timeout_s):
        try:
            await stream.do_handshake()
            return stream
        except (trio.BrokenResourceError, ssl.CertificateError) as exc:
            why = f"TLS: {getattr(exc.__cause__, 'reason', None) or exc}"
    # trio's SSLStream leaves the alert in its buffer, and the client would wait for it.
    alert = stream._outgoing.read()
    with trio.move_on_after(GOODBYE_S, shield=True), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        if alert:
            await tunnel.send_all(alert)
    tunnel.end()
    raise HandshakeFailed(why)
