"""HTTP connections through a door, a tunnel and a relay: what clients and services may do, and what they may not."""

import gc
from contextlib import suppress

import trio
from peers import connect, pattern, receive_all, receive_exactly, reset, until_reset
from plane import SERVICE, Contexts, Plane, open_plane
from web_rig import OK, Canned, add_web_relay, ask, read_head, statuses

from fxrelay.web.exchange import MAX_INTERIM
from fxrelay.web.ports import WebLimits, WebRules
from tests.ports import free_port

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


async def web(plane: Plane, service: object, rules: WebRules | None = None, **more: object) -> int:
    """A door to an HTTP service; its port."""
    await add_web_relay(plane, await plane.serve(service), rules, **more)
    return plane.add_door()


async def test_pipelined_requests_are_answered_in_their_order(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        numbered = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number for number in range(5)]
        service = Canned(*numbered)
        port = await web(plane, service)
        posts = b"".join(b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n\r\n" % number for number in range(4))
        answer = await ask(port, posts + LAST)
        assert [part[-1:] for part in answer.split(b"HTTP/1.1")[1:]] == [b"0", b"1", b"2", b"3", b"4"]
        assert service.connections == 1
        assert [got.split()[1] for got in service.got] == [b"/0", b"/1", b"/2", b"/3", b"/"]


async def test_what_a_service_gets_of_a_request(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port = await web(plane, service)
        request = (
            b"GET /a?b=c HTTP/1.1\r\nhost: Name.Example:80\r\nConnection: close, X-Auth, X-Hop, foo\r\nX-Auth: 1\r\nFoo: bar\r\n"
            b"Keep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\nX-Forwarded-For: 6.6.6.6\r\nX_Forwarded_For: 6.6.6.6\r\n"
            b"Forwarded: for=6.6.6.6\r\n"
            b"X-Forwarded-User: root\r\nX-Real-IP: 6.6.6.6\r\nProxy: evil\r\nCookie: a=b\r\n\r\n"
        )
        assert statuses(await ask(port, request)) == [200]
        (head,) = service.got
        assert head == (
            b"GET /a?b=c HTTP/1.1\r\nHost: Name.Example:80\r\nX-Auth: 1\r\nCookie: a=b\r\nX-Forwarded-For: 127.0.0.1\r\n"
            b"X-Forwarded-Proto: http\r\nX-Forwarded-Host: Name.Example:80\r\nX-Real-IP: 127.0.0.1\r\n"
            b'Forwarded: for=127.0.0.1;proto=http;host="Name.Example:80"\r\n\r\n'
        )


async def test_a_body_that_breaks_off_is_a_reset(contexts: Contexts) -> None:
    endings = {
        "too short": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        "without its last chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalfXX",
    }
    async with open_plane(contexts) as plane:
        answers = list(endings.values())

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(answers.pop(0))
            await trio.sleep(0.05)
            await stream.send_eof()
            await trio.sleep(0.1)

        port = await web(plane, service)
        for name in endings:
            answer = await ask(port, LAST)
            assert answer.endswith(b"<RESET>"), name
            assert statuses(answer) == [200], name


async def test_a_service_that_resets_in_a_body_without_length_is_a_reset(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.0 200 OK\r\n\r\nhalf of it")
            await trio.sleep(0.05)
            reset(stream)

        port = await web(plane, service)
        for version in (b"1.1", b"1.0"):
            answer = await ask(port, b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version)
            assert b"half of it" in answer
            assert answer.endswith(b"<RESET>")


async def test_bodies_without_length_in_both_versions(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.0 200 OK\r\nX: y\r\n\r\nwhole")

        port = await web(plane, service)
        answer = await ask(port, LAST)
        assert b"Transfer-Encoding: chunked\r\n" in answer
        assert answer.endswith(b"\r\n\r\n5\r\nwhole\r\n0\r\n\r\n")
        answer = await ask(port, b"GET / HTTP/1.0\r\n\r\n")
        assert b"Transfer-Encoding" not in answer
        assert answer.endswith(b"Connection: close\r\n\r\nwhole")


async def test_interim_responses_and_100_continue(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            head, body = await read_head(stream)
            assert b"Expect: 100-continue" in head
            assert body == b""
            await stream.send_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            body = await receive_exactly(stream, 4)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

        port = await web(plane, service)
        async with await connect(port) as stream:
            await stream.send_all(b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n")
            first, rest = await read_head(stream)
            assert first == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
            if not rest:
                rest = await stream.receive_some()
            assert rest == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send_all(b"body")
            assert (await receive_all(stream)).endswith(b"\r\n\r\nbody")


async def test_as_many_interim_responses_as_are_taken_and_one_more(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        counts = [MAX_INTERIM, MAX_INTERIM + 1]

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 102 Processing\r\n\r\n" * counts.pop(0) + OK)

        port = await web(plane, service)
        assert statuses(await ask(port, LAST)) == [102] * MAX_INTERIM + [200]
        assert statuses(await ask(port, LAST)) == [102] * MAX_INTERIM + [502]


async def test_an_early_response_ends_the_connection_after_it(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\n\r\nbig!")
            await trio.sleep(0.2)

        port = await web(plane, service)
        answer = await ask(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + bytes(50_000))
        assert statuses(answer) == [413]
        assert b"Connection: close" in answer
        assert answer.endswith(b"big!")


async def test_bodies_stream_both_ways_at_once(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def echoing(stream: trio.SocketStream) -> None:
            head, body = await read_head(stream)
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
            while length:
                if body:
                    await stream.send_all(body)
                    length -= len(body)
                body = await stream.receive_some() if length else b""

        port = await web(plane, echoing)
        data = pattern(3_000_000)
        async with await connect(port) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(
                stream.send_all, b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            _, rest = await read_head(stream)
            assert rest + await receive_all(stream) == data


async def test_an_idle_connection_that_the_service_closed_is_replaced(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        served: list[bytes] = []

        async def service(stream: trio.SocketStream) -> None:
            head, _ = await read_head(stream)
            served.append(head.split()[0])
            await stream.send_all(OK)
            # It takes the next request and closes without a word: as a service does whose idle time is over at that moment.
            await stream.receive_some(1)

        port = await web(plane, service)
        async with await connect(port) as stream:
            for _ in range(3):
                await stream.send_all(GET)
                assert await receive_exactly(stream, len(OK)) == OK
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            # Nobody knows whether the service has acted on that one.
            assert statuses(await receive_all(stream)) in ([502], [200])
        assert served[:3] == [b"GET"] * 3


async def test_services_that_do_not_answer(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def silent(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await trio.sleep(1)

        port = await web(plane, silent, WebRules(SERVICE, response_timeout_s=0.2))
        answer = await ask(port, LAST)
        assert statuses(answer) == [504]
        assert b"trace " in answer
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned(None))
        answer = await ask(port, b"GET / HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\nConnection: close\r\n\r\n")
        assert statuses(answer) == [502]
        assert b'{"error": {"name": "BadGateway"' in answer


async def test_a_service_that_does_not_listen_is_a_502(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await add_web_relay(plane, free_port())
        assert statuses(await ask(plane.add_door(), LAST)) == [502]


async def test_a_byte_at_a_time_is_fine_as_long_as_it_ends(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned(), limits=WebLimits(head_timeout_s=60.0))
        async with await connect(port) as stream:
            for byte in b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n":
                await stream.send_all(bytes((byte,)))
                await trio.sleep(0.002)
            assert (await receive_all(stream)).endswith(b"ok")


async def test_slow_clients(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned())
        assert statuses(await ask(port, GET[:-2])) == [408]
        assert await ask(port, b"") == b""
        answer = await ask(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
        assert statuses(answer) == [200]  # this service answers before it has the body


async def test_a_client_that_leaves_frees_the_service(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        asked, gone = trio.Event(), trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            asked.set()
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
            gone.set()

        port = await web(plane, service)
        stream = await connect(port)
        await stream.send_all(GET)
        with trio.fail_after(10):
            await asked.wait()
            reset(stream)
            await gone.wait()


async def test_half_closed_clients_get_their_answer(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned())
        assert (await ask(port, GET, ends=True)).endswith(b"ok")
        assert statuses(await ask(port, GET * 3, ends=True)) == [200] * 3


async def test_old_clients_may_keep_their_connection(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned())
        async with await connect(port) as stream:
            for _ in range(2):
                await stream.send_all(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                head, rest = await read_head(stream)
                assert b"Connection: keep-alive\r\n" in head
                assert rest or await receive_exactly(stream, 2)
        assert (await ask(port, b"GET / HTTP/1.0\r\n\r\n")).endswith(b"Connection: close\r\n\r\nok")


async def test_hosts_and_sizes(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port = await web(plane, service, WebRules(SERVICE, hosts=("a", "*.b.example"), max_body_bytes=5))
        for host, status in (
            (b"a", 200),
            (b"A.:80", 200),
            (b"x.b.example", 200),
            (b"b.example", 421),
            (b"evilb.example", 421),
            (b"c", 421),
        ):
            assert statuses(await ask(port, b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host)) == [status], host
        assert statuses(await ask(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n123456")) == [413]
        chunks = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n123456\r\n0\r\n\r\n"
        assert statuses(await ask(port, chunks)) == [413]


async def test_draining_answers_what_was_asked_and_no_more(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        asked, go_on = trio.Event(), trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            asked.set()
            await go_on.wait()
            await stream.send_all(OK)

        _, desk = await add_web_relay(plane, await plane.serve(service))
        port = plane.add_door()
        async with await connect(port) as idle, await connect(port) as busy:
            await busy.send_all(GET)
            with trio.fail_after(10):
                await asked.wait()
                while len(desk.connections) < 2:
                    await trio.sleep(0.01)
            desk.drain()
            assert await receive_all(idle) == b""
            go_on.set()
            assert (await receive_all(busy)).endswith(b"ok")
        gc.collect()


async def test_streams_are_reset_when_the_relay_stops(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            await stream.receive_some()

        _, desk = await add_web_relay(plane, await plane.serve(service))
        port = plane.add_door()
        stream = await connect(port)
        await stream.send_all(GET)
        await read_head(stream)
        desk.abort_all()
        await until_reset(stream, 2)


async def test_a_client_that_stops_reading_stops_the_service_and_is_given_up(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        sent = 0
        ended = trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            nonlocal sent
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            with suppress(trio.BrokenResourceError):
                while sent < 100_000_000:
                    await stream.send_all(bytes(65_536))
                    sent += 65_536
            ended.set()

        port = await web(plane, service)
        stream = await connect(port)
        await stream.send_all(GET)
        with trio.fail_after(8):
            await ended.wait()
        assert sent < 32_000_000  # what fits into the kernel's buffers on the way, and one window
        found = await until_reset(stream, 5)
        assert len(found) < sent
