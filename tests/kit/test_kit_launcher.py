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

from fxtunnel.kit.listeners import kept_name
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0
# Notes "started", "go", "term" and "end" with its number; what it does beside that depends on which files lie around.
DAEMON = """
import os, resource, signal, sys, time
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
FEW_FILES = 40
sock = listen(Address.parse("127.0.0.1:" + (home / "port").read_text()), inherited)
if (home / "many").exists():
    resource.setrlimit(resource.RLIMIT_NOFILE, (1_000, 1_000))
    many = [listen(Address(path=home / f"s{n}"), inherited) for n in range(FEW_FILES)]
if (home / "fails-late").exists():
    inherited.forget("127.0.0.1:" + (home / "port").read_text())
    listen(Address.parse("127.0.0.1:" + (home / "port-2").read_text()), inherited)
    note("failed")
    sys.exit(7)
inherited.close()
note("started")
while (home / "slow").exists() and number:
    time.sleep(0.01)
notifier.launcher.setblocking(True)
notifier.prepared()
if notifier.launcher.recv(2) == b"GO":
    note("go")
notifier.ready()
notifier.launcher.setblocking(False)
while not terminated and not (home / "crash").exists():
    time.sleep(0.01)
    if notifier.hear() == b"GO":
        note("told-again")
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
import os, resource, signal, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 1_000))
sys.path.insert(0, sys.argv[1])
from fxtunnel.kit import launcher
launcher.RELEASE_S = 1.0
launcher.LIVED_S = float(sys.argv[4])
if os.path.exists(sys.argv[3] + "/kills-late"):
    kill = os.kill
    os.kill = lambda pid, number: threading.Timer((number == signal.SIGKILL) * 0.5, kill, (pid, number)).start()
sys.exit(launcher.Launcher("test", [sys.executable, "-c", sys.argv[2], sys.argv[1], sys.argv[3]], os.environ).run())
"""


class Launched:
    """A launcher, and what its daemons have noted."""

    def __init__(self, home: Path, *, managed: bool, lived_s: float, stderr: str = "stderr") -> None:
        self.home = home
        self.port = free_port()
        (home / "port").write_text(str(self.port))
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(home / "n"))
        self.manager.settimeout(DEADLINE_S)
        env = {**os.environ, **({"NOTIFY_SOCKET": str(home / "n")} if managed else {})}
        self.stderr = (home / stderr).open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(ROOT), DAEMON, str(home), str(lived_s)], env=env, stderr=self.stderr
        )

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

    def lives(self, note: str) -> bool:
        """Whether the daemon that wrote this note runs."""
        try:
            return b" Z " not in Path(f"/proc/{self.noted(note)}/stat").read_bytes()
        except FileNotFoundError:
            return False

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

    def start(*, managed: bool, lived_s: float = 60.0, stderr: str = "stderr") -> Launched:
        launched.append(Launched(tmp_path, managed=managed, lived_s=lived_s, stderr=stderr))
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


def test_a_launcher_that_cannot_write_what_it_does_does_it_all_the_same(launch: Callable[..., Launched]) -> None:
    it = launch(managed=False, stderr="/dev/full")
    it.noted("go-0")
    it.process.send_signal(signal.SIGUSR2)
    it.noted("go-1")
    it.touch("finish-0")
    it.noted("end-0")
    it.process.send_signal(signal.SIGTERM)
    it.touch("finish-1")
    assert it.process.wait(DEADLINE_S) == 0


def test_a_successor_that_fails_late_changes_nothing(launch: Callable[..., Launched]) -> None:
    it = launch(managed=True)
    it.noted("go-0")
    second = free_port()
    (it.home / "port-2").write_text(str(second))
    it.touch("fails-late")
    it.process.send_signal(signal.SIGUSR2)
    it.noted("failed-1")
    it.until(lambda: b"before it was prepared" in (it.home / "stderr").read_bytes(), "word of the failure")
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", second)) != 0, "nobody would ever serve who waits there"
    (it.home / "fails-late").unlink()
    it.process.send_signal(signal.SIGUSR2)
    it.noted("go-1")
    assert it.is_heard()
    heard = [it.manager.recv(4096) for _ in range(3)]
    assert [data.partition(b"\n")[0] for data in heard] == [b"FDSTORE=1", b"READY=1", b"READY=1"]


def test_a_successor_that_is_asked_for_in_the_middle_of_a_hand_over_comes_after_it(launch: Callable[..., Launched]) -> None:
    it = launch(managed=False)
    it.touch("stuck")
    it.noted("go-0")
    it.process.send_signal(signal.SIGUSR2)
    it.until(lambda: (it.home / "stderr").read_bytes().count(b"has taken over") == 1, "the first successor")
    it.process.send_signal(signal.SIGUSR2)
    it.noted("go-2")
    it.until(lambda: (it.home / "stderr").read_bytes().count(b"does not let go") == 2, "the end of both before it")
    it.until(lambda: not it.lives("started-1"), "the end of the first successor")
    it.process.send_signal(signal.SIGHUP)
    it.noted("reloaded-2")
    assert not it.has("told-again-2"), "a second word is none for the same process"


def test_a_reload_while_a_successor_prepares_reaches_it_as_well(launch: Callable[..., Launched]) -> None:
    it = launch(managed=False)
    it.noted("go-0")
    it.touch("slow")
    it.process.send_signal(signal.SIGUSR2)
    it.noted("started-1")  # it has read its files by now
    it.process.send_signal(signal.SIGHUP)
    it.noted("reloaded-0")
    assert not it.has("reloaded-1")
    (it.home / "slow").unlink()
    it.noted("reloaded-1")
    it.noted("go-1")


def test_more_sockets_are_kept_than_a_process_may_have_by_default(launch: Callable[..., Launched]) -> None:
    it = launch(managed=False)
    it.noted("go-0")
    it.touch("many")
    for number in (1, 2):
        it.process.send_signal(signal.SIGUSR2)
        it.noted(f"go-{number}")
    assert it.process.poll() is None


def test_no_daemon_has_copies_of_what_is_kept(launch: Callable[..., Launched]) -> None:
    """It could not close them: who connects would wait in a queue that nobody serves."""
    it = launch(managed=False)
    it.noted("go-0")
    it.process.send_signal(signal.SIGUSR2)
    pid = it.noted("go-1")
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    sockets = [link for link in links if link.startswith("socket:")]
    assert len(sockets) >= 2
    assert len(sockets) == len(set(sockets))


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


def test_who_was_killed_from_outside_is_named(launch: Callable[..., Launched]) -> None:
    """By the kernel for want of memory, say: the daemon had no time for a last word."""
    it = launch(managed=True)
    pid = it.noted("go-0")
    os.kill(pid, signal.SIGKILL)
    assert it.process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert f"process {pid} was ended by signal 9 (" in (it.home / "stderr").read_text()


@pytest.mark.parametrize("managed", [True, False])
def test_who_was_killed_after_a_while_is_replaced_at_once(launch: Callable[..., Launched], managed: bool) -> None:
    it = launch(managed=managed, lived_s=0.0)
    os.kill(it.noted("go-0"), signal.SIGKILL)
    assert it.is_heard(), "clients wait in the queue meanwhile"
    os.kill(it.noted("go-1"), signal.SIGKILL)
    it.noted("go-2")
    assert it.process.poll() is None
    it.process.send_signal(signal.SIGTERM)
    it.touch("finish-2")
    assert it.process.wait(DEADLINE_S) == 0
    it.noted("end-2")


def test_who_is_killed_in_the_middle_of_a_hand_over_is_replaced_when_it_is_its_turn(launch: Callable[..., Launched]) -> None:
    it = launch(managed=False, lived_s=0.0)
    it.touch("stuck")
    it.noted("go-0")
    it.process.send_signal(signal.SIGUSR2)
    it.until(lambda: (it.home / "stderr").read_bytes().count(b"has taken over") == 1, "the first successor")
    assert not it.has("go-1"), "the one before it has not let go"
    os.kill(it.noted("started-1"), signal.SIGKILL)
    it.noted("go-2")
    assert not it.lives("started-0"), "it did not let go in time"


def test_a_successor_that_is_killed_is_not_promoted_by_what_it_has_said(launch: Callable[..., Launched], tmp_path: Path) -> None:
    (tmp_path / "kills-late").touch()
    (tmp_path / "slow").touch()
    it = launch(managed=False, lived_s=0.0)
    it.noted("go-0")
    it.process.send_signal(signal.SIGUSR2)
    it.noted("started-1")
    os.kill(it.noted("go-0"), signal.SIGKILL)
    it.until(lambda: b"takes its place" in (it.home / "stderr").read_bytes(), "the next one")
    (it.home / "slow").unlink()
    it.noted("go-2")
    it.until(lambda: not it.lives("started-1"), "end of the successor")
    assert it.lives("go-2")
    assert b"has taken over" not in (it.home / "stderr").read_bytes()
    assert it.is_heard()


def test_the_watchdog_kills_the_daemon(launch: Callable[..., Launched]) -> None:
    it = launch(managed=True)
    pid = it.noted("go-0")
    it.process.send_signal(signal.SIGABRT)
    assert it.process.wait(DEADLINE_S) == 128 + signal.SIGABRT
    it.until(lambda: not Path(f"/proc/{pid}").exists() or b"Z" in Path(f"/proc/{pid}/stat").read_bytes(), "end of the daemon")
