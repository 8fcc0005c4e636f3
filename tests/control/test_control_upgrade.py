"""HTTP heads and the WebSocket upgrade: what is let through, what is refused, and how."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from fxtunnel.codes import Refusal
from fxtunnel.control.upgrade import (
    CONTROL_PATH,
    SUBPROTOCOL,
    Head,
    accept_websocket,
    answer,
    open_websocket,
    post_json,
    read_body,
    read_head,
    refusal_fields,
    refusal_from,
)
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed

UPGRADE = (
    b"GET /.fx/control HTTP/1.1\r\nHost: gw\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: fx-control.1\r\n\r\n"
)


async def head_of(raw: bytes, **limits: int) -> Head:
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(raw)
    await near.send_eof()
    return await read_head(far, **limits)


async def test_a_head_keeps_what_came_behind_it(autojump_clock: object) -> None:
    head = await head_of(b"POST /.fx/enrol HTTP/1.1\r\nHost: gw\r\nContent-Length: 2\r\n\r\n{}")
    assert (head.method, head.target, head.header("host"), head.body) == ("POST", "/.fx/enrol", "gw", b"{}")
    assert head.header("authorization") is None


async def test_a_head_may_come_byte_by_byte(autojump_clock: object) -> None:
    near, far = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for byte in UPGRADE:
                await near.send_all(bytes([byte]))

        nursery.start_soon(send)
        assert (await read_head(far)).target == CONTROL_PATH


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x00\x00\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: gw\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gw\r\nX: \xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xc3\xa9\r\n\r\n",
        b"GET /\xe9 HTTP/1.1\r\nHost: gw\r\n\r\n",
        b"GET / HTTP/1.1\nHost: gw\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gw\r\n: empty\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gw\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gw\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(64)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: gw\r\nX: " + b"y" * 8192 + b"\r\n\r\n",
        b"y" * 9000,
    ],
    ids=range(13),
)
async def test_bad_heads_are_refused(autojump_clock: object, raw: bytes) -> None:
    with pytest.raises(PeerRefused) as caught:
        await head_of(raw)
    assert caught.value.refusal is Refusal.BAD_REQUEST


async def test_the_limit_of_a_head_is_exact(autojump_clock: object) -> None:
    raw = b"GET / HTTP/1.1\r\nHost: gw\r\n\r\n"
    assert (await head_of(raw, max_bytes=len(raw))).method == "GET"
    with pytest.raises(PeerRefused):
        await head_of(raw, max_bytes=len(raw) - 1)


async def test_a_client_that_leaves_early_gets_no_answer(autojump_clock: object) -> None:
    with pytest.raises(TunnelClosed):
        await head_of(b"GET / HTT")


async def test_a_doubled_header_is_no_matter_of_taste(autojump_clock: object) -> None:
    head = await head_of(b"GET / HTTP/1.1\r\nHost: gw\r\nAuthorization: a\r\nauthorization: b\r\n\r\n")
    with pytest.raises(PeerRefused):
        head.header("authorization")


@pytest.mark.parametrize(
    "headers",
    [
        b"",
        b"Content-Length: 8193\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 99999999999999999999\r\n",
    ],
)
async def test_bodies_have_a_small_announced_length(autojump_clock: object, headers: bytes) -> None:
    head = await head_of(b"POST / HTTP/1.1\r\nHost: gw\r\n" + headers + b"\r\n")
    with pytest.raises(PeerRefused):
        await read_body(trio.testing.memory_stream_pair()[0], head)


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        (b"Upgrade: websocket", b"Upgrade: h2c", Refusal.BAD_REQUEST),
        (b"Connection: Upgrade", b"Connection: close", Refusal.BAD_REQUEST),
        (b"Version: 13", b"Version: 8", Refusal.BAD_REQUEST),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"short", Refusal.BAD_REQUEST),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"c2hvcnQ=", Refusal.BAD_REQUEST),
        (b"fx-control.1", b"fx-control.2", Refusal.VERSION_MISMATCH),
        (b"Upgrade: websocket", b"Content-Length: 3\r\nUpgrade: websocket", Refusal.BAD_REQUEST),
    ],
)
async def test_improper_upgrades_are_refused(autojump_clock: object, old: bytes, new: bytes, refusal: Refusal) -> None:
    head = await head_of(UPGRADE.replace(old, new))
    async with trio.open_nursery() as nursery:
        with pytest.raises(PeerRefused) as caught:
            await accept_websocket(nursery, trio.testing.memory_stream_pair()[0], head)
    assert caught.value.refusal is refusal


@pytest.mark.parametrize(
    "header",
    [
        b"Host: xn--\x7e-999999999b",
        b"Host: " + b"a" * 70 + b".example",
        b"Host: xn--zzzzzzzzzzzzzzzzzzzz",
        b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=x",
    ],
)
async def test_nothing_the_client_wrote_reaches_the_websocket_parser(autojump_clock: object, header: bytes) -> None:
    raw = UPGRADE.replace(b"Host: gw", header if header.startswith(b"Host") else b"Host: gw\r\n" + header)
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(raw)
    async with trio.open_nursery() as nursery:
        ws = await accept_websocket(nursery, far, await read_head(far))
        assert ws.subprotocol == SUBPROTOCOL
        assert b"extensions" not in bytes(await near.receive_some()).lower()
        nursery.cancel_scope.cancel()


async def test_bytes_before_the_answer_are_refused(autojump_clock: object) -> None:
    head = await head_of(UPGRADE + b"\x81\x82\x00\x00\x00\x00hi")
    async with trio.open_nursery() as nursery:
        with pytest.raises(PeerRefused):
            await accept_websocket(nursery, trio.testing.memory_stream_pair()[0], head)


async def serve_raw(stream: Any, raw: bytes) -> None:
    await read_head(stream)
    await stream.send_all(raw)
    await stream.send_eof()


async def refused_by(serve: Callable[[Any], Any]) -> BaseException:
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, far)
        with pytest.raises((PeerRefused, TunnelClosed, RemoteProtocolError)) as caught:
            await open_websocket(nursery, near, "gw", CONTROL_PATH, {})
    return caught.value


async def test_a_refused_upgrade_says_why(autojump_clock: object) -> None:
    async def refuse(stream: Any) -> None:
        await read_head(stream)
        refused = PeerRefused(Refusal.REVOKED, "node-a was revoked")
        await answer(stream, refused.refusal.status, refusal_fields(refused, 1_700_000_000.9))
        await stream.send_eof()

    refused = await refused_by(refuse)
    assert isinstance(refused, PeerRefused)
    assert (refused.refusal, str(refused)) == (Refusal.REVOKED, "node-a was revoked")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", TunnelClosed),
        (b"HTTP/1.1 101 Switch", TunnelClosed),
        (b"SSH-2.0-OpenSSH\r\n\r\n", RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", RemoteProtocolError),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 7\r\n\r\n<html/>", RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", RemoteProtocolError),
        (b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}", PeerRefused),
        (b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n", RemoteProtocolError),
        (b"HTTP/1.1 101 S\xff\r\n\r\n", RemoteProtocolError),
    ],
    ids=range(9),
)
async def test_strange_gateways_are_named_as_such(autojump_clock: object, raw: bytes, kind: type[Exception]) -> None:
    async def serve(stream: Any) -> None:
        await serve_raw(stream, raw)

    assert type(await refused_by(serve)) is kind


async def test_post_json_brings_status_and_answer(autojump_clock: object) -> None:
    near, far = trio.testing.memory_stream_pair()

    async def serve() -> None:
        head = await read_head(far)
        body = json.loads(await read_body(far, head))
        await answer(far, 200, {"got": body, "host": head.header("host")})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        assert await post_json(near, "gw.example", "/.fx/enrol", {"v": 1}) == (200, {"got": {"v": 1}, "host": "gw.example"})


def test_a_wrong_clock_is_told_with_its_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 2000.0)
    refused = refusal_from(401, {"error": "clock-skew", "gateway_time_unix": 1905})
    assert (refused.refusal, str(refused)) == (Refusal.CLOCK_SKEW, "this machine's clock is 95 s ahead of the gateway's: set it")
    assert "20 s behind" in str(refusal_from(401, {"error": "clock-skew", "gateway_time_unix": 2020}))


@pytest.mark.parametrize("fields", [{}, {"error": 1}, {"error": "new"}, {"error": "too-many", "retry_after_s": True, "message": 5}])
def test_any_error_json_becomes_a_refusal(fields: dict[str, object]) -> None:
    refused = refusal_from(429, fields)
    assert refused.retry_after_s == 0
    assert refused.refusal is (Refusal.TOO_MANY if fields.get("error") == "too-many" else Refusal.BAD_REQUEST)


def test_retry_after_is_bounded() -> None:
    assert refusal_from(429, {"error": "too-many", "retry_after_s": 1e12}).retry_after_s == 3600
    assert refusal_from(429, {"error": "too-many", "retry_after_s": -5}).retry_after_s == 0


async def test_a_client_that_leaves_before_its_101_is_a_lost_connection(autojump_clock: object) -> None:
    head = await head_of(UPGRADE)
    near, far = trio.testing.memory_stream_pair()
    await near.aclose()
    async with trio.open_nursery() as nursery:
        with pytest.raises(trio.BrokenResourceError):
            await accept_websocket(nursery, far, head)
