"""The launcher with daemons of a few lines, which note what happens to them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fxtunnel.kit.listeners import Inherited, kept_name, listen
from fxtunnel.kit.notify import END, GO, PREPARED, Notifier
from fxtunnel.kit.process import follow_launcher
from fxtunnel.kit.settings import Address
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0
# Notes "started", "go", "term" and "end" with its number; what it does beside that depends on which files lie around.
DAEMON = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fxtunnel.kit.listeners import Inherited, listen
from fxtunnel.kit.notify import Notifier
from fxtunnel.kit.settings import Address
home, number = Path(sys.argv[2]), len(list(Path(sys.argv[2]).glob("started-*")))
note = lambda what: (home / f"{what}-{number}").write_text(str(os.getpid()))
notifier = Notifier.from_environ(os.environ)
if (home / "bad").exists():
    note("failed")
    sys.exit(7)
terminated = []
signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
signal.signal(signal.SIGHUP, lambda *_: note("reloaded"))
inherited = Inherited.from_environ(os.environ, os.getpid(), notifier)
sock = listen(Address.parse("127.0.0.1:" + (home / "port").read_text()), inherited)
inherited.close()
note("started")
notifier.launcher.setblocking(True)
notifier.prepared()
if notifier.launcher.recv(2) == b"GO":
    note("go")
notifier.ready()
while not terminated and not (home / "crash").exists():
    time.sleep(0.01)
if not terminated:
    sys.exit(9)
note("term")
sock.close()
if not (home / "stuck").exists():
    notifier.stopping()
while not (home / f"finish-{number}").exists():
    time.sleep(0.01)
note("end")
"""
RUN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from fxtunnel.kit import launcher
launcher.RELEASE_S = 1.0
sys.exit(launcher.Launcher("test", [sys.executable, "-c", sys.argv[2], sys.argv[1], sys.argv[3]], os.environ).run())
"""


class Launched:
    """A launcher, and what its daemons have noted."""

    def __init__(self, home: Path, *, managed: bool) -> None:
        self.home = home
        self.port = free_port()
        (home / "port").write_text(str(self.port))
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(home / "n"))
        self.manager.settimeout(DEADLINE_S)
        env = {**os.environ, **({"NOTIFY_SOCKET": str(home / "n")} if managed else {})}
        self.stderr = (home / "stderr").open("wb")
        self.process = subprocess.Popen([sys.executable, "-c", RUN, str(ROOT), DAEMON, str(home)], env=env, stderr=self.stderr)

    def noted(self, what: str) -> int:
        """Waits for a note; the pid of the daemon that wrote it."""
        self.until(lambda: (self.home / what).exists() and bool((self.home / what).read_text()), what)
        return int((self.home / what).read_text())

    def has(self, what: str) -> bool:
        return (self.home / what).exists()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, (
                self.home / "stderr"
            ).read_text() + f"no {what}: {sorted(path.name for path in self.home.iterdir())}"
            time.sleep(0.01)

    def touch(self, what: str) -> None:
        (self.home / what).touch()

    def is_heard(self) -> bool:
        """Whether somebody listens on the port."""
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.manager.close()
        self.stderr.close()
        for number in range(8):
            self.touch(f"finish-{number}")
            for what in ("started", "failed"):
                if self.has(f"{what}-{number}") and (pid := (self.home / f"{what}-{number}").read_text()):
                    _kill(int(pid), str(self.home))


def _kill(pid: int, home: str) -> None:
    """End a daemon of this test, if that number is still its own."""
    try:
        if home.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(*, managed: bool) -> Launched:
        launched.append(Launched(tmp_path, managed=managed))
        return launched[-1]

    yield start
    for one in launched:
        one.close()


def test_a_successor_takes_over_and_the_old_one_finishes(launch: Callable[..., Launched]) -> None:
    it = launch(managed=False)
    old = it.noted("go-0")
    it.touch("bad")
    it.process.send_signal(signal.SIGUSR2)
    it.noted("failed-1")
    (it.home / "bad").unlink()
    it.until(lambda: b"before it was prepared" in (it.home / "stderr").read_bytes(), "word of the failure")
    assert not it.has("term-0")
    it.process.send_signal(signal.SIGUSR2)
    assert it.noted("go-1") != old
    assert it.has("term-0")
    assert it.is_heard()
    it.process.send_signal(signal.SIGHUP)
    it.noted("reloaded-1")
    assert not it.has("reloaded-0")
    assert it.process.poll() is None
    it.process.send_signal(signal.SIGTERM)
    it.noted("term-1")
    it.touch("finish-1")
    it.noted("end-1")
    assert it.process.poll() is None, "one of them still drains"
    it.touch("finish-0")
    assert it.process.wait(DEADLINE_S) == 0


def test_below_a_manager_the_launcher_does_not_wait_for_the_drain(launch: Callable[..., Launched]) -> None:
    it = launch(managed=True)
    it.noted("go-0")
    said = [it.manager.recvmsg(4096, socket.CMSG_SPACE(4)) for _ in range(2)]
    assert said[0][0] == f"FDSTORE=1\nFDNAME={kept_name(f'127.0.0.1:{it.port}')}".encode()
    assert len(said[0][1]) == 1
    (kept,) = memoryview(said[0][1][0][2]).cast("i")
    assert said[1][0] == b"READY=1"
    it.process.send_signal(signal.SIGTERM)
    assert it.process.wait(DEADLINE_S) == 0
    assert it.manager.recv(4096) == b"STOPPING=1"
    assert not it.has("end-0")
    assert it.is_heard(), "clients wait in the queue that the manager keeps"
    os.close(kept)
    assert not it.is_heard()
    it.touch("finish-0")
    it.noted("end-0")


def test_a_daemon_that_does_not_let_go_is_killed(launch: Callable[..., Launched]) -> None:
    it = launch(managed=True)
    it.touch("stuck")
    it.noted("go-0")
    it.process.send_signal(signal.SIGTERM)
    assert it.process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert b"does not let go" in (it.home / "stderr").read_bytes()


def test_a_daemon_that_ends_by_itself_ends_the_launcher(launch: Callable[..., Launched]) -> None:
    it = launch(managed=True)
    it.noted("go-0")
    it.touch("crash")
    assert it.process.wait(DEADLINE_S) == 9


def test_the_watchdog_kills_the_daemon(launch: Callable[..., Launched]) -> None:
    it = launch(managed=True)
    pid = it.noted("go-0")
    it.process.send_signal(signal.SIGABRT)
    assert it.process.wait(DEADLINE_S) == 128 + signal.SIGABRT
    it.until(lambda: not Path(f"/proc/{pid}").exists() or b"Z" in Path(f"/proc/{pid}/stat").read_bytes(), "end of the daemon")


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, Notifier]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    notifier = Notifier(launcher=theirs)
    yield ours, notifier
    ours.close()
    notifier.close()


async def test_a_daemon_waits_for_its_turn_and_goes_with_its_launcher(link: tuple[socket.socket, Notifier]) -> None:
    ours, notifier = link
    stop = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                await nursery.start(follow_launcher, notifier, stop.set)
                begun.set()

            begun = trio.Event()
            nursery.start_soon(follow)
            await wait_all_tasks_blocked()
            assert ours.recv(100) == PREPARED.encode()
            assert not begun.is_set()
            ours.send(GO)
            await begun.wait()
            assert not stop.is_set()
            ours.close()
            await stop.wait()


async def test_the_last_daemon_hears_that_nobody_follows(link: tuple[socket.socket, Notifier]) -> None:
    ours, notifier = link
    inherited, stop = Inherited({}, notifier), trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            ours.send(GO)
            await nursery.start(follow_launcher, notifier, stop.set)
            assert inherited.is_handed_on
            ours.send(END)
            # SIGTERM may have been heard before: whoever asks now gets the answer.
            assert not inherited.is_handed_on
            ours.close()
            await stop.wait()
            assert not inherited.is_handed_on


async def test_a_launcher_that_is_gone_before_our_turn_ends_us(link: tuple[socket.socket, Notifier]) -> None:
    ours, notifier = link
    stop = trio.Event()
    ours.close()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(follow_launcher, notifier, stop.set)
            await stop.wait()


def test_what_is_bound_is_kept_until_it_is_forgotten(link: tuple[socket.socket, Notifier], tmp_path: Path) -> None:
    ours, notifier = link
    inherited = Inherited({}, notifier)
    with listen(Address(path=tmp_path / "s"), inherited):
        name = kept_name(f"unix:{tmp_path / 's'}")
        data, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(4))
        assert data == f"FDSTORE=1\nFDNAME={name}".encode()
        os.close(memoryview(ancillary[0][2]).cast("i")[0])
        inherited.forget("unix:/elsewhere")
        inherited.forget(f"unix:{tmp_path / 's'}")
        assert ours.recv(4096) == f"FDSTOREREMOVE=1\nFDNAME={name}".encode()
