"""Task: a small parent for a daemon, so that a restart or an upgrade loses nothing: the old process drains while the new one serves.

It blocks, and imports next to nothing, so that little can go wrong in it. It speaks sd_notify(3) both ways. Its daemons tell it on a
socket of their own which sockets to keep, that they are prepared, and, with STOPPING=1, that they have let go of everything a
successor needs; that one begins then. What the present one says is passed on to the service manager, which knows the launcher only.

| signal | what happens |
|---|---|
| SIGTERM, SIGINT | the daemon lets go and drains; the launcher ends then if a service manager started it, else with the last daemon |
| SIGHUP | passed on; to a successor that is not prepared yet, once it is |
| SIGUSR2 | a successor is started; once it is prepared, the daemon before it lets go and drains; if it fails, nothing changes |
|         | one more that is asked for meanwhile is started when that is done |
| SIGABRT | the daemon is killed: systemd's watchdog has missed it |

A daemon whose launcher is gone without a word drains as well. One that is ended by a signal of somebody else's (kill -9, the kernel when
memory is short, a crash in C) is replaced at once, with the sockets that are kept, unless that happens again within seconds; any other
end is the launcher's too, with the daemon's exit code.
"""

import contextlib
import fcntl
import os
import resource
import selectors
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from fxtunnel.kit.notify import END, GO, LAUNCHER_FD, PREPARED, Notifier

FIRST_FD: Final = 3
PREPARE_S: Final = 60.0
"""For a successor to say that it is prepared."""
RELEASE_S: Final = 10.0
"""For a daemon to let go of its listening sockets after SIGTERM. That takes milliseconds; one that needs longer is stuck, and killed."""
LIVED_S: Final = 10.0
"""A daemon that a signal has ended sooner is not replaced here: whoever runs the launcher waits between attempts, or gives up."""
MAX_KEPT: Final = 4_200
"""Sockets kept for a daemon: those of 4,096 doors and some more. FileDescriptorStoreMax of the units in deploy/ goes by it."""
_MESSAGE_BYTES: Final = 4_096
_FD_BYTES: Final = struct.calcsize("i")
_PREPARED: Final = PREPARED.partition("=")[0]
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGABRT, signal.SIGCHLD)


@dataclass(slots=True, eq=False)
class _Daemon:
    pid: int
    link: socket.socket
    started: float
    told_to_stop: float | None = None
    has_let_go: bool = False
    exit_code: int | None = None
    is_killed: bool = False
    """By us, as a successor: what it may have said before counts no more."""
    reads_again: bool = False
    """Of a successor: once it has taken over, it reads its configuration again, which may be older than the last SIGHUP."""
    wishes: list[tuple[str, list[int]]] = field(default_factory=list)
    """Of a successor: the sockets that shall be kept from when it takes over, by their names; without a descriptor, no longer."""


@dataclass(slots=True)
class _Kept:
    """A socket, by the name under which it was given to keep. Those of .socket units share a name."""

    name: str
    fd: int = field(repr=False)


class Launcher:
    """Runs one daemon at a time, besides those that drain. `command` is what is executed for each of them."""

    def __init__(self, program: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._program = program
        self._command = list(command)
        self._environ = {name: text for name, text in environ.items() if name not in _OURS}
        self._notifier = Notifier.from_environ({**environ, "WATCHDOG_USEC": ""})
        self._is_managed = "NOTIFY_SOCKET" in environ
        self._kept = _inherited(environ)
        self._selector = selectors.DefaultSelector()
        self._current: _Daemon | None = None
        self._successor: _Daemon | None = None
        self._draining: list[_Daemon] = []
        self._is_asked_again = False
        """For one more successor, while a process still takes the place of another."""
        self._is_stopping = False
        self._code: int | None = None

    def run(self) -> int:
        """Run until told to stop, or until the daemon ends by itself; the exit code. Blocks; call it from the main thread."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:  # a gateway of many doors has as many sockets kept
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        receive, send = socket.socketpair()
        with receive, send:
            for end in (receive, send):
                end.setblocking(False)
            for number in _SIGNALS:
                signal.signal(number, _note)
            signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
            self._selector.register(receive, selectors.EVENT_READ)
            self._current = self._start()
            _say_to(self._current, GO)
            while self._code is None:
                for key, _ in self._selector.select(self._patience_s()):
                    if key.fileobj is receive:
                        self._on_signals(receive.recv(4_096))
                    else:
                        self._hear(key.data)
                self._look_at_clock()
            signal.set_wakeup_fd(-1)
        return self._code

    def _start(self) -> _Daemon:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # none may be taken for ours on the way to the daemon's program
            try:
                pid = os.fork()
                if pid == 0:
                    self._become(theirs.fileno(), before)
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        daemon = _Daemon(pid, ours, time.monotonic())
        self._selector.register(ours, selectors.EVENT_READ, daemon)
        return daemon

    def _become(self, link_fd: int, mask: set[int | signal.Signals]) -> NoReturn:
        """In the child: the kept sockets from descriptor 3 on (sd_listen_fds(3)), our link behind them, then the daemon's program."""
        try:
            fds = [*(kept.fd for kept in self._kept), link_fd]
            # First out of the way: a descriptor may stand where another one has to go.
            above = [_moved(fd, FIRST_FD + len(fds)) for fd in fds]
            for number, fd in enumerate(above):
                os.dup2(fd, FIRST_FD + number, inheritable=True)
            environ = {**self._environ, LAUNCHER_FD: str(FIRST_FD + len(fds) - 1)}
            if self._kept:
                names = ":".join(kept.name for kept in self._kept)
                environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(self._kept)), "LISTEN_FDNAMES": names}
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execve(self._command[0], self._command, environ)  # noqa: S606 - our own program, with arguments of our own
        except OSError as exc:
            self._say(f"cannot run {self._command[0]}: {exc.strerror or exc}")
        finally:
            os._exit(1)

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            match number:
                case signal.SIGCHLD:
                    self._reap()
                case signal.SIGHUP:
                    self._tell(self._current, signal.SIGHUP)
                    if self._successor is not None:
                        self._successor.reads_again = True  # not now: before it listens to signals, this one would end it
                case signal.SIGUSR2:
                    self._succeed()
                case signal.SIGABRT:
                    self._tell(self._current, signal.SIGKILL)
                    self._code = 128 + signal.SIGABRT
                case _:
                    self._stop()

    def _stop(self) -> None:
        self._is_stopping = True
        self._kill_successor()
        if self._current is not None:
            if not self._is_managed:
                _say_to(self._current, END)
            self._let_go(self._current)
        self._end_if_done()

    def _succeed(self) -> None:
        if self._is_stopping:
            return
        # One at a time: who has not had its turn yet has nothing to let go of, and two would wait for the same word.
        self._is_asked_again = self._successor is not None or not all(daemon.has_let_go for daemon in self._draining)
        if not self._is_asked_again:
            self._say("starting a successor")
            try:
                self._successor = self._start()
            except OSError as exc:
                self._say(f"cannot start a successor: {exc.strerror}; nothing changes")

    def _succeed_again(self) -> None:
        if self._is_asked_again:
            self._succeed()

    def _hear(self, daemon: _Daemon) -> None:
        try:
            data, ancillary, _, _ = daemon.link.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        fds = [fd for level, kind, raw in ancillary if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) for fd in _fds(raw)]
        if not data:
            self._selector.unregister(daemon.link)
            daemon.link.close()
            return
        fields = dict(line.partition("=")[::2] for line in data.decode("utf-8", "replace").splitlines())
        if "FDSTORE" in fields or "FDSTOREREMOVE" in fields:
            self._on_wish(daemon, fields.get("FDNAME", ""), fds)
        elif daemon is self._successor and _PREPARED in fields:
            if not daemon.is_killed:
                self._promote()
        elif daemon is self._current:
            if "STOPPING" in fields:
                daemon.has_let_go = True
            if _PREPARED not in fields and ("STOPPING" not in fields or self._is_stopping):
                self._notifier.pass_on(data)
            self._end_if_done()
        elif "STOPPING" in fields and daemon in self._draining:
            self._has_let_go(daemon)

    def _on_wish(self, daemon: _Daemon, name: str, fds: list[int]) -> None:
        """To keep a socket, or with none not any more. A successor may still fail, and then nothing has changed; who drains has no say."""
        if daemon is self._successor:
            daemon.wishes.append((name, fds))
        elif daemon is self._current:
            self._keep(name, fds)
        else:
            _close_all(fds)

    def _keep(self, name: str, fds: list[int]) -> None:
        self._drop(name)
        for fd in fds[:1] if name and len(self._kept) < MAX_KEPT else []:
            self._kept.append(_Kept(name, fd))
            sock = socket.socket(fileno=fd)
            self._notifier.keep(name, sock)
            sock.detach()
            fds = fds[1:]
        _close_all(fds)

    def _drop(self, name: str) -> None:
        gone = [kept for kept in self._kept if kept.name == name]
        if gone:
            self._kept = [kept for kept in self._kept if kept.name != name]
            self._notifier.drop(name)
            for kept in gone:
                os.close(kept.fd)

    def _promote(self) -> None:
        old, self._current, self._successor = self._current, self._successor, None
        if self._current is not None:
            self._say(f"process {self._current.pid} has taken over")
            wishes, self._current.wishes = self._current.wishes, []
            for name, fds in wishes:
                self._keep(name, fds)
            if self._current.reads_again:
                self._tell(self._current, signal.SIGHUP)
        if old is not None:
            self._draining.append(old)
            self._let_go(old)

    def _has_let_go(self, daemon: _Daemon) -> None:
        """One that drains, or is gone: it is its successor's turn."""
        if not daemon.has_let_go:
            daemon.has_let_go = True
            if self._current is not None:
                _say_to(self._current, GO)
            self._succeed_again()

    def _let_go(self, daemon: _Daemon) -> None:
        if daemon.told_to_stop is None:
            daemon.told_to_stop = time.monotonic()
            self._tell(daemon, signal.SIGTERM)

    def _kill_successor(self) -> None:
        if self._successor is not None:
            self._successor.is_killed = True
            self._tell(self._successor, signal.SIGKILL)

    def _tell(self, daemon: _Daemon | None, number: int) -> None:
        if daemon is not None and daemon.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.pid, number)

    def _reap(self) -> None:
        for daemon in [*self._draining, self._successor, self._current]:
            if daemon is None or daemon.exit_code is not None:
                continue
            pid, status = os.waitpid(daemon.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                is_told = code == -signal.SIGTERM and daemon.told_to_stop is not None  # before it could listen to signals
                daemon.exit_code = 0 if is_told else code if code >= 0 else 128 - code
                if code < 0 and not is_told:
                    self._say(f"process {pid} was ended by signal {-code} ({signal.strsignal(-code)})")
                if daemon in self._draining:
                    self._has_let_go(daemon)
                if daemon is self._current and code < 0 and not is_told and time.monotonic() - daemon.started >= LIVED_S:
                    self._replace()
                if daemon is self._successor:
                    self._successor = None
                    for _, fds in daemon.wishes:
                        _close_all(fds)
                    if not self._is_stopping:
                        self._say(f"the successor ended with exit code {daemon.exit_code} before it was prepared; nothing changes")
                    self._succeed_again()
        self._draining = [daemon for daemon in self._draining if daemon.exit_code is None]
        self._end_if_done()

    def _replace(self) -> None:
        """The present daemon is gone without a word."""
        if self._is_stopping:
            return
        self._kill_successor()  # it waits for the word of one that cannot give it any more
        try:
            self._current = self._start()
        except OSError as exc:
            self._say(f"cannot start another in its place: {exc.strerror}")
            return
        self._say(f"process {self._current.pid} takes its place")
        if all(daemon.has_let_go for daemon in self._draining):
            _say_to(self._current, GO)

    def _end_if_done(self) -> None:
        daemon = self._current
        if daemon is None or self._code is not None:
            return
        if daemon.exit_code is not None:
            if not (self._is_stopping and self._draining and not self._is_managed):
                self._code = daemon.exit_code
        elif self._is_stopping and self._is_managed and daemon.has_let_go:
            self._code = 0  # it drains on; whoever manages us may start the next one

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        late = self._successor
        if late is not None and not late.is_killed and now - late.started > PREPARE_S:
            self._say(f"the successor was not prepared within {PREPARE_S:g} s")
            self._kill_successor()
        for daemon in (*self._draining, self._current):
            if daemon is not None and daemon.told_to_stop is not None and not daemon.has_let_go and now - daemon.told_to_stop > RELEASE_S:
                self._say(f"process {daemon.pid} does not let go, and is killed")
                daemon.told_to_stop = None
                self._tell(daemon, signal.SIGKILL)

    def _patience_s(self) -> float | None:
        """How long nothing need be looked at."""
        waits = self._successor is not None or any(
            daemon is not None and daemon.told_to_stop is not None and not daemon.has_let_go for daemon in (*self._draining, self._current)
        )
        return 0.5 if waits else None

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, a terminal that is gone: no reason to end
            os.write(2, f"{self._program}: launcher: {text}\n".encode(errors="replace"))


_OURS: Final = frozenset({"NOTIFY_SOCKET", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", LAUNCHER_FD})


def _say_to(daemon: _Daemon, word: bytes) -> None:
    with contextlib.suppress(OSError):
        daemon.link.send(word)


def _note(number: int, frame: object) -> None:
    """The wake-up descriptor tells of the signal; a handler there must be."""


def _inherited(environ: Mapping[str, str]) -> list[_Kept]:
    """What systemd hands over: sockets of .socket units, and what we gave it to keep before."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    kept = []
    for number in range(int(environ.get("LISTEN_FDS", "0"))):
        os.set_inheritable(FIRST_FD + number, False)
        kept.append(_Kept(names[number] if number < len(names) and names[number] else "unknown", FIRST_FD + number))
    return kept


def _moved(fd: int, lowest: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _fds(raw: bytes) -> tuple[int, ...]:
    count = len(raw) // _FD_BYTES
    return struct.unpack(f"{count}i", raw[: count * _FD_BYTES])
