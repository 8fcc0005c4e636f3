"""Task: telling systemd how we are (sd_notify(3)). Without systemd every call does nothing."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

_MAX_STATUS: Final = 500


class Notifier:
    """Sends state to the service manager's socket. Never blocks, never fails: a lost message costs a line in `systemctl status`."""

    def __init__(self, address: str | None = None, watchdog_interval_s: float | None = None) -> None:
        self._address = address
        self._watchdog_interval_s = watchdog_interval_s

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], pid: int | None = None) -> "Notifier":
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say; `pid` is this process."""
        path = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of an abstract socket; vsock: and other kinds are not for services on this machine.
        address = f"\0{path[1:]}" if path.startswith("@") and len(path) > 1 else path if path.startswith("/") else None
        return cls(address, _watchdog_interval_s(environ, os.getpid() if pid is None else pid) if address else None)

    @property
    def watchdog_interval_s(self) -> float | None:
        """Seconds within which systemd wants to hear `watchdog()`, call it twice as often; None if it does not ask."""
        return self._watchdog_interval_s

    def ready(self, status: str = "") -> None:
        """Start-up, or a reload, is over."""
        self._send("READY=1", *([_status(status)] if status else []))

    def reloading(self) -> None:
        """A reload begins; `ready()` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Shutdown has begun."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        self._send(_status(text))

    def watchdog(self) -> None:
        """Still alive."""
        self._send("WATCHDOG=1")

    def _send(self, *fields: str) -> None:
        if self._address is None:
            return
        # A socket per message: these are rare, and one kept open would have to survive every restart of the manager.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(fields).encode("utf-8", "replace"), self._address)


def _status(text: str) -> str:
    """One field: a line break in it would begin another one."""
    return "STATUS=" + "".join(c if c.isprintable() else " " for c in text[:_MAX_STATUS])


def _watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    try:
        interval_s = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return interval_s if interval_s > 0 else None
