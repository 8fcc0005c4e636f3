"""System: restarts, reloads and upgrades of both daemons as a service manager does them: nobody is cut off, nobody is turned away."""

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest

from fxtunnel.kit.launcher import LIVED_S
from tests.system.peers import MIB, Service, dial, is_served, say, visit
from tests.system.stack import Daemon, Stack, slowness, wait_until
from tests.system.test_system_activation import Visitors
from tests.system.units import Unit

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("systemd")]

RESTARTS = int(os.environ.get("FX_UPGRADES", "5"))
FLOWS = 8
BACK_S = 5.0
"""See `slowness`."""
AWAY_S = 6.0
# On a busy machine a relay is long in coming, and a transfer lasts as long as all restarts together.
GATEWAY_LIMITS = "[limits]\ndrain_s = 600\nrelay_wait_s = 60\n"
RELAY_LIMITS = "[limits]\ndrain_s = 600\nhandover_s = 60\n"


class Managed:
    """A stack whose daemons are units."""

    def __init__(self, stack: Stack, services: dict[str, str], *, with_store: bool = True) -> None:
        self.stack = stack
        relay = stack.write_relay_config("node-a", services, RELAY_LIMITS)
        self.gateway = Unit(
            ["fxgateway.cli", "launch", "--config", str(stack.gateway_config)],
            stack.directory / "gateway.log",
            stack.directory,
            with_store=with_store,
        )
        self.relay = Unit(["fxrelay.cli", "launch", "--config", str(relay)], stack.directory / "node-a.log", stack.directory)

    def start(self) -> None:
        """Until a client would be served."""
        self.gateway.start()
        self.relay.start()
        self.stack.wait_for_relays("node-a")

    def close(self) -> None:
        self.relay.close()
        self.gateway.close()


@pytest.fixture
def managed(make_stack: Callable[..., Stack], echo_service: Service) -> Iterator[Managed]:
    managed = Managed(make_stack("echo", extra=GATEWAY_LIMITS), {"echo": echo_service.target})
    managed.start()
    yield managed
    managed.close()


class Flow:
    """A steady transfer through the echo, both ways at once, that lasts until `finish`."""

    def __init__(self, port: int, seed: int) -> None:
        self._sock = dial(port, 60)
        self._blocks = random.Random(seed)
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._stop = threading.Event()
        self.problem = ""
        self.sent_bytes = 0
        self.received_bytes = 0
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> str:
        """End it; empty if what came back is what was sent, else what went wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._sock.close()
        is_right = self._sent.digest() == self._received.digest()
        return self.problem or ("" if is_right else f"sent {self.sent_bytes} bytes, {self.received_bytes} came back")

    def _send(self) -> None:
        while not self._stop.is_set():
            block = self._blocks.randbytes(8_192)
            self._sent.update(block)
            self._sock.sendall(block)
            self.sent_bytes += len(block)
            time.sleep(0.02)
        self._sock.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while block := self._sock.recv(1 << 16):
            self._received.update(block)
            self.received_bytes += len(block)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as exc:
            self.problem = f"{type(exc).__name__} after {self.sent_bytes} bytes sent, {self.received_bytes} received"


def through(port: int, happening: Callable[[], None], times: int = RESTARTS) -> None:
    """Transfers and 50 visits a second while something happens several times; nothing may be lost or refused."""
    flows = [Flow(port, seed) for seed in range(FLOWS)]
    visitors = Visitors(port)
    began, each_s = time.monotonic(), []
    try:
        for _ in range(times):
            time.sleep(0.3)
            happens = time.monotonic()
            happening()
            each_s.append(time.monotonic() - happens)
        time.sleep(0.3)
        took_s = time.monotonic() - began
    finally:
        visitors.stop()
        problems = [problem for flow in flows if (problem := flow.finish())]
    figures = (
        f"{times} times in {took_s:.1f} s, at most {max(each_s):.1f} s each: {len(flows)} transfers of "
        f"{sum(flow.sent_bytes for flow in flows) / MIB:.1f} MiB in all, {len(problems)} lost {problems}; "
        f"visits {dict(visitors.ends)}, the longest {visitors.longest_s:.2f} s"
    )
    sys.stdout.write(f"\n{figures}\n")
    assert problems == [], figures
    assert set(visitors.ends) == {"served"}, figures
    assert visitors.ends["served"] > took_s * 10, figures


def test_restarts_of_the_gateway(managed: Managed) -> None:
    through(managed.stack.doors["echo"], managed.gateway.restart)
    wait_until(lambda: not managed.gateway.left_over(), 30, "the end of the old processes")


def test_restarts_of_the_relay(managed: Managed) -> None:
    through(managed.stack.doors["echo"], managed.relay.restart)
    wait_until(lambda: not managed.relay.left_over(), 30, "the end of the old processes")
    assert "fenced" not in managed.stack.logs()
    assert is_served(managed.stack.doors["echo"])


def test_ready_is_who_serves(managed: Managed) -> None:
    """Restarts that follow each other as soon as one is done: each process serves before the next one takes its place."""
    for unit in (managed.relay, managed.gateway, managed.relay):
        unit.restart()
        assert "READY=1" in unit.heard
        (relay,) = [relay for relay in managed.stack.live_relays().values() if relay["state"] == "up"]
        assert relay["links"]


def test_a_relay_whose_gateway_is_away_gets_ready(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    managed = Managed(make_stack("echo"), {"echo": echo_service.target}, with_store=False)
    try:
        managed.start()
        assert managed.gateway.stop() == 0
        managed.relay.restart()
        assert "READY=1" in managed.relay.heard
        assert "no control link" in managed.relay.log.read_text()
    finally:
        managed.close()


def test_without_kept_sockets_addresses_are_free_in_time_and_streams_go_on(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra=GATEWAY_LIMITS)
    managed = Managed(stack, {"echo": echo_service.target}, with_store=False)
    try:
        managed.start()
        flow, visitors = Flow(stack.doors["echo"], 1), Visitors(stack.doors["echo"])
        try:
            managed.gateway.restart()
            wait_until(lambda: is_served(stack.doors["echo"]), 15, "a new client served")
        finally:
            visitors.stop()
            problem = flow.finish()
        assert problem == ""
        # Nobody listened for a moment. Kept sockets are what saves these.
        assert visitors.ends["refused"] > 0
        assert set(visitors.ends) <= {"served", "refused", "reset"}, visitors.ends
        managed.gateway.daemon().kill()
        assert managed.gateway.main is not None
        managed.gateway.main.wait(30)
        time.sleep(AWAY_S)
        managed.gateway.start()
        ready = time.monotonic()
        stack.wait_for_relays("node-a", timeout_s=60)
        back_s = time.monotonic() - ready
        sys.stdout.write(f"\nafter {AWAY_S:g} s of absence the relay was back in {back_s:.2f} s\n")
        assert back_s < BACK_S * slowness()
    finally:
        managed.close()


def test_reloads_of_both(managed: Managed) -> None:
    through(managed.stack.doors["echo"], lambda: (managed.gateway.reload(), managed.relay.reload())[0], 3)


def test_a_daemon_that_is_killed_is_replaced_at_once(managed: Managed) -> None:
    """By its launcher, without the service manager, whose units wait between attempts."""
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > LIVED_S, 60, "daemons that have lived for a while")
    for unit in (managed.relay, managed.gateway):
        killed = unit.daemon()
        killed.kill()
        gone = time.monotonic()
        wait_until(lambda: is_served(managed.stack.doors["echo"]), 60, "a client served")
        back_s = time.monotonic() - gone
        sys.stdout.write(f"\n{unit.log.name}: served again after {back_s:.2f} s\n")
        assert back_s < BACK_S * slowness()
        assert unit.daemon() != killed


def test_a_gateway_that_is_killed_has_its_relays_back_at_once(managed: Managed) -> None:
    managed.gateway.listen()
    managed.gateway.daemon().kill()
    assert managed.gateway.main is not None
    assert managed.gateway.main.wait(30) == 128 + signal.SIGKILL
    managed.gateway.start()
    ready = time.monotonic()
    # It waits in the door's queue until the relay is back: nobody is turned away, even now.
    assert is_served(managed.stack.doors["echo"])
    managed.stack.wait_for_relays("node-a", timeout_s=60)
    back_s = time.monotonic() - ready
    sys.stdout.write(f"\nthe relay was back after {back_s:.2f} s\n")
    assert back_s < BACK_S * slowness()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_relay_that_makes_way_on_a_silent_path_keeps_its_streams(
    make_stack: Callable[..., Stack], echo_service: Service, workers: int
) -> None:
    """Its drain message is lost there, and so is its successor's, whose own successor vouches for both."""
    stack = make_stack("echo", extra=f"{GATEWAY_LIMITS}[resume]\nhold_s = 60\n")
    stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": str(workers)})
    config = stack.write_relay_config("node-a", {"echo": echo_service.target}, f"{RELAY_LIMITS}[resume]\nhold_s = 60\n")
    relay = Unit(["fxrelay.cli", "launch", "--config", str(config)], stack.directory / "node-a.log", stack.directory)
    clients: list[socket.socket] = []
    try:
        relay.start()
        stack.wait_for_relays("node-a")
        for _ in range(2):
            clients.append(dial(stack.doors["echo"], 60))
            say(clients[-1])
            stack.cutter.freeze()
            relay.restart()
            wait_until(lambda: is_served(stack.doors["echo"]), 30, "the successor")
        for client in clients:
            say(client, b"still here")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        wait_until(lambda: not relay.left_over(), 30, "the end of the old processes")  # sooner than handover_s
        assert "fenced" not in stack.logs()
    finally:
        for client in clients:
            client.close()
        relay.close()


def test_without_a_service_manager_a_signal_brings_in_a_successor(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra=GATEWAY_LIMITS)
    relay = stack.write_relay_config("node-a", {"echo": echo_service.target}, RELAY_LIMITS)
    commands = [["fxgateway.cli", "launch", "--config", str(stack.gateway_config)], ["fxrelay.cli", "launch", "--config", str(relay)]]
    launchers = []
    try:
        for command, name in zip(commands, ("gateway", "node-a"), strict=True):
            launchers.append(Daemon(command, stack.directory / f"{name}.log"))
            stack.daemons.append(launchers[-1])
            launchers[-1].wait_ready()
        stack.wait_for_relays("node-a")
        port = stack.doors["echo"]
        flows, visitors = [Flow(port, seed) for seed in range(2)], Visitors(port)
        try:
            for launcher in launchers:
                before = {child.pid for child in psutil.Process(launcher.pid).children()}
                launcher.signal(signal.SIGUSR2)
                wait_until(lambda: f"launcher: process {newest(launcher)} has taken over" in stack.logs(), 30, "a successor")  # noqa: B023 - over before the next one
                assert newest(launcher) not in before
                time.sleep(1)
            # One that cannot start changes nothing.
            stack.gateway_config.rename(stack.directory / "away")
            launchers[0].signal(signal.SIGUSR2)
            wait_until(lambda: "before it was prepared" in stack.logs(), 30, "a successor that fails")
        finally:
            visitors.stop()
            problems = [flow.finish() for flow in flows]
        assert problems == ["", ""]
        assert set(visitors.ends) == {"served"}, visitors.ends
        assert "fenced" not in stack.logs()
        for launcher in reversed(launchers):
            assert launcher.stop() == 0
    finally:
        for launcher in launchers:
            kill_below(launcher)


def newest(launcher: Daemon) -> int:
    """The pid of the daemon that it has started last."""
    return max(psutil.Process(launcher.pid).children(), key=lambda child: child.create_time()).pid


def test_planned_drains_show_what_is_left(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra=GATEWAY_LIMITS)
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    port = stack.doors["echo"]
    unknown = stack.gateway_cli("drain", "node-b", check=False)
    assert (unknown.returncode, "no relay node-b is here" in unknown.stderr) == (1, True)
    with dial(port) as kept:
        say(kept)
        watched = stack.gateway_cli("drain", "node-a", "--timeout", "0.2", check=False)
        assert (watched.returncode, watched.stdout.splitlines()[0].split(",")[0]) == (1, "streams of node-a left: 1")
        assert visit(port)[0] == "reset"
        say(kept)
        assert stack.live_relays()["node-a"]["state"] == "draining"
        stack.gateway_cli("drain", "node-a", "--undo")
        assert is_served(port)
        say(kept)
    watching = start_cli(["fxrelay.cli", "drain", "--config", str(stack.relay_config("node-a"))])
    assert watching.communicate(timeout=30)[0].splitlines()[-1].startswith("streams left: 0,")
    assert visit(port)[0] == "reset"
    assert "draining" in stack.relay_cli("node-a", "status").stdout.splitlines()[0]
    stack.relays["node-a"].stop()
    stack.start_relay("node-a")
    wait_until(lambda: is_served(port), 15, "service after a restart")
    with dial(port) as kept:
        say(kept)
        watching = start_cli(["fxgateway.cli", "drain", "--config", str(stack.gateway_config)])
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("clients left: 1,")
        with pytest.raises(ConnectionRefusedError):
            dial(port)
        say(kept)
        assert watching.poll() is None
        assert '"the gateway is draining"' in refused_page(stack)
        assert "not ready: the gateway is draining" in stack.gateway_cli("relays").stdout
        assert [(door["service"], door["connections"]) for door in stack.status()["doors"]] == [("echo", 1)]
        assert f', pid {stack.gateway.pid}"' in stack.logs()
    assert watching.communicate(timeout=30)[0].splitlines()[-1].startswith("clients left: 0,")
    assert watching.returncode == 0
    assert stack.gateway.stop() == 0


def test_a_drain_that_is_not_watched_to_its_end_is_not_said_to_be_done(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra=GATEWAY_LIMITS)
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as kept:
        say(kept)
        command = ["fxrelay.cli", "drain", "--config", str(stack.relay_config("node-a"))]
        watching = start_cli(command)
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("streams left: 1,")
        watching.send_signal(signal.SIGINT)
        assert "the drain goes on" in watching.communicate(timeout=30)[1]
        assert watching.returncode == 1
        watching = start_cli(command)
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("streams left: 1,")
        stack.relays["node-a"].kill()
        stack.start_relay("node-a")
        assert "restarted meanwhile" in watching.communicate(timeout=30)[1]
        assert watching.returncode == 1


def start_cli(arguments: list[str]) -> subprocess.Popen[str]:
    """A command that goes on for a while."""
    own = ["env", "--default-signal=INT"]  # a shell that runs tests in the background has its children ignore Ctrl-C
    return subprocess.Popen([*own, sys.executable, "-u", "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused_page(stack: Stack) -> str:
    """/readyz, which answers with 503."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{stack.admin_port}/readyz", timeout=5)
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.read().decode()
    return ""


def kill_below(launcher: Daemon) -> None:
    """End what it has started and has not ended itself."""
    if launcher.process.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
