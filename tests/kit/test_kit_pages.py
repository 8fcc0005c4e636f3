import contextlib
import errno
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fxtunnel.errors import FxError
from fxtunnel.kit import page_clients, pages
from fxtunnel.kit.listeners import ListenError
from fxtunnel.kit.pages import fetch_json, serve_pages
from fxtunnel.kit.settings import Address

ANYWHERE = Address.parse("127.0.0.1:0")


async def status(request: Request) -> Response:
    return JSONResponse({"relay": "node-a", "path": request.url.path})


async def broken(request: Request) -> Response:
    raise RuntimeError("a bug")


async def huge(request: Request) -> Response:
    return PlainTextResponse(b"x" * (32 << 20))


async def numbers(request: Request) -> Response:
    return JSONResponse([1, 2])


APP = Starlette(routes=[Route("/status", status), Route("/broken", broken), Route("/huge", huge), Route("/numbers", numbers)])


async def ask(address: Address, path: str = "/status") -> dict[str, object]:
    return await trio.to_thread.run_sync(fetch_json, address, path, 5.0)


def exchange(address: Address, data: bytes) -> bytes:
    assert address.host is not None
    with socket.create_connection((address.host, address.port), timeout=30) as sock:
        sock.sendall(data)
        try:
            return b"".join(iter(lambda: sock.recv(65536), b""))
        except ConnectionResetError:
            return b""


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    return ANYWHERE if request.param == "tcp" else Address(path=tmp_path / "status.sock")


async def test_serves_over_tcp_and_unix_sockets(address: Address) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, address)
            assert bound == address or (bound.port or 0) > 0
            assert await ask(bound) == {"relay": "node-a", "path": "/status"}
            nursery.cancel_scope.cancel()


async def test_a_unix_socket_is_ours_alone_replaces_a_stale_one_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "status.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    before = os.umask(0o022)
    os.umask(before)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_pages, APP, Address(path=path))
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert await ask(Address(path=path))
            with pytest.raises(ListenError, match="in use"):
                await serve_pages(APP, Address(path=path))
            assert await ask(Address(path=path)), "the second one left the first one's socket alone"
            nursery.cancel_scope.cancel()
    assert not path.exists()
    assert os.umask(before) == before


async def test_a_socket_in_use_is_said_without_talk_of_ports(tmp_path: Path) -> None:
    path = Address(path=tmp_path / "status.sock")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_pages, APP, path)
        with pytest.raises(ListenError, match=r"it is in use; stop the other process \(ss -lxp shows it\)$"):
            await serve_pages(APP, path)
        nursery.cancel_scope.cancel()


async def test_a_port_in_use_is_said() -> None:
    async with trio.open_nursery() as nursery:
        bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
        with pytest.raises(ListenError, match=rf"{bound}: it is in use"):
            await serve_pages(APP, bound)
        nursery.cancel_scope.cancel()


async def test_a_page_that_fails_and_bytes_that_are_no_http_hurt_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "IDLE_S", 0.2)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            with pytest.raises(FxError, match="status 500"):
                await ask(bound, "/broken")
            for data in (
                b"\x16\x03\x01\x02\x00" + bytes(600),
                b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
                b"GET /status HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: \xff\r\n\r\n",
                b"GET /status HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nHTTP2-Settings: \xff!\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
                b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n",
                b"",
            ):
                await trio.to_thread.run_sync(exchange, bound, data + b"\r\n\r\n")
            assert await ask(bound)
            nursery.cancel_scope.cancel()
    assert all(record.levelno < logging.ERROR or record.name in ("hypercorn.error", "fxtunnel.kit.pages") for record in caplog.records)


async def test_an_unexpected_error_ends_one_connection_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run, errors = page_clients.TCPServer.run, [UnicodeError("x"), ExceptionGroup("several", [ValueError("y")]), RecursionError()]

    async def fail(server: page_clients.TCPServer) -> None:
        if errors:
            await trio.lowlevel.checkpoint()
            raise errors.pop()
        await run(server)

    monkeypatch.setattr(page_clients.TCPServer, "run", fail)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            for _ in range(3):
                with pytest.raises(FxError):
                    await ask(bound)
            assert await ask(bound)
            nursery.cancel_scope.cancel()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == ["a connection to the pages failed"] * 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.EMFILE])
async def test_an_error_of_accept_ends_nothing(number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pages, "PAUSE_S", 0.01)
    failures, accept = [OSError(number, os.strerror(number))] * 2, trio.SocketListener.accept

    async def fail(listener: trio.SocketListener) -> trio.SocketStream:
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", fail)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            assert (await ask(bound))["relay"] == "node-a"
            nursery.cancel_scope.cancel()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


async def test_cancelling_hangs_up_on_idle_clients_and_on_one_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "IDLE_S", 60)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            idle = socket.create_connection((bound.host, bound.port))
            deaf = socket.create_connection((bound.host, bound.port))
            deaf.sendall(b"GET /huge HTTP/1.1\r\nHost: a\r\n\r\n")
            await trio.lowlevel.wait_readable(deaf)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    for sock in (idle, deaf):
        sock.close()


async def test_more_connections_than_allowed_are_closed_and_room_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While all of them have answers to take, which are not cut off for it."""
    monkeypatch.setattr(page_clients, "MAX_CONNECTIONS", 2)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            held = [deaf_client(bound) for _ in range(2)]
            for sock in held:
                await trio.lowlevel.wait_readable(sock)
            with pytest.raises(FxError):
                await ask(bound)
            for sock in held:
                assert sock.recv(12) == b"HTTP/1.1 200"
                sock.close()
            while True:  # until it has seen that they are gone
                try:
                    assert await ask(bound)
                    break
                except FxError:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()


async def test_who_has_asked_nothing_for_the_longest_time_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle connections of somebody on this host kept everybody else out, until their time was over and they came again."""
    monkeypatch.setattr(page_clients, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(pages, "IDLE_S", 60)
    with trio.fail_after(10), contextlib.ExitStack() as crowd:
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            asking, half = [crowd.enter_context(socket.create_connection((bound.host, bound.port))) for _ in range(2)]
            half.sendall(b"GET /status HTTP/1.1\r\nHost")
            assert await say(asking, b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await ask(bound)
            assert not await say(half, b""), "it has come after the other one, but that one has asked since"
            assert await say(asking, b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n")
            for _ in range(20):
                for _ in range(5):
                    crowd.enter_context(socket.create_connection((bound.host, bound.port)))
                assert await ask(bound)
            nursery.cancel_scope.cancel()


async def test_who_does_not_take_his_answer_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some dozens of them kept everybody else out for good."""
    monkeypatch.setattr(page_clients, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(page_clients, "ANSWER_S", 0.2)
    monkeypatch.setattr(page_clients, "LOOK_S", 0.05)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            with deaf_client(bound) as deaf:
                await trio.lowlevel.wait_readable(deaf)
                with pytest.raises(FxError):
                    await ask(bound)
                await trio.sleep(0.5)
                assert await ask(bound)
            nursery.cancel_scope.cancel()


def deaf_client(address: Address) -> socket.socket:
    sock = socket.create_connection((address.host, address.port))
    sock.sendall(b"GET /huge HTTP/1.1\r\nHost: a\r\n\r\n")
    return sock


async def say(sock: socket.socket, data: bytes) -> bytes:
    """What is answered; nothing, if it was hung up on."""
    sock.sendall(data)
    answer = b""
    try:
        while not answer.endswith(b"}"):
            await trio.lowlevel.wait_readable(sock)
            more = sock.recv(65536)
            if not more:
                break
            answer += more
    except ConnectionResetError:
        pass
    return answer


def test_it_works_while_trio_is_a_guest_of_another_loop() -> None:
    calls: list[Callable[[], object]] = []
    some = threading.Semaphore(0)
    outcomes: list[object] = []

    def schedule(call: Callable[[], object]) -> None:
        calls.append(call)
        some.release()

    async def main() -> dict[str, object]:
        async with trio.open_nursery() as nursery:
            bound: Address = await nursery.start(serve_pages, APP, ANYWHERE)
            answer = await ask(bound)
            nursery.cancel_scope.cancel()
        return answer

    def done(outcome: object) -> None:
        outcomes.append(outcome)
        some.release()

    trio.lowlevel.start_guest_run(main, run_sync_soon_threadsafe=schedule, done_callback=done)
    ends = time.monotonic() + 60
    while not outcomes and time.monotonic() < ends:
        some.acquire(timeout=1)
        while calls:
            calls.pop(0)()
    assert outcomes[0].unwrap() == {"relay": "node-a", "path": "/status"}


@pytest.fixture
def replying() -> Iterator[Callable[[bytes], Address]]:
    """Starts a server that answers one request with given bytes and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def start(reply: bytes) -> Address:
        def run() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                if reply:
                    sock.sendall(reply)
                else:
                    time.sleep(0.3)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return Address(*listener.getsockname())

    with listener:
        yield start
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"SSH-2.0-x\r\n", "not HTTP"),
        (b"HTTP/1.1 503 no\r\nContent-Length: 2\r\n\r\n{}", "status 503"),
        (b"HTTP/1.1 200 ok\r\nContent-Length: 1\r\n\r\n{", "in JSON"),
        (b"HTTP/1.1 200 ok\r\nContent-Length: 2\r\n\r\n[]", "JSON object"),
        (b"HTTP/1.1 200 ok\r\nContent-Length: 9\r\n\r\n{}", "cut short"),
        (b"", "in time"),
    ],
)
def test_a_wrong_answer_is_one_clear_error(replying: Callable[[bytes], Address], reply: bytes, text: str) -> None:
    with pytest.raises(FxError, match=text):
        fetch_json(replying(reply), "/status", 0.1 if not reply else 5)


def test_nobody_there_is_one_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        free = Address(*sock.getsockname())
    with pytest.raises(FxError, match=os.strerror(errno.ECONNREFUSED)):
        fetch_json(free, "/status", 1)
    with pytest.raises(FxError, match=os.strerror(errno.ENOENT)):
        fetch_json(Address(path=tmp_path / "gone"), "/status", 1)
