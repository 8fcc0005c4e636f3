"""Task: telling systemd, or our launcher, how we are (sd_notify(3)). Without either every call does nothing."""

import array
import contextlib
import errno
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Final

LAUNCHER_FD: Final = "FX_LAUNCHER_FD"
"""The environment variable in which a launcher (fxtunnel.kit.launcher) names the socket that leads to it."""
PREPARED: Final = "X_FX_PREPARED=1"
GO: Final = b"GO"
"""What a launcher says to a daemon whose turn it is."""
END: Final = b"END"
"""What it says before the SIGTERM of a daemon that nobody will follow."""
HEARD_S: Final = 2.0
"""For a manager, or our launcher, to take what it has to know. It may have much to do; ten messages wait for it (net.unix.max_dgram_qlen),
and a socket that it does not keep is closed in the next restart."""
_TRY_AGAIN_S: Final = 0.002
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS})
_WORD_BYTES: Final = 16
_MAX_STATUS: Final = 500


class Notifier:
    """Sends state to the service manager's socket. Never fails; waits for one that does not hear, for HEARD_S and not again until it does.
    Where a lost message costs no more than a line in `systemctl status` it does not wait.

    Below a launcher it is told instead, on a socket of our own (`launcher`): it passes on what the present process says.
    """

    def __init__(self, address: str | None = None, watchdog_interval_s: float | None = None, launcher: socket.socket | None = None) -> None:
        self._address = address
        self._watchdog_interval_s = watchdog_interval_s
        self._is_heard = True
        self.launcher = launcher
        """The socket to the launcher, None without one. When it closes, the launcher is gone and this process should drain."""
        self.is_last = False
        """Whether the launcher has said that nobody follows."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], pid: int | None = None) -> "Notifier":
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say; `pid` is this process."""
        if LAUNCHER_FD in environ:
            launcher = socket.socket(fileno=int(environ[LAUNCHER_FD]))
            os.set_inheritable(launcher.fileno(), False)
            launcher.setblocking(False)
            return cls(None, _interval_s(environ), launcher)
        path = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of an abstract socket; vsock: and other kinds are not for services on this machine.
        address = f"\0{path[1:]}" if path.startswith("@") and len(path) > 1 else path if path.startswith("/") else None
        return cls(address, _watchdog_interval_s(environ, os.getpid() if pid is None else pid) if address else None)

    @classmethod
    def of_this_process(cls) -> "Notifier":
        """As the environment says. The launcher's socket is taken out of it: it is not for processes that we start."""
        notifier = cls.from_environ(os.environ)
        os.environ.pop(LAUNCHER_FD, None)
        return notifier

    @property
    def watchdog_interval_s(self) -> float | None:
        """Seconds within which systemd wants to hear `watchdog()`, call it twice as often; None if it does not ask."""
        return self._watchdog_interval_s

    def prepared(self) -> None:
        """Tell a launcher that our configuration works, and that we can begin once the process before us has let go."""
        if self.launcher is not None:
            self._send(PREPARED)

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
        self._mention(_status(text))

    def watchdog(self) -> None:
        """Still alive."""
        self._mention("WATCHDOG=1")

    def hear(self) -> bytes:
        """The launcher's next word; empty if it has said nothing, or is gone. Never blocks."""
        try:
            word = self.launcher.recv(_WORD_BYTES) if self.launcher is not None else b""
        except OSError:
            word = b""
        self.is_last = self.is_last or word == END
        return word

    def keep(self, name: str, sock: socket.socket) -> None:
        """Have a copy of a socket kept and handed to our successor, so that a listening socket's queue is never closed in between."""
        self._send("FDSTORE=1", f"FDNAME={name}", fd=sock.fileno())

    def drop(self, name: str) -> None:
        """Do not have this socket kept any longer."""
        self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def pass_on(self, fields: bytes) -> None:
        """What a daemon below us said, as it said it."""
        self._send(*fields.decode("utf-8", "replace").splitlines())

    def close(self) -> None:
        """Nothing is told any more."""
        if self.launcher is not None:
            self.launcher.close()

    def _send(self, *fields: str, fd: int | None = None) -> None:
        """Say what has to be known."""
        try:
            self._say(fields, fd, HEARD_S if self._is_heard else 0.0)
            self._is_heard = True
        except OSError as exc:
            self._is_heard = exc.errno not in _FULL

    def _mention(self, *fields: str) -> None:
        """Say what will be said again, or is nice to know."""
        with contextlib.suppress(OSError):
            self._say(fields, None, 0.0)

    def _say(self, fields: tuple[str, ...], fd: int | None, patience_s: float) -> None:
        text = "\n".join(fields).encode("utf-8", "replace")
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        if self.launcher is not None:
            _send_soon(partial(self.launcher.sendmsg, [text], rights), patience_s)
        elif self._address is not None:
            # A socket per message: these are rare, and one kept open would have to survive every restart of the manager.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                _send_soon(partial(sock.sendmsg, [text], rights, 0, self._address), patience_s)


class LoopNotifier(Notifier):
    """A notifier for a process whose loop must not wait: what cannot be said at once is said by a thread, in order, as soon as it is heard.

    Nothing of it is lost while the process lives. What has not been heard when `close` is called is lost after HEARD_S.
    """

    def __init__(self, address: str | None = None, watchdog_interval_s: float | None = None, launcher: socket.socket | None = None) -> None:
        super().__init__(address, watchdog_interval_s, launcher)
        self._queue: SimpleQueue[tuple[tuple[str, ...], int | None]] = SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._give_up_at = math.inf
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """See `Notifier`. Blocks while something waits, for HEARD_S at most."""
        self._give_up_at = time.monotonic() + HEARD_S
        if self._thread is not None:
            self._queue.put(_LAST)
            self._thread.join()
        super().close()

    def _send(self, *fields: str, fd: int | None = None) -> None:
        if not self._waiting:
            try:
                self._say(fields, fd, 0.0)
            except OSError as exc:
                if exc.errno not in _FULL:
                    return
            else:
                return
        try:
            self._leave_to_thread(fields, fd)
        except (OSError, RuntimeError):  # no descriptor for a copy, or no thread: then it has to be waited for here
            super()._send(*fields, fd=fd)

    def _leave_to_thread(self, fields: tuple[str, ...], fd: int | None) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._say_all, name="notifier", daemon=True)
            thread.start()
            self._thread = thread
        copy = None if fd is None else os.dup(fd)  # the caller may close its own
        with self._lock:
            self._waiting += 1
        self._queue.put((fields, copy))

    def _say_all(self) -> None:
        while (message := self._queue.get()) is not _LAST:
            fields, fd = message
            try:
                self._say_in_time(fields, fd)
            finally:
                if fd is not None:
                    os.close(fd)
                with self._lock:
                    self._waiting -= 1

    def _say_in_time(self, fields: tuple[str, ...], fd: int | None) -> None:
        while True:
            try:
                self._say(fields, fd, 0.0)
            except OSError as exc:
                if exc.errno not in _FULL or time.monotonic() >= self._give_up_at:
                    return
            else:
                return
            time.sleep(_TRY_AGAIN_S)


_LAST: Final[tuple[tuple[str, ...], int | None]] = ((), None)


def _send_soon(send: Callable[[], int], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while True:
        try:
            send()
        except OSError as exc:
            if exc.errno not in _FULL or time.monotonic() >= until:
                raise
        else:
            return
        time.sleep(_TRY_AGAIN_S)  # nothing tells of room in somebody else's queue


def _status(text: str) -> str:
    """One field: a line break in it would begin another one."""
    return "STATUS=" + "".join(c if c.isprintable() else " " for c in text[:_MAX_STATUS])


def _watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return _interval_s(environ)


def _interval_s(environ: Mapping[str, str]) -> float | None:
    try:
        interval_s = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return interval_s if interval_s > 0 else None
