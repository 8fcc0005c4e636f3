"""System: nginx, redis and a service on a unix socket, each talked to through a door while the tunnel is cut."""

import contextlib
import hashlib
import http.client
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.peers import MIB, Service, dial, echo, payload, read_exactly
from tests.system.servers import nginx_server, random_file, redis_server
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("servers")]

FILE_BYTES = 256 * MIB
CLIENTS = 64
REQUESTS = 30
COMMANDS = 100_000


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    with nginx_server(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="module")
def web(nginx: tuple[int, Path], make_shared_stack: Callable[..., Stack]) -> Stack:
    stack = make_shared_stack("web")
    stack.start_gateway()
    stack.start_relay("node-a", {"web": f"127.0.0.1:{nginx[0]}"})
    return stack


@contextlib.contextmanager
def cut_every(stack: Stack, period_s: float) -> Iterator[list[int]]:
    """Cut the tunnel again and again for as long as the block runs; how many connections each cut ended."""
    stop = threading.Event()
    cuts: list[int] = []

    def cut() -> None:
        while not stop.wait(period_s):
            cuts.append(stack.cutter.cut())

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        yield cuts
    finally:
        stop.set()
        thread.join()


def test_a_download_from_nginx_survives_cuts(web: Stack, nginx: tuple[int, Path]) -> None:
    expected = random_file(nginx[1] / "large", FILE_BYTES)
    digest = hashlib.sha256()
    received_bytes, cuts = 0, 0
    with urllib.request.urlopen(f"http://127.0.0.1:{web.doors['web']}/large", timeout=30) as answer:
        while block := answer.read(1 << 18):
            digest.update(block)
            received_bytes += len(block)
            if received_bytes > FILE_BYTES // 4 * (cuts + 1) and cuts < 3:
                assert web.cutter.cut() >= 1
                cuts += 1
    (nginx[1] / "large").unlink()
    assert (received_bytes, digest.hexdigest(), cuts) == (FILE_BYTES, expected, 3)


def test_keep_alive_clients_do_not_notice_cuts(web: Stack, nginx: tuple[int, Path]) -> None:
    (nginx[1] / "small").write_bytes(payload(1, 10_000))

    def talk() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", web.doors["web"], timeout=30)
        with contextlib.closing(connection):
            connection.connect()
            sock = connection.sock
            for _ in range(REQUESTS):
                connection.request("GET", "/small")
                assert connection.getresponse().read() == payload(1, 10_000)
                assert connection.sock is sock, "the connection was made anew"
                time.sleep(0.05)
        return REQUESTS

    with cut_every(web, 0.7) as cuts, ThreadPoolExecutor(CLIENTS) as pool:
        assert [talked.result() for talked in [pool.submit(talk) for _ in range(CLIENTS)]] == [REQUESTS] * CLIENTS
    assert cuts


def test_redis_keeps_a_pipeline_in_order_across_cuts(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    stack = make_stack("redis")
    with redis_server(tmp_path / "redis") as port:
        stack.start_gateway()
        stack.start_relay("node-a", {"redis": f"127.0.0.1:{port}"})
        with dial(stack.doors["redis"]) as client, client.makefile("rb") as answers, cut_every(stack, 0.4) as cuts:

            def send() -> None:
                for number in range(0, COMMANDS, 500):
                    client.sendall(b"".join(b"INCR counter\r\nECHO %d\r\n" % n for n in range(number, number + 500)))
                    time.sleep(0.005)

            sender = threading.Thread(target=send)
            sender.start()
            for number in range(COMMANDS):
                assert answers.readline() == b":%d\r\n" % (number + 1)
                text = b"%d" % number
                assert answers.readline() + answers.readline() == b"$%d\r\n%s\r\n" % (len(text), text)
            sender.join()
        assert len(cuts) >= 2


def test_a_service_on_a_unix_socket(make_stack: Callable[..., Stack], serve: Callable[..., Service], home: Path) -> None:
    service = serve(echo, home / "echo.sock")
    stack = make_stack("echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": service.target})
    with dial(stack.doors["echo"]) as client:
        sender = threading.Thread(target=client.sendall, args=(payload(1, MIB),))
        sender.start()
        assert read_exactly(client, MIB) == payload(1, MIB)
        sender.join()
