"""System: tunnels cut after the gateway has a new process: relays come back to the old ones, and no stream notices."""

import contextlib
import re
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.system.peers import Service, dial, how_it_ends, is_served, say
from tests.system.stack import Daemon, Stack, slowness, wait_until
from tests.system.test_system_upgrades import GATEWAY_LIMITS, RELAY_LIMITS, Flow, kill_below, newest
from tests.system.units import Unit

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("systemd")]

FLOWS_EACH = 4
"""Of every process of the gateway but the last."""
CUTS = 2
LIMIT_S = 60.0
SOON_S = 15.0
"""On a busy machine; far below the 30 s for which streams are held where nothing else is said."""
FLOOD = 400
LINE_HOLDS = 300
"""More connections than this never wait on a line (LINE_BYTES)."""


class Launched:
    """A gateway below `fxgateway launch` without a service manager: SIGUSR2 brings in its successor."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._launcher = Daemon(["fxgateway.cli", "launch", "--config", str(stack.gateway_config)], stack.directory / "gateway.log")
        stack.daemons.append(self._launcher)
        self._launcher.wait_ready()

    def daemon(self) -> psutil.Process:
        return psutil.Process(newest(self._launcher))

    def restart(self) -> None:
        self._launcher.signal(signal.SIGUSR2)
        wait_until(lambda: f"process {newest(self._launcher)} has taken over" in self._stack.logs(), LIMIT_S, "a successor")

    def close(self) -> None:
        kill_below(self._launcher)


def unit(stack: Stack) -> Unit:
    """A gateway below `fxgateway launch` and a service manager, which keeps its sockets while none of them runs."""
    unit = Unit(["fxgateway.cli", "launch", "--config", str(stack.gateway_config)], stack.directory / "gateway.log", stack.directory)
    unit.start()
    return unit


@pytest.fixture
def stack(make_stack: Callable[..., Stack]) -> Stack:
    return make_stack("echo", extra=GATEWAY_LIMITS)


@pytest.fixture(params=[unit, Launched], ids=["unit", "launcher"])
def gateway(request: pytest.FixtureRequest, stack: Stack, echo_service: Service) -> Iterator[Unit | Launched]:
    gateway = request.param(stack)
    try:
        stack.start_relay("node-a", {"echo": echo_service.target}, RELAY_LIMITS)
        stack.wait_for_relays("node-a")
        yield gateway
    finally:
        gateway.close()


def said(stack: Stack, words: str) -> int:
    """How many times the relay's log says so."""
    return len(re.findall(words, (stack.directory / "node-a.log").read_text()))


def hand_over(stack: Stack, gateway: Unit | Launched) -> psutil.Process:
    """To a next process, until the relay is there as well; the one before."""
    before, ties = gateway.daemon(), said(stack, r"tunnel to \S+ open")
    gateway.restart()
    wait_until(lambda: said(stack, r"tunnel to \S+ open") > ties, LIMIT_S, "the tunnel to the next process")
    stack.wait_for_relays("node-a", timeout_s=LIMIT_S)
    return before


def streams_at_relay(stack: Stack) -> int:
    """How many are open there now."""
    return sum(service["streams"] for service in stack.relay_status("node-a")["services"])


def hello_naming(process: str) -> bytes:
    """How a relay begins that asks for one of the gateway's processes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols([f"fx-process/{process}/http/1.1"])
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


@contextlib.contextmanager
def stranger(stack: Stack, says: bytes) -> Iterator[socket.socket]:
    """A connection at the tunnel port."""
    with dial(stack.tunnel_port) as sock:
        sock.sendall(says)
        yield sock


def names_of_earlier(gateway: Unit | Launched) -> list[str]:
    """Of the processes to which a service manager keeps lines."""
    assert isinstance(gateway, Unit)
    gateway.listen()
    return [name.removeprefix("fx-process-") for name in gateway.stored if name.startswith("fx-process-")]


def wait_for_more(flows: list[Flow]) -> None:
    """Until each has received something since now."""
    had = [flow.received_bytes for flow in flows]
    wait_until(lambda: all(flow.received_bytes > before for flow, before in zip(flows, had, strict=True)), LIMIT_S, "bytes of every flow")


def test_cuts_after_two_restarts_lose_nothing(stack: Stack, gateway: Unit | Launched) -> None:
    flows: list[Flow] = []
    earlier = []
    try:
        for _ in range(2):
            flows += [Flow(stack.doors["echo"], len(flows) + number) for number in range(FLOWS_EACH)]
            wait_for_more(flows)
            earlier.append(hand_over(stack, gateway))
        for cut in range(1, CUTS + 1):
            assert stack.cutter.cut() >= 6
            wait_until(lambda cut=cut: said(stack, r"tunnel to \S+ resumed") == 3 * cut, LIMIT_S, f"three tunnels resumed after cut {cut}")
            wait_for_more(flows)
        assert said(stack, "connected again to the process") == 2 * CUTS
        assert is_served(stack.doors["echo"])
    finally:
        problems = [flow.finish() for flow in flows]
    assert problems == [""] * 2 * FLOWS_EACH
    wait_until(lambda: not any(process.is_running() for process in earlier), LIMIT_S, "the end of the earlier processes")
    if isinstance(gateway, Unit):
        wait_until(lambda: len(names_of_earlier(gateway)) == 1, what="no line but that of the present process")


@pytest.mark.parametrize("gateway", [unit], ids=["unit"], indirect=True)
def test_a_path_that_is_away_during_the_restart(stack: Stack, gateway: Unit) -> None:
    """The relay does not hear that it should look for another process: it finds one."""
    flow = Flow(stack.doors["echo"], 1)
    try:
        wait_for_more([flow])
        stack.cutter.cut_off()
        gateway.stop()
        stack.cutter.cut()
        stack.cutter.thaw()
        gateway.start()
        wait_until(lambda: said(stack, r"tunnel to \S+ resumed") == 1, LIMIT_S, "the tunnel to the old process resumed")
        assert is_served(stack.doors["echo"])
    finally:
        problem = flow.finish()
    assert problem == ""


@pytest.mark.parametrize("gateway", [unit], ids=["unit"], indirect=True)
def test_a_client_whose_opening_was_lost_on_the_way(stack: Stack, gateway: Unit) -> None:
    """The relay knows of no stream at the old process, and comes back to it all the same."""
    stack.cutter.cut_off()
    with dial(stack.doors["echo"], LIMIT_S) as client:
        client.sendall(b"hello")
        wait_until(lambda: "fxgateway_streams 1.0" in stack.page("/metrics"), LIMIT_S, "the stream at the gateway")
        gateway.stop()
        stack.cutter.cut()
        stack.cutter.thaw()
        gateway.start()
        assert client.recv(5) == b"hello"


@pytest.mark.parametrize("gateway", [unit], ids=["unit"], indirect=True)
def test_streams_of_an_earlier_process_that_is_killed_end_at_once(stack: Stack, gateway: Unit, echo_service: Service) -> None:
    with dial(stack.doors["echo"]) as client:
        say(client)
        before = hand_over(stack, gateway)
        assert streams_at_relay(stack) == 1
        before.kill()
        how, _ = how_it_ends(client, SOON_S)
        assert how == "reset"
        limit_s = SOON_S * slowness()
        wait_until(lambda: streams_at_relay(stack) == 0, limit_s, "the end of the stream at the relay")
        wait_until(lambda: len(names_of_earlier(gateway)) == 1, what="its line forgotten")
    assert is_served(stack.doors["echo"])


@pytest.mark.parametrize("gateway", [unit], ids=["unit"], indirect=True)
def test_strangers_who_name_processes(stack: Stack, gateway: Unit) -> None:
    """One that there is not; and, many times, one that stands still: its successor serves, and keeps nothing for it."""
    flow = Flow(stack.doors["echo"], 1)
    before, hello = None, hello_naming(names_of_earlier(gateway)[0])
    try:
        wait_for_more([flow])
        before = hand_over(stack, gateway)
        files = gateway.daemon().num_fds()
        with stranger(stack, hello_naming("0123456789abcdef")) as sock:
            assert how_it_ends(sock, SOON_S)[0] != "open"
        before.suspend()
        with contextlib.ExitStack() as strangers:
            socks = [strangers.enter_context(stranger(stack, hello)) for _ in range(FLOOD)]
            wait_until(lambda: gateway.daemon().num_fds() < files + 20, what="the descriptors of the strangers")
            assert is_served(stack.doors["echo"])
            turned_away = sum(was_turned_away(sock) for sock in socks)
            assert turned_away >= FLOOD - LINE_HOLDS
            before.resume()
        stack.cutter.cut()
        wait_until(lambda: said(stack, "connected again to the process") > 0, LIMIT_S, "the relay back at the earlier process")
        wait_until(lambda: said(stack, r"tunnel to \S+ resumed") >= 2, LIMIT_S, "both tunnels resumed")
        wait_for_more([flow])
    finally:
        if before is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                before.resume()
        problem = flow.finish()
    assert problem == ""


def was_turned_away(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(64).startswith(b"fx-busy")
    except BlockingIOError:
        return False
