"""System: a gateway of several processes, with real relays and clients: it does what one process would."""

import http.client
import json
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import trio
from workers_rig import MakeStack, gateway_page, is_worker, say, start, streams, until_gone, wait_until_shown, worker_of, workers

from fxrelay.uplink.identity import load_identity
from fxtunnel.kit.tls import TlsStream, client_context, handshake_client
from fxtunnel.model import GatewayId, RelayId
from tests.ports import free_port
from tests.system.peers import (
    Outcome,
    Service,
    dial,
    exchanges,
    how_it_ends,
    is_refused,
    is_served,
    payload,
    read_exactly,
    read_to_end,
    reset,
)
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]

MIB = 1 << 20
RELAYS_BACK_S = 10.0
"""Far below the 30 s that a relay pauses at most. See `slowness`."""
REVOKED_S = 10.0
"""Two commands included; nobody is cut off later who is not cut off then. See `slowness`."""


@pytest.fixture(scope="module")
def shared(make_shared_stack: MakeStack, echo_service: Service) -> Stack:
    """Three workers, three relays: for tests that leave both as they were. Nobody listens where the first relay's `half` should be."""
    both = {"echo": echo_service.target, "half": echo_service.target}
    return start(make_shared_stack, both, relays=3, count=3, other={"node-0": both | {"half": f"127.0.0.1:{free_port()}"}})


def test_any_worker_takes_a_client_for_any_relay(shared: Stack) -> None:
    assert {worker["relays"] for worker in workers(shared).values()} == {1}
    with ExitStack() as stack:
        clients = [stack.enter_context(dial(shared.doors["echo"])) for _ in range(200)]
        for number, client in enumerate(clients):
            client.sendall(b"%06d" % number)
        for number, client in enumerate(clients):
            assert read_exactly(client, 6) == b"%06d" % number
        wait_until(lambda: sum(streams(shared).values()) == 200, what="all streams are shown")
        assert min(streams(shared).values()) > 40, streams(shared)
        wait_until_shown(shared, "connections", 200)


def test_a_relay_that_refuses_is_passed_over_whoever_has_it(shared: Stack) -> None:
    for number in range(40):
        say(shared.doors["half"], b"client %d" % number)


def test_the_status_page_and_the_metrics_are_sums(shared: Stack) -> None:
    for _ in range(20):
        say(shared.doors["echo"])
    wait_until_shown(shared, "connections", 0)

    def are_alike() -> bool:
        page = gateway_page(shared)
        return sum(entry["accepted"] for entry in page["doors"]) == page["gateway"]["streams_opened"]

    wait_until(are_alike, what="as many streams as clients")
    page = gateway_page(shared)
    door = page["doors"][0]
    assert door["accepted"] >= 20
    assert len(page["relays"]) == 3
    accepted = f'fxgateway_door_accepted_total{{door="{door["name"]}",service="echo"}} {float(door["accepted"])}'
    wait_until(lambda: accepted in shared.page("/metrics"), what="the same count in the metrics")
    metrics = shared.page("/metrics")
    for worker in (1, 2, 3):
        assert f'fxgateway_worker_up{{worker="{worker}"}} 1.0' in metrics
    assert 'fxgateway_relays{state="up"} 3.0' in metrics
    assert float(re.findall(r"^fxgateway_certificate_expires_timestamp_seconds (\S+)", metrics, re.MULTILINE)[0]) > time.time()
    assert 'fxgateway_window_bytes{kind="first"} ' in metrics
    assert "fxgateway_access_log_dropped_total 0.0" in metrics
    parent = shared.gateway
    assert parent is not None
    pids = [parent.pid, *(worker["pid"] for worker in workers(shared).values())]
    open_files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    said = next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith("process_open_fds "))
    assert abs(said - open_files) < 20
    assert json.loads(shared.page("/readyz")) == {"ready": True, "reasons": []}


def test_a_cut_link_is_resumed_at_the_worker_that_holds_it(make_stack: MakeStack, swap_service: Service) -> None:
    stack = start(make_stack, {"swap": swap_service.target}, relays=2)
    crowd = exchanges(stack.doors["swap"], 32, 2 * MIB, rate_bytes_per_s=MIB)
    for _ in range(6):
        time.sleep(0.25)
        wait_until(lambda: stack.cutter.cut() >= 1, 10, "a tunnel to cut")
        stack.wait_for_relays("node-0", "node-1")
    assert crowd.outcomes() == [Outcome.RIGHT] * 32
    relays = stack.live_relays().values()
    assert sum(link["resumed"] for relay in relays for link in relay["links"]) >= 6
    assert [relay["epoch"] for relay in relays] == [1, 1]
    assert "is at another worker now" not in stack.logs()


def test_one_worker_dies_and_the_others_do_not_notice(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    with ExitStack() as clients:
        open_clients = [clients.enter_context(dial(stack.doors["echo"])) for _ in range(40)]
        for client in open_clients:
            client.sendall(b"before")
            assert read_exactly(client, 6) == b"before"
        victim = worker_of(stack, "node-0")
        # A worker that is late with its answer is shown as it was.
        wait_until_shown(stack, "connections", 40)
        carried = workers(stack)[victim]["connections"]
        assert 0 < carried < 40
        pid = workers(stack)[victim]["pid"]
        slow = slowness()
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        ends = []
        for client in open_clients:
            try:
                client.sendall(b"after")
                ends.append(read_exactly(client, 5) == b"after")
            except OSError:
                ends.append(False)
        assert ends.count(True) == 40 - carried
        wait_until(lambda: is_served(stack.doors["echo"]), 30, "a new client")
        stack.wait_for_relays("node-0", "node-1", timeout_s=30)
        took_s = time.monotonic() - killed_at
        assert took_s < RELAYS_BACK_S * max(slow, slowness())
    wait_until(lambda: workers(stack)[victim]["up"], 60, "the worker to be back")
    assert workers(stack)[victim]["restarts"] == 1
    assert gateway_page(stack)["doors"][0]["accepted"] >= 40
    for _ in range(20):
        say(stack.doors["echo"])


def test_a_worker_that_cannot_be_replaced_now_is_replaced_later(make_stack: MakeStack, echo_service: Service) -> None:
    """The parent may open no more files when it would start a successor: the other worker, and the clients in it, go on."""
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    assert stack.gateway is not None
    victim = worker_of(stack, "node-0")
    pids = {number: worker["pid"] for number, worker in workers(stack).items()}
    (healthy,) = pids.keys() - {victim}
    parent = psutil.Process(stack.gateway.pid)
    before = parent.rlimit(psutil.RLIMIT_NOFILE)
    parent.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))
    os.kill(pids[victim], signal.SIGKILL)
    wait_until(lambda: stack.logs().count(f"worker {victim} has died (Too many open files)") >= 2, 20, "two attempts")
    assert psutil.Process(pids[healthy]).ppid() == parent.pid
    wait_until(lambda: is_served(stack.doors["echo"]), 30, "the other worker to serve")
    parent.rlimit(psutil.RLIMIT_NOFILE, before)
    wait_until(lambda: workers(stack)[victim]["up"], 60, "the worker to be back")
    assert workers(stack)[healthy]["pid"] == pids[healthy]


def test_a_relay_does_not_wait_for_the_successor_of_its_worker(make_stack: MakeStack, echo_service: Service) -> None:
    """It names the worker that has died; a process with that number exists again, and is not there yet."""
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    assert stack.gateway is not None
    victim = worker_of(stack, "node-0")
    before = {worker["pid"] for worker in workers(stack).values()}
    relay = stack.relays["node-0"]
    relay.signal(signal.SIGSTOP)  # until there is a successor
    os.kill(workers(stack)[victim]["pid"], signal.SIGKILL)
    gateway = psutil.Process(stack.gateway.pid)

    def successors() -> list[psutil.Process]:
        """Not before they run their program: until then the parent stands still with a child that is stopped (vfork)."""
        return [child for child in gateway.children() if child.pid not in before and is_worker(child)]

    wait_until(successors, 60, "a successor")
    (successor,) = successors()
    successor.suspend()
    relay.signal(signal.SIGCONT)
    stack.wait_for_relays("node-0", "node-1", timeout_s=20)
    assert worker_of(stack, "node-0") != victim
    assert not workers(stack)[victim]["up"]
    say(stack.doors["echo"])
    successor.resume()
    wait_until(lambda: workers(stack)[victim]["up"], 60, "the successor")


@pytest.mark.slow
def test_a_worker_that_stands_still_is_replaced(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    victim = worker_of(stack, "node-0")
    pid = workers(stack)[victim]["pid"]
    os.kill(pid, signal.SIGSTOP)
    until_gone([pid], 60)
    stack.wait_for_relays("node-0", "node-1", timeout_s=60)
    for _ in range(20):
        say(stack.doors["echo"])


def test_drain_lets_clients_of_all_workers_finish(make_stack: MakeStack, swap_service: Service) -> None:
    stack = start(make_stack, {"swap": swap_service.target}, relays=2, extra="[limits]\ndrain_s = 120\n")
    gateway = stack.gateway
    assert gateway is not None
    pids = [worker["pid"] for worker in workers(stack).values()]
    crowd = exchanges(stack.doors["swap"], 16, MIB, rate_bytes_per_s=MIB / 5)
    wait_until_shown(stack, "connections", 16)
    gateway.signal(signal.SIGTERM)
    wait_until(lambda: "stopping: 2 workers" in gateway.log.read_text(), 20, "the drain")
    wait_until(lambda: is_refused(stack.doors["swap"]), what="the doors of every worker to close")
    assert crowd.running
    assert crowd.outcomes() == [Outcome.RIGHT] * 16
    assert gateway.wait(60) == 0
    until_gone(pids)


def test_revoking_reaches_every_worker(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    with ExitStack() as clients:
        open_clients = [clients.enter_context(dial(stack.doors["echo"])) for _ in range(8)]
        for client in open_clients:
            client.sendall(b"!")
            assert client.recv(1) == b"!"
        revoked_at = time.monotonic()
        for name in ("node-0", "node-1"):
            stack.gateway_cli("revoke", name)
        for client in open_clients:
            assert how_it_ends(client, 30)[0] == "reset"
        assert time.monotonic() - revoked_at < REVOKED_S * slowness()
    wait_until(lambda: not stack.live_relays(), 20, "no relay")


async def upgrade(stack: Stack, worker: int, prove: Callable[[str], str]) -> int:
    """Ask a certain worker for a control link, with an assertion for the connection that is told; the status of its answer."""
    context = client_context((stack.directory / "ca.pem").read_text(), [f"fx-worker/{worker}", "http/1.1"])
    async with TlsStream(await handshake_client(dial(stack.tunnel_port), context, "127.0.0.1")) as stream:
        await stream.send_all(
            b"GET /.fx/control HTTP/1.1\r\nHost: gw\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: fx-control.1\r\n"
            b"Authorization: Bearer " + prove(stream.socket.binding()).encode() + b"\r\n\r\n"
        )
        return int((await stream.receive_some()).split()[1])


def test_an_assertion_is_good_for_its_connection_alone_at_every_worker(shared: Stack) -> None:
    state = Path(shared.directory / "node-0" / "state")
    identity = trio.run(load_identity, state, RelayId("node-0"))
    gateway_id = GatewayId(json.loads(shared.page("/relays"))["gateway"]["gateway_id"])
    made: list[str] = []

    def prove(binding: str) -> str:
        made.append(identity.assertion(gateway_id, binding, time.time()))
        return made[-1]

    for first, second in ((1, 2), (2, 2), (3, 1)):
        assert trio.run(upgrade, shared, first, prove) == 101
        assert trio.run(upgrade, shared, second, lambda _: made[-1]) == 401
    assert trio.run(upgrade, shared, 99, prove) == 101  # nobody has that number: whoever took it serves it


def test_a_hello_that_comes_in_pieces_finds_its_worker(shared: Stack) -> None:
    context = ssl.create_default_context(cafile=str(shared.directory / "ca.pem"))
    context.set_alpn_protocols(["fx-worker/2", "http/1.1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with dial(shared.tunnel_port, 10) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                hello = outgoing.read()
                for start in range(0, len(hello), 100):
                    sock.sendall(hello[start : start + 100])
                    time.sleep(0.01)
                incoming.write(sock.recv(65_536))
        assert tls.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", b""])
def test_whoever_does_not_speak_tls_is_hung_up_on(shared: Stack, words: bytes) -> None:
    with dial(shared.tunnel_port) as sock:
        sock.sendall(words)
        assert how_it_ends(sock, 30)[0] in ("fin", "reset")


def test_limits_are_what_they_say(make_stack: MakeStack, echo_service: Service) -> None:
    small = free_port()
    own = f'[[door]]\nname = "small"\nlisten = "127.0.0.1:{small}"\nservice = "echo"\nmax_connections = 10\n'
    extra = f"[limits]\nconnections_per_door = 30\n{own}"
    stack = start(make_stack, {"echo": echo_service.target}, relays=2, extra=extra)
    with ExitStack() as clients:

        def is_let_in(port: int = stack.doors["echo"]) -> bool:
            try:
                client = clients.enter_context(dial(port))
                client.sendall(b"!")
                return client.recv(1) == b"!"
            except ConnectionError:
                return False

        assert [is_let_in() for _ in range(30)] == [True] * 30
        assert [is_let_in(small) for _ in range(10)] == [True] * 10
        time.sleep(2)  # the others are told within milliseconds, each time they have their turn
        assert [is_let_in() for _ in range(15)] == [False] * 15
        assert [is_let_in(small) for _ in range(5)] == [False] * 5


def test_workers_do_not_outlive_their_parent(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    assert stack.gateway is not None
    pids = [worker["pid"] for worker in workers(stack).values()]
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"!")
        assert client.recv(1) == b"!"
        stack.gateway.kill()
        assert how_it_ends(client, 30)[0] == "reset"
    until_gone(pids)
    with pytest.raises(ConnectionRefusedError):
        dial(stack.doors["echo"])
    # The relays are back at once, before the second worker is ready, and are spread all the same.
    stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": "2"})
    stack.wait_for_relays("node-0", "node-1")
    wait_until(lambda: {worker["relays"] for worker in workers(stack).values()} == {1}, what="a relay in each worker")


def site(sock: socket.socket) -> None:
    """A service behind a door that ends TLS: gives back what is posted; `/cut` breaks off in the middle of an answer without a length."""
    with sock.makefile("rb") as requests:
        while head := requests.readline():
            length = 0
            while (line := requests.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = requests.read(length)
            if b"/cut" in head:
                sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
                reset(sock)
                return
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def test_tls_that_ended_at_one_worker_reaches_a_relay_of_another(make_stack: MakeStack, serve: Callable[..., Service]) -> None:
    port, service = free_port(), serve(site)
    door = f'[[door]]\nlisten = "127.0.0.1:{port}"\nkind = "https"\nservice = "site"\ncertificate = "server.pem"\nkey = "server.key"\n'
    stack = start(make_stack, {"site": service.target}, relays=1, extra=door)
    context = ssl.create_default_context(cafile=str(stack.directory / "ca.pem"))
    body = bytes(payload(3, MIB))
    for _ in range(12):
        client = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
        for _ in range(2):
            client.request("POST", "/", body)
            assert client.getresponse().read() == body
        client.close()
    for _ in range(12):
        with context.wrap_socket(dial(port), server_hostname="127.0.0.1", suppress_ragged_eofs=False) as client:
            client.sendall(b"POST /cut HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + body[:100_000])
            with pytest.raises(OSError, match=r"reset|EOF"):  # a clean end, with close_notify, would be taken for the whole answer
                read_to_end(client)
    assert service.problems == []
    wait_until_shown(stack, "connections", 0)


def test_tls_that_ended_at_one_worker_goes_on_where_a_relay_of_another_refuses(
    make_stack: MakeStack, serve: Callable[..., Service]
) -> None:
    """One of three workers has no relay. Whichever it asks first, that one refuses one of the two services."""
    ports, target, nobody = (free_port(), free_port()), serve(site).target, f"127.0.0.1:{free_port()}"
    doors = [
        f'[[door]]\nlisten = "127.0.0.1:{port}"\nkind = "https"\nservice = "{name}"\ncertificate = "server.pem"\nkey = "server.key"\n'
        for port, name in zip(ports, "ab", strict=True)
    ]
    other = {"node-0": {"a": target, "b": nobody}, "node-1": {"a": nobody, "b": target}}
    stack = start(make_stack, {"a": target, "b": target}, relays=2, count=3, extra="".join(doors), other=other)
    context = ssl.create_default_context(cafile=str(stack.directory / "ca.pem"))
    body = bytes(payload(3, 100_000))
    for port in ports * 20:
        client = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
        client.request("PUT", "/", body)
        assert client.getresponse().read() == body
        client.close()
    wait_until_shown(stack, "connections", 0)
