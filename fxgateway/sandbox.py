"""Task: gives up what a running gateway does not need of its machine, so that an intruder can neither open files nor connect anywhere."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import fxgateway
import fxtunnel
from fxgateway.settings import GatewaySettings, SandboxMode
from fxtunnel.errors import ConfigError
from fxtunnel.kit.landlock import CHANGE, READ, Access, Grant, InForce, Unavailable, restrict
from fxtunnel.kit.seccomp import give_up_connections
from fxtunnel.kit.settings import Address

logger = logging.getLogger(__name__)

_LIBRARIES: Final = ("/usr", "/lib", "/lib64")
_SOCKETS: Final = Access.MAKE_SOCK | Access.REMOVE_FILE
_APPEND: Final = Access.WRITE_FILE | Access.MAKE_REG


class Sandbox:
    """The files that stay within reach. `enter` it before there is a second thread; `check` every configuration that is read later."""

    def __init__(self, settings: GatewaySettings, config_path: Path) -> None:
        self._settings = settings
        self._grants = [*_of_python(), *_of_configuration(settings, config_path)]
        self._pinned: int | None = None
        self.in_force: InForce | None = None

    def enter(self, environ_notify: str) -> None:
        """Give up what is not granted, as far as `[sandbox] mode` and the kernel say; log what holds. `environ_notify` is NOTIFY_SOCKET.

        Raises:
            ConfigError: the mode is "required", and the kernel cannot do it.
        """
        self._enter(environ_notify, Access(0))

    def enter_above_workers(self, environ_notify: str) -> None:
        """As `enter`, for a process that hears nobody from outside, and starts those that do: it still reads files and runs programs.

        What it starts has given up the same, and enters its own sandbox within that. Limits to reading would hold for interpreters that are
        started weeks later, which read whatever the loader, OpenSSL and the environment name.

        Raises:
            ConfigError: see `enter`.
        """
        self._enter(environ_notify, READ | Access.EXECUTE)

    def _enter(self, environ_notify: str, kept: Access) -> None:
        if self._settings.sandbox.mode is SandboxMode.OFF:
            logger.info("sandbox: off, as configured")
            return
        # The directory is kept open: the kernel may otherwise drop what the rule is bound to, and make it anew when it is asked for.
        self._pinned = os.open(f"/proc/{os.getpid()}", os.O_PATH | os.O_CLOEXEC)
        itself = [Grant(Path(f"/proc/{os.getpid()}"), READ), Grant(Path("/proc/stat"), READ)]
        try:
            # A service manager may listen on an abstract socket.
            self.in_force = restrict([*self._grants, *itself], kept=kept, scopes=not environ_notify.startswith("@"))
        except Unavailable as exc:
            self._do_without("files and programs", exc)
        else:
            logger.info("sandbox: in force (Landlock ABI %d), given up until the end: %s", self.in_force.abi, self.in_force)
        try:
            give_up_connections()
        except Unavailable as exc:
            self._do_without("ways to connect", exc)
        else:
            logger.info("sandbox: in force (seccomp), given up until the end: connections to anywhere, UDP")

    def _do_without(self, what: str, exc: Unavailable) -> None:
        if self._settings.sandbox.mode is SandboxMode.REQUIRED:
            raise ConfigError.one("sandbox", "sandbox.mode", str(exc.strerror)) from exc
        logger.warning("sandbox: none for %s: %s", what, exc.strerror)

    def check(self, fresh: GatewaySettings) -> None:
        """Whether what a configuration names can be opened from in here.

        Raises:
            ConfigError: not without a restart; holds every such path.
        """
        if self.in_force is None:
            return
        allowed = [grant.path for grant in self._grants if grant.access & Access.READ_FILE]
        problems = [path for path in _read(fresh) if not any(path.is_relative_to(beneath) for beneath in allowed)]
        if problems:
            paths = ", ".join(map(str, problems))
            raise ConfigError.one("sandbox", "sandbox.read", f"out of reach since the start: {paths}; add its directory, and restart")


def _of_python() -> Iterator[Grant]:
    """What an interpreter that runs may still load: modules, and libraries of theirs."""
    packages = [Path(str(package.__file__)).parent for package in (fxgateway, fxtunnel)]
    for path in {*map(Path, (sys.prefix, sys.base_prefix, *_LIBRARIES)), *packages}:
        yield Grant(path.resolve(), READ)
    yield Grant(Path(os.devnull), Access.READ_FILE | Access.WRITE_FILE)
    yield Grant(Path("/dev/urandom"), Access.READ_FILE)


def _of_configuration(settings: GatewaySettings, config_path: Path) -> Iterator[Grant]:
    """Directories, not files: whoever renews a certificate or edits a configuration replaces the file."""
    for path in (config_path.absolute(), *_read(settings)):
        yield Grant(path.parent, READ)
        yield Grant(path.resolve().parent, READ)  # where a symbolic link leads
    for extra in settings.sandbox.read:
        yield Grant(extra, READ)
    yield Grant(settings.tunnel.state_dir, CHANGE)
    if settings.log.access not in ("off", "stderr"):
        yield Grant(Path(settings.log.access).absolute().parent, _APPEND)
    for socket_path in _sockets(address for _, address in settings.listens()):
        yield Grant(socket_path.parent, _SOCKETS)


def _read(settings: GatewaySettings) -> list[Path]:
    """Every file that a reload reads."""
    tunnel = settings.tunnel
    pairs = [pair for door in settings.doors for pair in settings.certificates_of(door)]
    pairs += [(entry.certificate, entry.key) for entry in settings.certificates]
    return list(dict.fromkeys(path.absolute() for path in (tunnel.certificate, tunnel.key, *(path for pair in pairs for path in pair))))


def _sockets(addresses: Iterable[Address]) -> Iterator[Path]:
    return (Path(address.path).absolute() for address in addresses if address.path is not None)
