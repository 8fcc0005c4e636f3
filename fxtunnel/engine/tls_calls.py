"""Pump: how a TLS link is written to: at once, little of it in the kernel, and several records as few segments."""

import socket
import ssl
from collections.abc import Callable
from typing import Final, TypeVar

WRITE_BYTES: Final = 262_144
"""Handed to OpenSSL at once: it cuts records itself, which saves a Python call for each (about 10 % of a link's CPU)."""
NOTSENT_LOWAT_BYTES: Final = 131_072
"""Unsent bytes the kernel may hold for a link: interactive frames queue behind these."""

A = TypeVar("A")
R = TypeVar("R")


def keep_short(link: socket.socket) -> None:
    """Let bytes leave at once, and wait where they can still be ordered: in the ring, not in the kernel."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)


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
    if isinstance(exc, ssl.SSLZeroReturnError):
        return "closed by the peer"
    if isinstance(exc, ssl.SSLEOFError):
        return "the connection ended without a goodbye"
    if isinstance(exc, ssl.SSLError):
        return f"TLS: {exc.reason or exc}"
    return str(exc.strerror) if isinstance(exc, OSError) and exc.strerror else str(exc)
