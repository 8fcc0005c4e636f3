"""Ways back to the workers of earlier gateways: kept by the parent, used by the workers; and cuts after restarts, which lose nothing."""

import array
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil
import pytest
import trio
from workers_rig import MakeStack, workers

from fxgateway.workers.reconnect_lines import ReconnectLines
from fxtunnel.kit.listeners import LINE_NAME, Inherited
from fxtunnel.kit.notify import Notifier
from tests.system.peers import Service, is_served
from tests.system.stack import Stack, wait_until
from tests.system.test_system_upgrades import GATEWAY_LIMITS, RELAY_LIMITS, Flow
from tests.system.units import Unit

RELAYS = ("node-a", "node-b")
FLOWS_EACH = 6
"""Of every gateway but the last; about half of them for each relay, and so for each worker."""
CUTS = 2
LIMIT_S = 60.0


@dataclass
class Launcher:
    """What it was given to keep."""

    sock: socket.socket
    kept: dict[str, socket.socket] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The processes to which it keeps a line by now."""
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return list(self.kept)
            words, _, name = data.decode().partition("\nFDNAME=")
            assert name.startswith(LINE_NAME)
            if words == "FDSTORE=1":
                (fd,) = array.array("i", ancillary[0][2])
                self.kept[name.removeprefix(LINE_NAME)] = socket.socket(fileno=fd)
            else:
                assert words == "FDSTOREREMOVE=1"
                self.kept.pop(name.removeprefix(LINE_NAME)).close()


@asynccontextmanager
async def launched() -> AsyncIterator[tuple[Launcher, Notifier]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        launcher = Launcher(ours)
        yield launcher, Notifier(launcher=theirs)
        for line in launcher.kept.values():
            line.close()


async def test_lines_are_kept_from_our_turn_on_and_until_the_worker_ends() -> None:
    async with launched() as (launcher, notifier), trio.open_nursery() as nursery:
        reconnect_lines = ReconnectLines(Inherited({}, notifier))
        first, second = reconnect_lines.begin(1), reconnect_lines.begin(2)
        assert first.line is not None
        assert second.line is not None
        reconnect_lines.end(2)
        assert launcher.lines() == [], "it may never be our turn"
        assert second.line.recv(1) == b"", "nobody is left to say anything"
        await nursery.start(reconnect_lines.run)
        assert launcher.lines() == [first.process]
        launcher.kept[first.process].send(b"x")
        assert first.line.recv(2) == b"x"
        third = reconnect_lines.begin(2)
        assert third.line is not None
        assert third.process not in (first.process, second.process)
        assert launcher.lines() == [first.process, third.process]
        again = reconnect_lines.begin(1)
        assert again.line is not None
        assert launcher.lines() == [third.process, again.process]
        for name in (first, second, third, again):
            assert name.line is not None
            name.line.close()
        nursery.cancel_scope.cancel()


async def test_earlier_processes_are_forgotten_when_they_end() -> None:
    async with launched() as (launcher, notifier), trio.open_nursery() as nursery:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launcher.kept["p1"] = theirs.dup()
        reconnect_lines = ReconnectLines(Inherited({}, notifier, lines={"p1": theirs}))
        await nursery.start(reconnect_lines.run)
        assert [name for name, _ in reconnect_lines.to_earlier()] == [f"{LINE_NAME}p1"]
        ours.close()
        with trio.fail_after(5):
            while reconnect_lines.to_earlier():
                await trio.sleep(0.01)
        assert launcher.lines() == []
        nursery.cancel_scope.cancel()


def test_without_a_launcher_nobody_comes_back() -> None:
    reconnect_lines = ReconnectLines(Inherited({}, Notifier()))
    name = reconnect_lines.begin(1)
    assert name.process
    assert name.line is None


SetWorkers = Callable[[int], None]


@pytest.fixture
def set_workers(monkeypatch: pytest.MonkeyPatch) -> SetWorkers:
    """For gateways that are started from now on."""

    def set_workers(count: int) -> None:
        monkeypatch.setenv("FXGATEWAY__TUNNEL__WORKERS", str(count))

    return set_workers


@pytest.fixture
def stack(make_stack: MakeStack) -> Stack:
    return make_stack("echo", extra=GATEWAY_LIMITS)


@pytest.fixture
def unit(stack: Stack) -> Iterator[Unit]:
    """Not started yet."""
    unit = Unit(["fxgateway.cli", "launch", "--config", str(stack.gateway_config)], stack.directory / "gateway.log", stack.directory)
    try:
        yield unit
    finally:
        unit.close()


def said(stack: Stack, words: str) -> int:
    """How many times the relays' logs say so."""
    return sum(len(re.findall(words, (stack.directory / f"{name}.log").read_text())) for name in RELAYS)


def wait_for_more(flows: list[Flow]) -> None:
    """Until each has received something since now."""
    had = [flow.received_bytes for flow in flows]
    wait_until(lambda: all(flow.received_bytes > before for flow, before in zip(flows, had, strict=True)), LIMIT_S, "bytes of every flow")


@pytest.mark.system
@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("counts", [(2, 2, 2), (2, 1, 3), (1, 2, 1)], ids=str)
def test_cuts_after_restarts_lose_nothing(
    stack: Stack, unit: Unit, echo_service: Service, set_workers: SetWorkers, counts: tuple[int, ...]
) -> None:
    """Each relay has a tunnel to every gateway, and comes back to the very worker where its streams are."""
    flows: list[Flow] = []
    daemons: list[psutil.Process] = []
    first, *later = counts
    set_workers(first)
    unit.start()
    try:
        for name in RELAYS:
            stack.start_relay(name, {"echo": echo_service.target}, RELAY_LIMITS)
        stack.wait_for_relays(*RELAYS, timeout_s=LIMIT_S)
        for number, count in enumerate(later, start=1):
            flows += [Flow(stack.doors["echo"], len(flows) + seed) for seed in range(FLOWS_EACH)]
            wait_for_more(flows)
            daemons.append(unit.daemon())
            set_workers(count)
            unit.restart()
            tunnels = len(RELAYS) * (number + 1)
            wait_until(lambda tunnels=tunnels: said(stack, r"tunnel to \S+ open") >= tunnels, LIMIT_S, "tunnels to the next gateway")
            stack.wait_for_relays(*RELAYS, timeout_s=LIMIT_S)
            assert len(workers(stack)) == (count if count > 1 else 0)
        for cut in range(1, CUTS + 1):
            stack.cutter.cut()
            resumed = len(RELAYS) * len(counts) * cut
            wait_until(
                lambda resumed=resumed: said(stack, r"tunnel to \S+ resumed") == resumed, LIMIT_S, f"every tunnel resumed after cut {cut}"
            )
            wait_for_more(flows)
        assert said(stack, "connected again to the process") == CUTS * len(RELAYS) * len(later)
        assert is_served(stack.doors["echo"])
    finally:
        problems = [flow.finish() for flow in flows]
    assert problems == [""] * len(flows)
    wait_until(lambda: not any(daemon.is_running() for daemon in daemons), LIMIT_S, "the end of the earlier gateways")
    unit.listen()
    lines = [name for name in unit.stored if name.startswith(LINE_NAME)]
    assert len(lines) == later[-1], "those of the present workers"
