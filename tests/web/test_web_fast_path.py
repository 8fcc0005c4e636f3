"""Requests that the pump serves without a task: the same bytes both ways, the same refusals; what is not simple goes to the task."""

import logging

import pytest
import trio
from delivery_rig import NOBODY, Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import connect, receive_all, receive_exactly, reset, until_reset
from plane import SERVICE, Contexts, Plane, open_plane
from test_web_pools import serve_names
from test_web_smuggling import OTHERS, SMUGGLING
from web_rig import OK, Canned, NamingChooser, add_web_relay, read_head, statuses

from fxrelay.web.connection import WebConnection
from fxrelay.web.desk import WebDesk
from fxrelay.web.heads import BadHead, HeadScanner
from fxrelay.web.ports import WebLimits, WebRules

GET = b"GET /%d HTTP/1.1\r\nHost: a\r\nX-Kept: 1\r\n\r\n"


@pytest.fixture
def by_task(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The heads that tasks were given to serve."""
    seen: list[bytes] = []
    answer = WebConnection._answer

    async def noting(self: WebConnection, raw: bytes, handed: object) -> bool:
        seen.append(raw)
        return await answer(self, raw, handed)

    monkeypatch.setattr(WebConnection, "_answer", noting)
    return seen


async def web(plane: Plane, service: object, rules: WebRules | None = None, **more: object) -> tuple[int, WebDesk]:
    """A door to an HTTP service: its port, and the relay's desk."""
    _, desk = await add_web_relay(plane, await plane.serve(service), rules, **more)
    return plane.add_door(), desk


async def turn(stream: trio.SocketStream, request: bytes, answer: bytes) -> None:
    """One request and the answer that must come to it."""
    await stream.send_all(request)
    with trio.fail_after(8):
        assert await receive_exactly(stream, len(answer)) == answer


async def test_a_service_gets_the_same_from_the_pump_as_from_a_task(contexts: Contexts, by_task: list[bytes]) -> None:
    async with open_plane(contexts) as plane:
        bodiless = OK.removesuffix(b"ok")
        service = Canned(OK, OK, OK, bodiless)
        port, _ = await web(plane, service)
        async with await connect(port) as stream:
            for number in range(3):
                await turn(stream, GET % number, OK)
            await turn(stream, b"HEAD /h?q HTTP/1.1\r\nHost: a\r\nX-Kept: 1\r\n\r\n", bodiless)
            await turn(stream, b"GET /%d HTTP/1.1\r\nHost: b\r\nX-Forwarded-For: 6.6.6.6\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\r\n" % 4, OK)
        assert by_task == [b"GET /0 HTTP/1.1\r\nHost: a\r\nX-Kept: 1"], "the first one makes the connection to the service"
        first, second, third, head, other = service.got
        assert second == first.replace(b"/0", b"/1")
        assert third == first.replace(b"/0", b"/2")
        assert head == first.replace(b"GET /0", b"HEAD /h?q")
        assert b"X-Forwarded-For: 127.0.0.1\r\n" in other
        assert b"6.6.6.6" not in other
        assert b"Connection" not in other
        assert b"Host: b\r\n" in other
        assert b"X-Kept" not in other
        assert service.connections == 1


async def test_values_that_change_reach_the_service_without_a_task(contexts: Contexts, by_task: list[bytes]) -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX-Request: %b\r\nAccept: */*\r\n\r\n"
    async with open_plane(contexts) as plane:
        service = Canned()
        port, _ = await web(plane, service)
        async with await connect(port) as stream:
            for value in (b"1", b"2", b"three"):
                await turn(stream, head % value, OK)
            await stream.send_all(head % b"4\0" + head % b"5")
            assert statuses(await receive_all(stream)) == [400]
        assert by_task == [(head % value).removesuffix(b"\r\n\r\n") for value in (b"1", b"4\0")]
        first, second, third = service.got
        assert second == first.replace(b"X-Request: 1", b"X-Request: 2")
        assert third == first.replace(b"X-Request: 1", b"X-Request: three")


ANSWERS = {
    "length": b"HTTP/1.1 200 OK\r\nX: 1\r\nContent-Length: 3\r\n\r\nabc",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "nothing": b"HTTP/1.1 204 No Content\r\nX: 1\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n",
    "per connection": b"HTTP/1.1 404 Not Found\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 1\r\n\r\nx",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
    "closes": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
    "old": b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
    "large": b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000,
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
async def test_an_answer_is_the_same_from_the_pump_as_from_a_task(contexts: Contexts, name: str, is_cut: bool) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            while (await read_head(stream))[0]:
                answer = ANSWERS[name]
                if is_cut:
                    for at in range(0, len(answer) - 1, 30_011):
                        await stream.send_all(answer[at : at + 1])
                        await trio.sleep(0.005)
                        await stream.send_all(answer[at + 1 : at + 30_011])
                else:
                    await stream.send_all(answer)
                if name == "closes":
                    return

        port, _ = await web(plane, service)
        answers = []
        for count in (1, 3):  # a connection whose only request a task serves, and one whose last request the pump may serve
            async with await connect(port) as stream:
                for number in range(count):
                    await stream.send_all(GET % number)
                    whole = answers[0] if answers else b""
                    with trio.move_on_after(8 if whole else 1):
                        received = b""
                        while not whole or len(received) < len(whole):
                            received += await stream.receive_some()
                answers.append(received)
        assert answers[1] == answers[0]
        assert statuses(answers[0])


async def test_smuggling_shapes_are_refused_behind_simple_requests(contexts: Contexts, by_task: list[bytes]) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port, _ = await web(plane, service)
        for name, (request, status) in {name: (request, 400) for name, request in SMUGGLING.items()}.items() | OTHERS.items():
            async with await connect(port) as stream:
                await turn(stream, GET % 1, OK)
                await turn(stream, GET % 2, OK)
                await stream.send_all(request + GET % 3)
                answer = await receive_all(stream)
                assert statuses(answer) == [status], name
                assert b"Connection: close" in answer, name
        assert {got.split()[1] for got in service.got} == {b"/1", b"/2"}
        assert not any(raw.startswith(b"GET /2 ") for raw in by_task)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"HTTP/1.1 200 OK\nContent-Length: 1\r\n\r\nx", [502]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\nx", [502]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [502]),
        (b"HTTP/1.1 200 OK\r\nX : 1\r\nContent-Length: 1\r\n\r\nx", [502]),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", [502]),
        (b"\x00\x01garbage\r\n\r\n", [502]),
    ],
)
async def test_a_bad_answer_is_the_services_fault(contexts: Contexts, answer: bytes, seen: list[int]) -> None:
    async with open_plane(contexts) as plane:
        port, _ = await web(plane, Canned(OK, OK, answer))
        async with await connect(port) as stream:
            await turn(stream, GET % 1, OK)
            await turn(stream, GET % 2, OK)
            await stream.send_all(GET % 3)
            _, rest = await read_head(stream)
            assert rest
            stream.socket.shutdown(1)


@pytest.mark.parametrize("ending", [b"Content-Length: 9\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalfXX"])
async def test_a_body_that_breaks_off_is_a_reset(contexts: Contexts, ending: bytes) -> None:
    async with open_plane(contexts) as plane:
        port, _ = await web(plane, Canned(OK, OK, b"HTTP/1.1 200 OK\r\n" + ending, None))
        async with await connect(port) as stream:
            await turn(stream, GET % 1, OK)
            await turn(stream, GET % 2, OK)
            await stream.send_all(GET % 3 + GET % 4)
            assert statuses(await until_reset(stream, 5)) == [200]


async def test_a_service_that_has_closed_is_asked_again_once(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned(OK, OK, None)
        port, _ = await web(plane, service)
        async with await connect(port) as stream:
            for number in range(4):
                await turn(stream, GET % number, OK)
        assert [got.split()[1] for got in service.got] == [b"/0", b"/1", b"/2", b"/2", b"/3"]
        assert service.connections == 2


async def test_what_a_service_says_unasked_is_no_answer(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        said = trio.Event()
        wrong = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
        connections = 0

        async def service(stream: trio.SocketStream) -> None:
            nonlocal connections
            connections += 1
            while (await read_head(stream))[0]:
                await stream.send_all(OK)
                if connections == 1:
                    await trio.sleep(0.05)
                    await stream.send_all(wrong)
                    said.set()

        port, _ = await web(plane, service)
        async with await connect(port) as stream:
            await turn(stream, GET % 1, OK)
            await said.wait()
            await trio.sleep(0.1)
            await turn(stream, GET % 2, OK)
        assert connections == 2


async def test_a_service_that_does_not_answer(contexts: Contexts, by_task: list[bytes]) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            for _ in range(3):
                await read_head(stream)
                await stream.send_all(OK)
            await trio.sleep_forever()

        limits = WebLimits(keep_alive_s=3_600)  # while nothing is asked the task sleeps for that long
        port, _ = await web(plane, service, WebRules(SERVICE, response_timeout_s=0.3), limits=limits)
        async with await connect(port) as stream:
            for number in range(3):
                await turn(stream, GET % number, OK)
            assert len(by_task) == 1
            await stream.send_all(GET % 3)
            with trio.fail_after(8):
                head, _ = await read_head(stream)
            assert statuses(head) == [504]


async def test_an_idle_client_is_let_go_in_order(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, desk = await web(plane, Canned(), limits=WebLimits(keep_alive_s=0.3))
        async with await connect(port) as stream:
            await turn(stream, GET % 1, OK)
            await turn(stream, GET % 2, OK)
            with trio.fail_after(5):
                assert await receive_all(stream) == b""
        with trio.fail_after(5):
            while desk.connections:
                await trio.sleep(0.01)


async def test_draining_ends_idle_connections_and_those_that_are_answered(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        asked, goes_on = trio.Event(), trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            while (head := (await read_head(stream))[0]) != b"":
                if b"/slow" in head:
                    asked.set()
                    await goes_on.wait()
                await stream.send_all(OK)

        port, desk = await web(plane, service)
        async with await connect(port) as idle, await connect(port) as asking:
            for stream in (idle, asking):
                await turn(stream, GET % 1, OK)
                await turn(stream, GET % 2, OK)
            await asking.send_all(b"GET /slow HTTP/1.1\r\nHost: a\r\nX-Kept: 1\r\n\r\n")
            with trio.fail_after(5):
                await asked.wait()
                desk.drain()
                assert await receive_all(idle) == b""
                goes_on.set()
                answer = await receive_all(asking)
            assert statuses(answer) == [200]
            assert b"Connection: close\r\n" in answer
            assert answer.endswith(b"ok")


async def test_a_client_that_leaves_takes_its_request_along(contexts: Contexts, by_task: list[bytes]) -> None:
    async with open_plane(contexts) as plane:
        asked, gone = trio.Event(), trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            for _ in range(2):
                await read_head(stream)
                await stream.send_all(OK)
            await read_head(stream)
            asked.set()
            try:
                await stream.receive_some()
            except trio.BrokenResourceError:
                gone.set()

        port, desk = await web(plane, service)
        stream = await connect(port)
        await turn(stream, GET % 1, OK)
        await turn(stream, GET % 2, OK)
        await stream.send_all(GET % 3)
        with trio.fail_after(5):
            await asked.wait()
            assert len(by_task) == 1
            reset(stream)
            await gone.wait()
            while desk.connections:
                await trio.sleep(0.01)


async def test_heads_in_pieces_and_in_a_row(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port, _ = await web(plane, service)
        async with await connect(port) as stream:
            await turn(stream, GET % 1, OK)
            request = GET % 2
            await stream.send_all(request[:20])
            await trio.sleep(0.05)
            await turn(stream, request[20:] + GET % 3 + GET % 4, OK + OK + OK)
            await turn(stream, GET % 5, OK)
        assert [got.split()[1] for got in service.got] == [b"/1", b"/2", b"/3", b"/4", b"/5"]


async def test_an_upgrade_behind_simple_requests(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

        async def service(stream: trio.SocketStream) -> None:
            for answer in (OK, OK, switch):
                await read_head(stream)
                await stream.send_all(answer)
            async for data in stream:
                await stream.send_all(data.upper())

        port, _ = await web(plane, service)
        async with await connect(port) as stream:
            await turn(stream, GET % 1, OK)
            await turn(stream, GET % 2, OK)
            await stream.send_all(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            head, rest = await read_head(stream)
            assert head.startswith(b"HTTP/1.1 101 ")
            assert not rest
            for _ in range(3):
                await turn(stream, b"hello", b"HELLO")


async def test_a_plan_for_one_node_is_none_for_another_path(contexts: Contexts, by_task: list[bytes]) -> None:
    async with open_plane(contexts) as plane:
        port, got = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        rules = WebRules(SERVICE, node_paths=True)
        await add_web_relay(plane, port, rules, chooser=chooser, host=NOBODY, is_pool=True)
        async with await connect(plane.add_door()) as stream:
            for node in ("n3", "n2", "n3", "n3", "n2"):
                await stream.send_all(f"GET /node/{node}/x HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                await receive_exactly(stream, 47)
        assert [len(got[host]) for host in ("127.0.0.2", "127.0.0.3")] == [2, 3]
        assert len(by_task) == 5


async def test_each_request_is_in_the_access_log(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        port, _ = await web(plane, Canned())
        with caplog.at_level(logging.INFO, "fxrelay.access"):
            async with await connect(port) as stream:
                for number in range(3):
                    await turn(stream, (GET % number).replace(b" HTTP", b"?secret HTTP"), OK)
        first, second, third = [record.__dict__ for record in caplog.records if record.name == "fxrelay.access"]
        for key in ("trace", "service", "client", "method", "host", "status", "node", "way", "bytes_in", "bytes_out", "upgraded", "why"):
            assert first[key] == second[key] == third[key], key
        assert [record["path"] for record in (first, second, third)] == ["/0", "/1", "/2"]
        assert third["first_byte_ms"] is not None


@settings(max_examples=400)
@given(
    st.lists(st.sampled_from([b"GET / HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host: a", b" x", b"\t", b"\r\n\r\n", b"a" * 9_000])),
    st.booleans(),
)
def test_a_head_in_one_piece_is_what_the_scanner_finds(pieces: list[bytes], begins: bool) -> None:
    data = (b"GET / HTTP/1.1\r\n" if begins else b"") + b"".join(pieces)
    end = HeadScanner().whole_head(data)
    scanner = HeadScanner()
    scanner.feed(data)
    try:
        head = scanner.next_head()
    except BadHead:
        assert end < 0
        return
    if end >= 0:
        assert head == data[:end]
        assert scanner.take_rest() == data[end + 4 :]
