"""Task: TCP between two processes of one host goes without pacing."""

import ipaddress
import socket
from contextlib import suppress
from typing import Final

_PACING: Final = b"bbr"
"""How the names of congestion controls begin that send at a rate they have measured, with a timer between bursts."""
_NAME_BYTES: Final = 16


def is_loopback(host: str) -> bool:
    """Whether this is an address of the loopback interface, or the one name that means it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unpace(sock: socket.socket) -> None:
    """Have this TCP socket, both ends of which are on this host, send as soon as its reader has room, whatever the host's default is.

    BBR measures a rate and keeps to it by timers. Within a host there is no line whose rate could be found, only a reader that gets the
    core when we let go of it, and what was found is bursts of a few segments: half as much CPU again (docs/adr/0016). Best before `listen`
    or `connect`; later it still helps.
    """
    with suppress(OSError):  # an administrator may allow BBR only
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES).startswith(_PACING):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # compiled into every kernel, allowed to everybody


def unpace_within_host(sock: socket.socket) -> None:
    """`unpace` if this TCP connection is one of the loopback interface. Nothing happens to others, and to those that are reset already."""
    with suppress(OSError):  # not connected any more
        if is_loopback(sock.getpeername()[0]):
            unpace(sock)
