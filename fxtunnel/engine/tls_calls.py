"""Pump: the two calls a TLS link is read and written with, by the shortest way Python has, and several records as few segments."""

import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

RECORD_BYTES: Final = 16_384
WRITE_BYTES: Final = 262_144
"""Handed to OpenSSL at once: it cuts records itself, which saves a Python call for each (about 10 % of a link's CPU)."""
NOTSENT_LOWAT_BYTES: Final = 131_072
"""Unsent bytes the kernel may hold for a link: interactive frames queue behind these."""

A = TypeVar("A")
R = TypeVar("R")
RecvInto: TypeAlias = Callable[[int, memoryview], int]
"""Reads at most so many bytes, of one TLS record, into the front of the buffer; 0 is the end. Raises as `SSLSocket.recv_into` does."""
Send: TypeAlias = Callable[[memoryview], int]
"""Writes a part of the buffer; returns how much. Raises as `SSLSocket.send` does."""


def keep_short(link: ssl.SSLSocket) -> None:
    """Let bytes leave at once, and wait where they can still be ordered: in the ring, not in the kernel."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)


def tls_calls(link: ssl.SSLSocket) -> tuple[RecvInto, Send]:
    """`link.recv_into` and `link.send`, without the three or four Python frames that the ssl module puts around each of them.

    The object below an SSLSocket is private, so the public methods stand in where it is missing. What they add is of no use here: a look
    whether the socket is plain or closed, and EOF instead of an error for a link that ends without close_notify, which is lost either way.
    Let go of both calls when the link is closed: they hold its TLS state. (docs/adr/0013 has what it saves.)
    """
    below: Any = getattr(link, "_sslobj", None)
    if below is not None:
        return below.read, below.write
    return lambda limit_bytes, buffer: link.recv_into(buffer, limit_bytes), link.send


def corked(sock: socket.socket, write: Callable[[A], R], argument: A) -> R:
    """`write(argument)`, so that only full segments leave meanwhile (tcp(7), TCP_CORK); what is left over leaves at the end.

    OpenSSL writes a record at a time. Each would be a segment, an interruption of the receiver, and an event for whoever reads it.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    try:
        return write(argument)
    finally:
        if sock.fileno() >= 0:  # it may be closed by now
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def no_link(*_: object) -> int:
    """The calls of a session that has no link."""
    raise OSError("no link")


def reason_of(exc: Exception) -> str:
    """Why such a call failed, for a log line."""
    if isinstance(exc, ssl.SSLEOFError):
        return "the connection ended without a goodbye"
    if isinstance(exc, ssl.SSLError):
        return f"TLS: {exc.reason or exc}"
    return str(exc.strerror) if isinstance(exc, OSError) and exc.strerror else str(exc)
