"""Requests that two readers could take for different things are refused, and whatever is behind them is not served."""

import logging

import pytest
import trio
from plane import Contexts, Plane, open_plane
from web_rig import Canned, add_web_relay, ask, read_head, statuses

LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

SMUGGLING = {
    "both lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, other order": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "the same length twice": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc",
    "a signed length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
    "a hexadecimal length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\nabc",
    "folded field": b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n Transfer-Encoding: chunked\r\n\r\n",
    "folded first field": b"GET / HTTP/1.1\r\n X: 1\r\nHost: a\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "one bare LF": b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\nY: 2\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\rY: 2\r\n\r\n",
    "LF before the empty line": b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\nabc",
    "empty name": b"GET / HTTP/1.1\r\nHost: a\r\n: 3\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\r\n\r\n",
    "NUL in a field": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "target and host differ": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with a space": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with a fragment": b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    "no origin form": b"GET evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an upgrade with a body": UPGRADE[:-2] + b"Content-Length: 3\r\n\r\nabc",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}
OTHERS = {
    "gzip, chunked": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "xchunked": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
    "chunked twice": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    "CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 405),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "a long target": (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "a long head": (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9_000 + b"\r\n\r\n", 431),
    "many fields": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 70 + b"\r\n", 431),
}
BAD_CHUNKS = {
    "terminator": b"3\r\nabcXX0\r\n\r\n",
    "size": b"zz\r\nabc\r\n0\r\n\r\n",
    "negative size": b"-3\r\nabc\r\n0\r\n\r\n",
    "size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "huge size": b"fffffffffffffffff\r\nabc",
    "bare LF": b"3\nabc\r\n0\r\n\r\n",
    "bare LF in an extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "long extension": b"3;" + b"a" * 5_000 + b"\r\nabc\r\n0\r\n\r\n",
    "trailer without colon": b"3\r\nabc\r\n0\r\nevil\r\n\r\n",
    "folded trailer": b"3\r\nabc\r\n0\r\nX: 1\r\n Y\r\n\r\n",
    "LF behind the trailers": b"3\r\nabc\r\n0\r\n\n",
    "many trailers": b"0\r\n" + b"X: 1\r\n" * 3_000 + b"\r\n",
}


async def web(plane: Plane, service: object) -> int:
    """A door to an HTTP service; its port."""
    await add_web_relay(plane, await plane.serve(service))
    return plane.add_door()


async def test_smuggling_shapes_are_refused_and_nothing_behind_them_is_served(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port = await web(plane, service)
        for name, request in SMUGGLING.items():
            answer = await ask(port, request + LAST)
            assert statuses(answer) == [400], name
            assert b"Connection: close" in answer, name
        for name, (request, status) in OTHERS.items():
            assert statuses(await ask(port, request + LAST)) == [status], name
        assert service.got == []
        assert statuses(await ask(port, LAST)) == [200]


async def test_what_is_refused_is_in_the_access_log_once(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned())
        for number, request in enumerate([SMUGGLING["both lengths"], SMUGGLING["bare LF"], b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"], 1):
            with caplog.at_level(logging.INFO, "fxrelay.access"):
                await ask(port, request)
                with trio.fail_after(5):
                    while len(found := [record for record in caplog.records if record.name == "fxrelay.access"]) < number:
                        await trio.sleep(0.01)
            assert len(found) == number, request
        await plane.quiet()
        assert len([record for record in caplog.records if record.name == "fxrelay.access"]) == 3


async def test_bad_chunks_end_the_request_on_both_sides(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        ends: list[bytes] = []

        async def service(stream: trio.SocketStream) -> None:
            _, body = await read_head(stream)
            try:
                while True:
                    data = await stream.receive_some()
                    if not data:
                        ends.append(b"<END>" if b"0\r\n\r\n" not in body else body)
                        return
                    body += data
            except trio.BrokenResourceError:
                ends.append(b"<RESET>")

        port = await web(plane, service)
        for name, chunks in BAD_CHUNKS.items():
            answer = await ask(port, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + LAST)
            assert statuses(answer) == [400], name
        with trio.fail_after(10):
            while len(ends) < len(BAD_CHUNKS):
                await trio.sleep(0.01)
        assert set(ends) == {b"<RESET>"}
