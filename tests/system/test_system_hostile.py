"""System: strangers, garbage and crowds. Nobody else notices, and everything they took is given back."""

import contextlib
import json
import os
import random
import selectors
import socket
import ssl
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.peers import Outcome, Service, dial, echo, exchanges, is_served, say, visit
from tests.system.servers import need
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("hostile")]

ALERT, HANDSHAKE = b"\x15", b"\x16"
SILENT, GARBAGE = 500, 500
SOURCES = 40
HELLO_TIMEOUT_S = 5.0
AT_ONCE_S = 20.0
"""Not waited for, on a busy machine: where it is looked for, a stranger has a minute to say who he is."""
CLIENTS = 300


def files(stack: Stack) -> int:
    return psutil.Process(stack.gateway.pid).num_fds()


def door_of(stack: Stack) -> dict:
    """What is said of its only door."""
    (door,) = json.loads(stack.page("/relays"))["doors"]
    return door


def cpu_s(stack: Stack) -> float:
    times = psutil.Process(stack.gateway.pid).cpu_times()
    return times.user + times.system


@contextlib.contextmanager
def tls(stack: Stack, alpn: str) -> Iterator[ssl.SSLSocket]:
    """A stranger who knows the authority: as far as a handshake gets anyone."""
    context = ssl.create_default_context(cafile=str(stack.directory / "ca.pem"))
    context.set_alpn_protocols([alpn])
    with dial(stack.tunnel_port) as sock, context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped:
        yield wrapped


@pytest.fixture(scope="module")
def stack(make_shared_stack: Callable[..., Stack], echo_service: Service) -> Stack:
    stack = make_shared_stack("echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    return stack


@pytest.fixture(scope="module")
def patient(make_shared_stack: Callable[..., Stack]) -> Stack:
    """A gateway that waits long for a hello."""
    stack = make_shared_stack("echo", extra=f"[limits]\nhello_timeout_s = {3 * AT_ONCE_S:g}\n")
    stack.start_gateway()
    return stack


class Pinger:
    """A good client: 64-byte echoes, one after the other, as long as the block runs."""

    def __init__(self, port: int) -> None:
        self.round_trips_s: list[float] = []
        self._sock = dial(port)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Pinger":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sock.close()

    def p99_s(self) -> float:
        return statistics.quantiles(self.round_trips_s, n=100)[98]

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            began = time.monotonic()
            say(self._sock, bytes(64))
            self.round_trips_s.append(time.monotonic() - began)


@pytest.mark.parametrize(
    "words",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", bytes(64), b"\x16\x03\x01\xff\xff" + bytes(600)],
    ids=["http", "ssh", "zeros", "a record too long"],
)
def test_what_is_not_tls_is_closed_at_once(patient: Stack, words: bytes) -> None:
    with dial(patient.tunnel_port, 2 * AT_ONCE_S) as stranger:
        began = time.monotonic()
        stranger.sendall(words)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while block := stranger.recv(4096):
                answer += block
        assert time.monotonic() - began < AT_ONCE_S
        assert answer[:1] == (ALERT if words[:1] == HANDSHAKE else b"")  # OpenSSL says nothing to what is no TLS at all


def test_a_version_of_tls_that_is_too_old_gets_an_alert(stack: Stack) -> None:
    old = ssl.create_default_context(cafile=str(stack.directory / "ca.pem"))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with dial(stack.tunnel_port, 10) as sock, pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        old.wrap_socket(sock, server_hostname="127.0.0.1")


def test_whoever_speaks_none_of_our_protocols_is_closed_at_once(patient: Stack) -> None:
    with tls(patient, "h2") as stranger:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert stranger.recv(100) == b""
        assert time.monotonic() - began < AT_ONCE_S


@pytest.mark.slow
def test_a_thousand_strangers(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(stack)
    chance = random.Random(3)
    ends: dict[socket.socket, float] = {}
    silent: set[socket.socket] = set()
    with Pinger(stack.doors["echo"]) as calm:
        time.sleep(1)
    with Pinger(stack.doors["echo"]) as pinger, selectors.DefaultSelector() as selector:
        time.sleep(0.3)
        began = time.monotonic()
        for number in range(SILENT + GARBAGE):
            sock = socket.create_connection(("127.0.0.1", stack.tunnel_port), 10, (f"127.0.1.{1 + number % SOURCES}", 0))
            if number % 2:
                silent.add(sock)
            else:
                sock.sendall(chance.randbytes(100))
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, time.monotonic())
        while selector.get_map() and time.monotonic() - began < 90:
            for key, _ in selector.select(1):
                try:
                    is_open = bool(key.fileobj.recv(4096))
                except OSError:
                    is_open = False
                if not is_open:
                    ends[key.fileobj] = time.monotonic() - key.data
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    garbage_s = [took_s for sock, took_s in ends.items() if sock not in silent]
    silent_s = [took_s for sock, took_s in ends.items() if sock in silent]
    with capsys.disabled():
        sys.stdout.write(
            f"\nstrangers: garbage closed after {statistics.median(garbage_s):.3f} s (at most {max(garbage_s):.3f}), silent after "
            f"{statistics.median(silent_s):.2f} s (at most {max(silent_s):.2f}); a good client's p99 {pinger.p99_s() * 1000:.1f} ms, "
            f"{calm.p99_s() * 1000:.1f} before they came\n"
        )
    assert len(ends) == SILENT + GARBAGE
    # Not waited for; but a few look like the beginning of a record. A thousand come at once, so the last ones wait for their turn.
    assert statistics.quantiles(garbage_s, n=20)[18] < HELLO_TIMEOUT_S
    assert max(garbage_s + silent_s) < 3 * HELLO_TIMEOUT_S * slowness()
    # No more than a few turns of the loop; on a machine that is busy with other things all takes longer.
    assert pinger.p99_s() < max(0.25, 10 * calm.p99_s())
    wait_until(lambda: files(stack) <= before, 20, "all descriptors given back")


HEADS = (
    b"GET /.fx/control HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nX: \xff\xfe\r\n\r\n",
    b"GET /.fx/control HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: \xe4\xf6\xfc\r\n"
    b"Sec-WebSocket-Version: 13\r\n\r\n",
    b"GET /.fx/control HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Extensions: \x80\r\nSec-WebSocket-Protocol: \xc3\xa9\r\n"
    b"Upgrade: websocket\r\n\r\n",
    b"GET /.fx/control HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a.b.c\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /.fx/control HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \r\n\r\n",
    b'GET /\x1b[2J{"level":"forged"} HTTP/1.1\r\nHost: x\r\n\r\n',
    b"GET /.fx/control HTTP/1.1\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    b"GET /" + b"a" * 20_000,
    b"POST /.fx/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /.fx/enrol HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"POST /.fx/enrol HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcXX0\r\n\r\n",
    b"POST /.fx/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /.fx/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n" + b"[" * 10,
    b'POST /.fx/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\n{"v": 1, "token": "\\ud800"}',
    b"\x00\x01\x02\x03\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
FRAMES = (
    b"",
    struct.pack(">II", 0xF0FFFFFF, 0),
    struct.pack(">II", 0xF0000000, 0),
    struct.pack(">II", 0xF0000002, 0) + b"{}",
    struct.pack(">II", 0xF0000002, 7) + b"{}",
    struct.pack(">II", 0xF0000FFF, 0) + b"[" * 4095,
    struct.pack(">II", 0x00000005, 1) + b"hello",
    struct.pack(">II", 0x0B000002, 0) + b"\0\0",
    struct.pack(">II", 0xF1000002, 0) + b"{}",
    b"\xff" * 16_384,
    b"GET /.fx/control HTTP/1.1\r\nHost: x\r\n\r\n",
)


@pytest.mark.parametrize(("alpn", "cases"), [("http/1.1", HEADS), ("fx-data/1", FRAMES)])
def test_garbage_behind_a_handshake_is_answered_and_closed(stack: Stack, alpn: str, cases: tuple[bytes, ...]) -> None:
    with dial(stack.doors["echo"]) as client:
        say(client)
        for case in cases:
            with tls(stack, alpn) as stranger:
                began = time.monotonic()
                with contextlib.suppress(OSError):
                    stranger.sendall(case)
                answer = b""
                with contextlib.suppress(OSError):
                    while block := stranger.recv(65_536):
                        answer += block
                assert time.monotonic() - began < 3 * HELLO_TIMEOUT_S, case[:80]
                assert b"101" not in answer[:20]
                assert b"Traceback" not in answer
            say(client)
    assert stack.gateway.process.poll() is None


def test_garbage_at_doors_and_pages(stack: Stack) -> None:
    chance = random.Random(5)
    with dial(stack.doors["echo"]) as client:
        say(client)
        for port in (stack.doors["echo"], stack.admin_port, stack.tunnel_port):
            for number in range(40):
                with contextlib.suppress(OSError), dial(port, 1) as stranger:
                    stranger.sendall(HEADS[number % len(HEADS)] if number % 2 else chance.randbytes(chance.randrange(1, 2000)))
                    if number % 3:
                        stranger.shutdown(socket.SHUT_WR)
                        stranger.recv(100)
        say(client)
    assert stack.page("/healthz")
    assert stack.gateway.process.poll() is None
    assert stack.relays["node-a"].process.poll() is None
    assert is_served(stack.doors["echo"])


def test_connections_that_are_gone_before_they_are_served(stack: Stack) -> None:
    before = files(stack)
    for port in (stack.doors["echo"], stack.tunnel_port, stack.admin_port):
        for _ in range(200):
            sock = dial(port)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    assert is_served(stack.doors["echo"])
    wait_until(lambda: files(stack) <= before, 20, "all descriptors given back")


def test_at_descriptor_exhaustion_the_tunnel_stays(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    need("prlimit")
    stack = make_stack("echo")
    stack.start_gateway(prefix=("prlimit", "--nofile=100"))
    stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as client, contextlib.ExitStack() as crowd:
        say(client)
        for _ in range(CLIENTS):
            with contextlib.suppress(ConnectionResetError):
                crowd.enter_context(dial(stack.doors["echo"]))
        time.sleep(0.5)
        before_s = cpu_s(stack)
        time.sleep(2)
        busy = (cpu_s(stack) - before_s) / 2
        say(client, b"still here")
        stack.cutter.cut()  # a tunnel can be made anew: clients never get the last descriptors
        say(client, b"and after a cut")
        crowd.close()
        wait_until(lambda: is_served(stack.doors["echo"]), 20, "normal again")
    assert busy < 0.1, f"{busy:.1%} of a CPU"
    assert sum("pauses" in line for line in stack.logs().splitlines()) < 20


def test_streams_never_take_a_relays_last_descriptors(make_stack: Callable[..., Stack], echo_service: Service, home: Path) -> None:
    need("prlimit")
    stack = make_stack("echo")
    stack.start_gateway()
    stack.relay_prefix = ("prlimit", "--nofile=100")
    cluster = f'[cluster]\nstore = "sqlite:{home / "cluster.db"}"\npublish_s = 0.5\nstale_s = 20\ndown_s = 40\nresync_s = 1\n'
    relay = stack.start_relay("node-a", {"echo": echo_service.target}, cluster)

    with dial(stack.doors["echo"]) as client, contextlib.ExitStack() as crowd:
        say(client)
        served = 0
        for _ in range(CLIENTS):
            with contextlib.suppress(OSError, EOFError):
                other = crowd.enter_context(dial(stack.doors["echo"]))
                say(other)
                served += 1
        assert 20 <= served < CLIENTS
        assert psutil.Process(relay.pid).num_fds() <= 90
        stack.cutter.cut()
        say(client, b"and after a cut")
        assert json.loads(stack.relay_cli("node-a", "status", "--json").stdout), "whoever looks after it is still answered"
        crowd.close()
        wait_until(lambda: is_served(stack.doors["echo"]), 20, "normal again")
    log = relay.log.read_text()
    assert "with 100 files it is" in log
    assert "unable to open" not in log
    assert "Too many open files" not in log


def test_the_limits_of_one_source(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra="[limits]\nexempt_sources = []\nconnections_per_source = 10\n")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    with contextlib.ExitStack() as crowd:
        for _ in range(10):
            say(crowd.enter_context(dial(stack.doors["echo"])))
        assert visit(stack.doors["echo"])[0] == "reset"
        with dial(stack.doors["echo"], source="127.0.0.2") as other:
            say(other)
    wait_until(lambda: is_served(stack.doors["echo"]), 20, "the source served again")


def test_the_rate_of_one_source_and_the_size_of_a_door(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack(
        "echo",
        extra="[limits]\nexempt_sources = []\nconnections_per_door = 20\nopen_burst_per_source = 15\nopen_rate_per_source_per_s = 0.05\n",
    )
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    assert [is_served(stack.doors["echo"]) for _ in range(18)].count(True) in (15, 16)
    wait_until(lambda: not door_of(stack)["connections"], what="nobody at the door")
    with contextlib.ExitStack() as crowd:
        for number in range(20):
            say(crowd.enter_context(dial(stack.doors["echo"], source=f"127.0.2.{1 + number % 4}")))
        assert visit(stack.doors["echo"], source="127.0.2.9")[0] == "reset"
    assert {"door-full", "too-fast"} <= set(door_of(stack)["refused"])


@pytest.mark.slow
def test_a_crowd_that_never_reads_takes_nothing_from_the_others(
    make_stack: Callable[..., Stack], serve: Callable[..., Service], swap_service: Service
) -> None:
    def flood(sock: socket.socket) -> None:
        block = os.urandom(1 << 16)
        while True:
            sock.sendall(block)

    stack = make_stack("flood", "swap", "echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"flood": serve(flood).target, "swap": swap_service.target, "echo": serve(echo).target})
    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(dial(stack.doors["flood"]))
        assert exchanges(stack.doors["swap"], 8, 2 << 20).outcomes() == [Outcome.RIGHT] * 8
        assert is_served(stack.doors["echo"])
        for daemon in (stack.gateway, stack.relays["node-a"]):
            assert psutil.Process(daemon.pid).memory_info().rss < 256 << 20
