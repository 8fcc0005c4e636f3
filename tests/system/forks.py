"""Our programs as processes of their own, without the second of processor time that imports take in each.

A template has imported what a program needs, and is otherwise idle: one thread, nothing open. Starting the program is a fork of it, which
goes on as `python -m PROGRAM ARGUMENTS` does behind its imports. Hundreds of daemons are started by the tests; what an interpreter does
before that is tested where it is the subject: command lines, service managers, launchers, sandboxes, activation, the demo.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

REDIS: Final = ("fxrelay.cluster.broker", "fxrelay.cluster.redis_bus", "fxrelay.cluster.redis_store")
PROGRAMS: Final[dict[str, tuple[str, ...]]] = {
    "fxgateway.cli": (
        *("fxgateway.app", "fxgateway.check", "fxgateway.setup", "fxgateway.workers.parent", "fxtunnel.kit.pages"),
        *("rich.box", "rich.console", "rich.table", "rich.text"),
    ),
    "fxrelay.cli": (
        *("fxrelay.app", "fxrelay.check", "fxrelay.cluster.reading", "fxrelay.cluster.transfer", "fxrelay.picking"),
        *("fxrelay.cluster_cli", "fxrelay.ticket_cli", "fxrelay.reserving.reading", "fxtunnel.kit.pages", *REDIS),
        *("rich.box", "rich.console", "rich.table", "rich.text"),
    ),
    "tests.reservations.reservation_worker": (*REDIS, "fxrelay.reserving.reservations"),
}
"""What each template imports: all but the program's own module, which a start runs anew."""
REQUEST_BYTES: Final = 1 << 18
_CODE: Final = struct.Struct("!i")


class Fork:
    """A started program: as much of `subprocess.Popen` as our tests use. Its standard output is `stdout`, if that was to be a pipe."""

    def __init__(self, pid: int, code_fd: int, stdout: IO[str] | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._code_fd = code_fd

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Until it ends; the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """To it alone; nothing if it has ended."""
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                self.wait(10)  # it has ended, and the template is about to say so

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._code_fd, select.POLLIN)
            if poller.poll(None if timeout_s is None else timeout_s * 1000):
                told = os.read(self._code_fd, _CODE.size)
                os.close(self._code_fd)
                assert told, "the template has died"
                self.returncode = _CODE.unpack(told)[0]
        return self.returncode


class Template:
    """The process that has imported a program. Any thread may start forks of it."""

    def __init__(self, program: str) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.system.forks", program, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
        atexit.register(self.close)

    def start(self, arguments: Sequence[str], environ: Mapping[str, str], stdout: int, stderr: int) -> tuple[int, int]:
        """A fork with these arguments, environment and descriptors, in our directory; its pid, and where its exit code will come."""
        request = json.dumps({"arguments": [*arguments], "environ": {**environ}, "directory": os.getcwd()}).encode()
        assert len(request) < REQUEST_BYTES
        code_fd, theirs = os.pipe()
        with self._lock:
            socket.send_fds(self._socket, [request], [stdout, stderr, theirs])
            os.close(theirs)
            answer = self._socket.recv(_CODE.size)
        assert answer, "the template has died"
        return _CODE.unpack(answer)[0], code_fd

    def close(self) -> None:
        """End the template; forks go on."""
        self._socket.close()
        self._process.wait()


_templates: dict[str, Template] = {}
_templates_lock: Final = threading.Lock()


def _template(program: str) -> Template:
    with _templates_lock:
        if program not in _templates:
            _templates[program] = Template(program)
        return _templates[program]


def suits(arguments: Sequence[str], environ: Mapping[str, str] | None) -> bool:
    """Whether a fork does the same as an interpreter with these arguments, and these additions to our environment."""
    return arguments[0] in PROGRAMS and arguments[1] != "launch" and not any(name.startswith(("PYTHON", "LD_")) for name in environ or ())


def start(arguments: Sequence[str], environ: Mapping[str, str], stderr: int, stdout: int | None = None) -> Fork:
    """Run one of PROGRAMS with arguments, in a session of its own. Without `stdout` its output is a pipe."""
    program, *rest = arguments
    if stdout is not None:
        return Fork(*_template(program).start(rest, environ, stdout, stderr), None)
    ours, theirs = os.pipe()
    try:
        pid, code_fd = _template(program).start(rest, environ, theirs, stderr)
    finally:
        os.close(theirs)
    return Fork(pid, code_fd, open(ours, encoding="utf-8"))


def run(arguments: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run one of PROGRAMS to its end, which must come in time; what it wrote is kept apart."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        fork = start(arguments, environ, stderr.fileno(), stdout.fileno())
        try:
            code = fork.wait(timeout_s)
        finally:
            fork.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess([*arguments], code, stdout.read(), stderr.read())


@dataclass(frozen=True, slots=True)
class _Order:
    arguments: list[str]
    environ: dict[str, str]
    directory: str


def _serve(asked: int) -> _Order | None:
    """The template's life; it ends with None when nobody is left to ask. In each fork it ends with what was asked for."""
    told: dict[int, tuple[int, int]] = {}
    poller = select.poll()
    poller.register(asked, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready in told:
                poller.unregister(ready)
                pid, code_fd = told.pop(ready)
                os.write(code_fd, _CODE.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(code_fd)
                os.close(ready)
                continue
            link = socket.socket(fileno=asked)
            request, fds, _, _ = socket.recv_fds(link, REQUEST_BYTES, 3)
            if not request:
                return None
            assert threading.active_count() == 1
            pid = os.fork()
            if pid == 0:
                link.detach()
                _become(fds[0], fds[1])
                return _Order(**json.loads(request))
            link.send(_CODE.pack(pid))
            link.detach()
            os.close(fds[0])
            os.close(fds[1])
            watched = os.pidfd_open(pid)
            told[watched] = pid, fds[2]
            poller.register(watched, select.POLLIN)


def _become(stdout: int, stderr: int) -> None:
    """A session of its own, and nothing of the template's or of other forks left open."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _main(program: str, asked: int) -> None:
    for name in PROGRAMS[program]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # at its end a fork would look at everything there is, and thereby copy all the memory that it shares
    order = _serve(asked)
    if order is None:
        return
    os.chdir(order.directory)
    os.environ.clear()
    os.environ.update(order.environ)
    time.tzset()
    sys.argv[1:] = order.arguments
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
