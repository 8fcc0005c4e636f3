"""Upgrades: nothing of the client goes to the service before its 101, and without one there is no tunnel."""

import pytest
import trio
from peers import connect, receive_all, receive_exactly
from plane import SERVICE, Contexts, Plane, open_plane
from web_rig import Canned, add_web_relay, ask, read_head, statuses

from fxrelay.web.ports import WebRules

LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n"


async def web(plane: Plane, service: object, rules: WebRules | None = None, **more: object) -> int:
    """A door to an HTTP service; its port."""
    await add_web_relay(plane, await plane.serve(service), rules, **more)
    return plane.add_door()


async def test_an_upgrade_carries_what_came_early_only_after_the_101(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        early: list[bytes] = []

        async def service(stream: trio.SocketStream) -> None:
            head, rest = await read_head(stream)
            assert b"Connection: upgrade\r\nUpgrade: websocket\r\n" in head
            with trio.move_on_after(0.3):
                rest += await stream.receive_some()
            early.append(rest)
            await stream.send_all(SWITCH + b"first")
            async for data in stream:
                await stream.send_all(data.upper())
            await stream.send_all(b"goodbye")

        port = await web(plane, service)
        async with await connect(port) as stream:
            await stream.send_all(UPGRADE + b"early ")
            head, rest = await read_head(stream)
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            rest += await receive_exactly(stream, len(b"firstEARLY ") - len(rest))
            assert rest == b"firstEARLY "
            await stream.send_all(b"more")
            assert await receive_exactly(stream, 4) == b"MORE"
            await stream.send_eof()
            assert await receive_all(stream) == b"goodbye"
        assert early == [b""]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", 200),
        (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", 302),
        (b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 403),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 502),
        (b"\x00\x01garbage\r\n\r\n", 502),
        (b"SSH-2.0-x\r\n", 502),
    ],
)
async def test_a_failed_upgrade_is_no_tunnel(contexts: Contexts, answer: bytes, status: int) -> None:
    async with open_plane(contexts) as plane:
        behind: list[bytes] = []

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(answer)
            try:
                async for data in stream:
                    behind.append(data)
            except trio.BrokenResourceError:
                pass

        port = await web(plane, service, WebRules(SERVICE, response_timeout_s=1.0))
        found = await ask(port, UPGRADE + LAST)
        assert statuses(found) == ([status] if answer[:3] != b"SSH" else [504])
        assert b"Connection: close" in found
        assert behind == []


async def test_a_101_that_nobody_asked_for(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port = await web(plane, Canned(SWITCH))
        assert statuses(await ask(port, LAST)) == [502]
