"""Task: listening sockets: bound here, or handed over by systemd or the process before us (sd_listen_fds(3)).

It is how an unprivileged daemon gets a low port, and how a new process goes on with the queues of the old one.
"""

import errno
import hashlib
import os
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fxtunnel.errors import FxError
from fxtunnel.kit.notify import Notifier
from fxtunnel.kit.settings import Address
from fxtunnel.kit.unpaced import is_loopback, unpace

BACKLOG: Final = 4_096
FIRST_INHERITED_FD: Final = 3
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of `accept` that concern this host. All others concern only the connection that was about to be accepted (accept(2))."""
LINE_NAME: Final = "fx-process-"
"""Prefix of the name under which a process's line is kept for its successors: the name of the process follows."""
SocketOption = tuple[int, int, int | bytes]


class ListenError(FxError):
    """An address cannot be listened on. `str()` says which, why, and what to do."""


class Inherited:
    """Sockets that were open when the process started, by address, and those that shall outlive it.

    Each is handed out once; `close` closes what nobody wanted. With a notifier, what `listen` binds is kept by whoever started us, until
    `forget`, and handed to our successor. Sockets of a systemd .socket unit are kept by that unit, and left to it.
    Besides there may be lines to processes that came before, by their names.
    """

    def __init__(
        self,
        sockets: Mapping[str, socket.socket],
        notifier: Notifier | None = None,
        kept: Iterable[str] = (),
        lines: Mapping[str, socket.socket] | None = None,
    ) -> None:
        self._sockets = dict(sockets)
        self._notifier = notifier
        self._kept = set(kept)
        self._came = set(self._kept)
        """What was kept for us: it stays so, whatever becomes of us."""
        self._lines = dict(lines or {})

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], pid: int, notifier: Notifier | None = None) -> "Inherited":
        """What LISTEN_PID and LISTEN_FDS announce for this process; nothing otherwise."""
        if environ.get("LISTEN_PID") != str(pid):
            return cls({}, notifier)
        count = int(environ.get("LISTEN_FDS", "0"))
        names = environ.get("LISTEN_FDNAMES", "").split(":")
        found: dict[str, socket.socket] = {}
        lines: dict[str, socket.socket] = {}
        kept = set()
        for number, fd in enumerate(range(FIRST_INHERITED_FD, FIRST_INHERITED_FD + count)):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.set_inheritable(fd, False)
                sock = socket.socket(fileno=fd)
                sock.setblocking(False)
                if number < len(names) and names[number].startswith(LINE_NAME):
                    lines[names[number].removeprefix(LINE_NAME)] = sock
                    continue
                address = str(bound_address(sock))
                if number < len(names) and names[number] == kept_name(address):
                    kept.add(address)
                if address in found:  # of a .socket unit and kept as well: two descriptors of one queue
                    sock.close()
                else:
                    found[address] = sock
        return cls(found, notifier, kept, lines)

    @property
    def is_handed_on(self) -> bool:
        """Whether a successor takes these sockets over while this process drains: there is a launcher, and it has not said otherwise."""
        if self._notifier is None or self._notifier.launcher is None:
            return False
        self._notifier.hear()
        return not self._notifier.is_last

    def take(self, address: Address) -> socket.socket | None:
        """The socket that listens on `address`, if one was handed over."""
        return self._sockets.pop(str(address), None)

    def keep(self, sock: socket.socket) -> None:
        """Have a socket that was bound here kept for our successor."""
        if self._notifier is not None:
            address = str(bound_address(sock))
            self._kept.add(address)
            self._notifier.keep(kept_name(address), sock)

    def forget(self, address: str) -> None:
        """Do not have the socket of this address kept any longer."""
        if self._notifier is not None and address in self._kept:
            self._kept.discard(address)
            self._came.discard(address)
            self._notifier.drop(kept_name(address))

    def undo(self, sock: socket.socket) -> None:
        """Close what `listen` has given, as another address failed: nobody shall listen there after us, unless it was kept for us."""
        address = str(bound_address(sock))
        if address not in self._came:
            self.forget(address)
        sock.close()

    def take_lines(self) -> dict[str, socket.socket]:
        """The lines to earlier processes, by their names. The caller owns them now; another call returns none."""
        lines, self._lines = self._lines, {}
        return lines

    @property
    def keeps_lines(self) -> bool:
        """Whether somebody keeps sockets for this process, to give them to its successors."""
        return self._notifier is not None and self._notifier.launcher is not None

    def keep_line(self, process: str, sock: socket.socket) -> None:
        """Have a line to this process kept for its successors."""
        if self._notifier is not None:
            self._notifier.keep(f"{LINE_NAME}{process}", sock)

    def forget_line(self, process: str) -> None:
        """That process has ended: do not have its line kept any longer."""
        if self._notifier is not None:
            self._notifier.drop(f"{LINE_NAME}{process}")

    def close(self) -> None:
        """Close the inherited sockets that nobody has taken."""
        for process, line in self.take_lines().items():
            self.forget_line(process)
            line.close()
        for address, sock in self._sockets.items():
            self.forget(address)
            sock.close()
        self._sockets.clear()


def kept_name(address: str) -> str:
    """What a kept socket is called: colons and most else are not allowed (FDNAME in sd_notify(3)), and at most 255 bytes."""
    return f"fx-{hashlib.sha256(address.encode()).hexdigest()[:24]}"


def bound_address(sock: socket.socket) -> Address:
    """Where a socket listens; for port 0, the port the kernel chose."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Address.parse(f"unix:{name}")
    host, port = name[0], name[1]
    return Address.parse(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def listen(address: Address, inherited: Inherited | None = None, options: Sequence[SocketOption] = ()) -> socket.socket:
    """A non-blocking listening socket on `address`: handed over, or bound now and kept for our successor. The caller owns it.

    `options` are for TCP; they are set before the first connection can arrive, so that every accepted socket has them.

    Raises:
        ListenError: in use, not permitted, or not an address of this machine.
    """
    given = inherited.take(address) if inherited is not None else None
    if given is not None:
        if given.family != socket.AF_UNIX:
            _set(given, options)
        return given
    try:
        if address.path is not None:
            return _kept(_listen_unix(Path(address.path)), inherited)
        family = socket.AF_INET6 if ":" in str(address.host) else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address.host == "::" else 1)
            _set(sock, options)
            if is_loopback(str(address.host)):
                unpace(sock)
            sock.bind((address.host, address.port))
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise ListenError(_explain(address, exc)) from exc
    return _kept(sock, inherited)


def _kept(sock: socket.socket, inherited: Inherited | None) -> socket.socket:
    if inherited is not None:
        inherited.keep(sock)
    return sock


def _set(sock: socket.socket, options: Sequence[SocketOption]) -> None:
    for level, option, value in options:
        sock.setsockopt(level, option, value)


def _listen_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            if _is_held(path):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()  # left behind by a process that is gone
        sock.bind(str(path))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_held(path: Path) -> bool:
    """Whether a process listens at `path`. Probed with a datagram, which a stream socket refuses: in a sandbox connect() is forbidden."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.sendto(b"", socket.MSG_DONTWAIT, str(path))
        except OSError as exc:
            return exc.errno != errno.ECONNREFUSED
    return True


def _explain(address: Address, exc: OSError) -> str:
    match exc.errno:
        case errno.EADDRINUSE if address.path is not None:
            return f"cannot listen on {address}: it is in use; stop the other process (ss -lxp shows it)"
        case errno.EADDRINUSE:
            return f"cannot listen on {address}: it is in use; stop the other process (ss -ltnp shows it) or choose another port"
        case errno.EACCES:
            return f"cannot listen on {address}: not permitted; use a port above 1023, or the .socket unit in deploy/systemd for low ports"
        case errno.EADDRNOTAVAIL:
            return f"cannot listen on {address}: this machine has no such address"
        case _:
            return f"cannot listen on {address}: {exc.strerror or exc}"
