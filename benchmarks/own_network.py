"""Task: a network namespace of the benchmark's own, whose TCP sends as soon as it may, where the host's paces itself by timers.

BBR measures a rate and keeps to it. On loopback there is no line whose rate it could find, and what it finds moves with the hour: it
doubled the CPU of everybody's bulk here. Most hosts have cubic, which does not pace, so all peers alike are measured without it.
"""

import ctypes
import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

_CONTROL: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_PACING: Final = "bbr"
_UNPACED: Final = ("cubic", "reno")
"""In the order of preference; a host may allow the second only."""
_CLONE_NEWNET: Final = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ: Final = struct.Struct("16sh14x")


def congestion_control() -> str:
    """The one that new sockets of this process have."""
    return _CONTROL.read_text().strip()


def leave_pacing_behind() -> None:
    """Enter such a namespace for good, if the host paces and this is root. Before any thread is started."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not congestion_control().startswith(_PACING) or os.geteuid() != 0 or libc.unshare(_CLONE_NEWNET) != 0:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
    for name in _UNPACED:
        with suppress(OSError):
            _CONTROL.write_text(name)
            return
