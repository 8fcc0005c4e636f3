"""Task: TLS ended at the relay: for browsers, so TLS 1.2 and later, HTTP/1.1 only; over a tunnel's stream, which has no descriptor."""

import ssl
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from fxtunnel.engine.stream import TunnelStream
from fxtunnel.errors import ConfigError
from fxtunnel.kit.files import read_secret

ALPN: Final = ("http/1.1",)
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


def web_context(cert_path: Path, key_path: Path) -> ssl.SSLContext:
    """TLS for browsers. Blocks on files.

    Raises:
        ConfigError: a file is missing, is not PEM, or the key is readable by others.
    """
    if b"ENCRYPTED" in read_secret(key_path):
        raise ConfigError.one(key_path, "", "is encrypted with a passphrase; run: openssl pkey -in OLD -out NEW")
    if not cert_path.is_file():
        raise ConfigError.one(cert_path, "", "does not exist")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(list(ALPN))
    try:
        context.load_cert_chain(cert_path, key_path)
    except (ssl.SSLError, OSError) as exc:
        why = (
            "does not belong to the key" if "MISMATCH" in (getattr(exc, "reason", "") or "") else "certificate or key is not in PEM format"
        )
        raise ConfigError.one(cert_path, "", f"{why} ({key_path})") from exc
    return context


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
