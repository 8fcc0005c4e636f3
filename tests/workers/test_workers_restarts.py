"""System: a gateway of several processes that is restarted, or succeeded by a signal: nobody is cut off, nobody is turned away."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest
from workers_rig import MakeStack, taken, until_gone, workers

from tests.system.peers import Service, dial, is_served
from tests.system.stack import Daemon, Stack, wait_until
from tests.system.test_system_activation import Visitors
from tests.system.test_system_upgrades import GATEWAY_LIMITS, RELAY_LIMITS, Flow, kill_below, newest, through
from tests.system.units import Unit

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]

RELAYS = ("node-a", "node-b")
"""With the same service: whichever worker takes a client, about every second one is for a relay of the other worker."""
FLOWS = 8
STRANGERS = 20
SetWorkers = Callable[[int], None]


@pytest.fixture
def set_workers(monkeypatch: pytest.MonkeyPatch) -> SetWorkers:
    """For gateways that are started from now on."""

    def set_workers(count: int) -> None:
        monkeypatch.setenv("FXGATEWAY__TUNNEL__WORKERS", str(count))

    set_workers(2)
    return set_workers


@pytest.fixture
def stack(make_stack: MakeStack, echo_service: Service, set_workers: SetWorkers) -> Stack:
    """Relays that look for their gateway. Strangers have long to say who they are."""
    stack = make_stack("echo", extra=f"{GATEWAY_LIMITS}hello_timeout_s = 60\n")
    for name in RELAYS:
        stack.write_relay_config(name, {"echo": echo_service.target}, RELAY_LIMITS)
        stack.launch_relay(name)
    return stack


def launch(stack: Stack) -> list[str]:
    return ["fxgateway.cli", "launch", "--config", str(stack.gateway_config)]


@pytest.fixture
def unit(stack: Stack) -> Iterator[Unit]:
    """The gateway, two relays in two workers."""
    unit = Unit(launch(stack), stack.directory / "gateway.log", stack.directory)
    try:
        unit.start()
        stack.wait_for_relays(*RELAYS, timeout_s=60)
        assert {worker["relays"] for worker in workers(stack).values()} == {1}
        yield unit
    finally:
        unit.close()


def test_restarts(stack: Stack, unit: Unit) -> None:
    through(stack.doors["echo"], unit.restart, 3)
    wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
    assert "fenced" not in stack.logs()


def test_restarts_that_change_how_many_processes_there_are(stack: Stack, unit: Unit, set_workers: SetWorkers) -> None:
    counts = iter((1, 3))
    seen = []

    def restart() -> None:
        set_workers(next(counts))
        unit.restart()
        stack.wait_for_relays(*RELAYS, timeout_s=60)
        seen.append(len(workers(stack)))

    through(stack.doors["echo"], restart, 2)
    wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
    assert seen == [0, 3]


@pytest.fixture
def launcher(stack: Stack) -> Iterator[Daemon]:
    """As `unit`, without a service manager."""
    launcher = Daemon(launch(stack), stack.directory / "gateway.log")
    stack.daemons.append(launcher)
    try:
        launcher.wait_ready()
        stack.wait_for_relays(*RELAYS, timeout_s=60)
        yield launcher
    finally:
        kill_below(launcher)


def test_a_signal_brings_in_a_successor_and_one_that_is_killed_changes_nothing(stack: Stack, launcher: Daemon) -> None:
    port = stack.doors["echo"]
    flows, visitors = [Flow(port, seed) for seed in range(FLOWS)], Visitors(port)

    def successor() -> psutil.Process | None:
        pid = newest(launcher)
        return psutil.Process(pid) if pid != first else None

    try:
        first = newest(launcher)
        old_workers = {worker["pid"] for worker in workers(stack).values()}
        launcher.signal(signal.SIGUSR2)
        wait_until(lambda: (process := successor()) is not None and len(process.children()) == 2, 30, "a successor with its workers")
        killed = successor()
        assert killed is not None
        orphans = [process.pid for process in killed.children()]
        killed.kill()
        wait_until(lambda: "before it was prepared; nothing changes" in stack.logs(), 30, "the launcher's word on it")
        until_gone(orphans, 40)
        assert {worker["pid"] for worker in workers(stack).values()} == old_workers
        assert '"relay node-a is here' not in (stack.directory / "gateway.log").read_text().partition("starting a successor")[2]
        launcher.signal(signal.SIGUSR2)
        wait_until(lambda: "has taken over" in stack.logs(), 30, "a successor")
        stack.wait_for_relays(*RELAYS, timeout_s=60)
    finally:
        visitors.stop()
        problems = [flow.finish() for flow in flows]
    assert problems == [""] * FLOWS
    assert set(visitors.ends) == {"served"}, visitors.ends
    assert {worker["pid"] for worker in workers(stack).values()}.isdisjoint(old_workers)
    assert launcher.stop() == 0


def test_a_successor_takes_nobody_before_its_turn(stack: Stack, launcher: Daemon) -> None:
    """The process before it stands still and lets go of nothing: a relay that dials now would be missed there."""
    old = [psutil.Process(worker["pid"]) for worker in workers(stack).values()]
    before = sum(taken(worker, stack.tunnel_port) for worker in old)
    parent = psutil.Process(newest(launcher))
    stack.gateway_extra = "[limits]\nrelay_wait_s = 0\n"
    stack.write_gateway_config()
    with ExitStack() as strangers:
        parent.suspend()
        launcher.signal(signal.SIGUSR2)
        wait_until(lambda: "has taken over" in stack.logs(), 30, "a successor that is prepared")
        for worker in old:
            worker.suspend()
        for _ in range(STRANGERS):
            strangers.enter_context(dial(stack.tunnel_port))
        time.sleep(0.3)  # whoever may take them has done so
        for worker in old:
            worker.resume()
        assert all(is_served(stack.doors["echo"]) for _ in range(STRANGERS))

        def are_taken() -> bool:
            return sum(taken(worker, stack.tunnel_port) for worker in old) == before + STRANGERS

        wait_until(are_taken, what="the old workers to take all")
        parent.resume()
        stack.wait_for_relays(*RELAYS, timeout_s=60)
    assert is_served(stack.doors["echo"])
    assert launcher.stop() == 0
