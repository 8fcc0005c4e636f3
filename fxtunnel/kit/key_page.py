"""Task: fetches the page of a key set, over TLS or from this host."""

import ipaddress
import ssl
import urllib.parse
from functools import partial
from pathlib import Path
from typing import Final

import h11
import trio

MAX_PAGE_BYTES: Final = 262_144
"""Room for MAX_KEYS keys of 4 KiB each, certificate chains included."""
_OK: Final = 200
_RECEIVE_BYTES: Final = 65_536
_PORTS: Final = {"http": 80, "https": 443}


class PageError(Exception):
    """The page did not come; `str()` says why."""


def is_key_url(url: str) -> bool:
    """Whether keys may be fetched from there: over TLS, or from this host itself."""
    try:
        parts = urllib.parse.urlsplit(url)
        if not (url.isascii() and url.isprintable()) or " " in url or parts.port == 0:
            return False
        if parts.scheme == "https":
            return bool(parts.hostname)
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


async def fetch_page(url: str, ca: Path | None) -> bytes:
    """The page at a URL that `is_key_url`; `ca` is a file with certificates to trust for it. Set a deadline around it; safe to cancel.

    No proxy and no redirect: a key must come from where the administrator said.

    Raises:
        PageError: it did not come.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        stream = await _connect(parts, ca)
        async with stream:
            peer = h11.Connection(h11.CLIENT)
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            fields = [("Host", parts.netloc.rpartition("@")[2]), ("Accept", "application/json, */*"), ("Connection", "close")]
            request = peer.send(h11.Request(method="GET", target=target, headers=fields))
            await stream.send_all(request or b"")
            return await _body(peer, stream)
    except (trio.BrokenResourceError, OSError, UnicodeError, h11.ProtocolError) as exc:
        raise PageError(_reason(exc)) from exc


async def _connect(parts: urllib.parse.SplitResult, ca: Path | None) -> trio.abc.Stream:
    host = parts.hostname or ""
    if parts.scheme == "http":
        return await trio.open_tcp_stream(host, parts.port or _PORTS["http"])
    context = await trio.to_thread.run_sync(partial(ssl.create_default_context, cafile=ca))
    plain = await trio.open_tcp_stream(host, parts.port or _PORTS["https"])
    return trio.SSLStream(plain, context, server_hostname=host, https_compatible=True)


async def _body(peer: h11.Connection, stream: trio.abc.Stream) -> bytes:
    body = bytearray()
    while True:
        match peer.next_event():
            case h11.NEED_DATA:
                peer.receive_data(bytes(await stream.receive_some(_RECEIVE_BYTES)))
            case h11.Response(status_code=status) if status != _OK:
                raise PageError(f"status {status}")
            case h11.Data(data=data):
                body += data
                if len(body) > MAX_PAGE_BYTES:
                    raise PageError(f"longer than {MAX_PAGE_BYTES} bytes")
            case h11.EndOfMessage():
                return bytes(body)
            case _:
                pass  # the head of the answer, or one before it


def _reason(exc: Exception) -> str:
    reason: BaseException = exc.__cause__ or exc
    while isinstance(reason, BaseExceptionGroup):  # of several addresses
        reason = reason.exceptions[0]
    return str(reason)
