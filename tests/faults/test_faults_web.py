"""R10: an exception at every await of an HTTP connection at a relay. It ends alone, and is not left without an end."""

import contextlib
import logging

import pytest
import trio
from delivery_rig import Spec
from peers import connect
from plane import Contexts, open_plane
from sabotage import FAULTS, LIMIT, lines_about, sabotage
from test_web_held import Holding
from web_rig import Canned, NamingChooser, add_web_relay, ask, read_head, statuses

from fxrelay.web.ports import Reply, Sender

POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
SLOW_GET = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
GAP_S = 0.005
"""So that what comes next is waited for."""


LOGIN = b"POST /login HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
LAST_LOGIN = LOGIN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


class Service(Canned):
    """Reads bodies as well, which `Canned` takes for the next head, and answers in two pieces."""

    async def __call__(self, stream: trio.SocketStream) -> None:
        while True:
            head, rest = await read_head(stream)
            if not head:
                return
            while b"Content-Length: 4" in head and len(rest) < 4:
                rest += await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            await trio.sleep(GAP_S)
            await stream.send_all(b"cd")


async def victim(port: int, pieces: tuple[bytes, ...]) -> None:
    """A client that speaks slowly, and hears whatever comes of it."""
    with trio.fail_after(20), contextlib.suppress(OSError, trio.BrokenResourceError):
        async with await connect(port) as stream:
            for piece in pieces:
                await stream.send_all(piece)
                await trio.sleep(GAP_S)
            async for _ in stream:
                pass


async def test_a_fault_at_every_await_of_a_connection(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hits = 0
    async with open_plane(contexts) as plane:
        _, web = await add_web_relay(plane, await plane.serve(Service()))
        port = plane.add_door()

        for nth in range(1, LIMIT):
            with sabotage(nth, "WebDesk._serve") as done:
                async with trio.open_nursery() as victims:
                    for _ in FAULTS:
                        victims.start_soon(victim, port, (POST, b"ab", b"cd", SLOW_GET, b"y\r\n\r\n", LAST))
                await plane.quiet()
            hits += len(done.hit)
            assert not web.connections, [tree.where for tree in done.hit]
            for tree in done.hit:
                assert len(lines_about(tree.fault, caplog)) <= 1, tree.where
            caplog.clear()
            assert statuses(await ask(port, LAST)) == [200], [tree.where for tree in done.hit]
            if not done.hit:
                break
    assert hits >= 4 * len(FAULTS)


class Waiting(Holding):
    """Does not know at once what it thinks of an answer."""

    async def run(self, body: bytes, sender: Sender) -> Reply:
        reply = await super().run(body, sender)
        await trio.sleep(GAP_S)
        return reply


async def test_a_fault_at_every_await_of_a_request_that_is_held(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hits = 0
    async with open_plane(contexts) as plane:
        port, chooser = await plane.serve(Service()), NamingChooser(Spec("a", is_local=True))
        _, web = await add_web_relay(plane, port, chooser=chooser, is_pool=True, gate=Waiting(chooser))  # a fake gate
        door = plane.add_door()

        for nth in range(1, LIMIT):
            with sabotage(nth, "WebDesk._serve") as done:
                async with trio.open_nursery() as victims:
                    for _ in FAULTS:
                        victims.start_soon(victim, door, (LOGIN, b"ab", b"cd", LAST_LOGIN, b"efgh"))
                await plane.quiet()
            where = [tree.where for tree in done.hit]
            hits += len(done.hit)
            assert not web.connections, where
            await chooser.settled()
            assert all(len(lines_about(tree.fault, caplog)) <= 1 for tree in done.hit), where
            caplog.clear()
            assert statuses(await ask(door, LAST_LOGIN + b"abcd")) == [200], where
            if not done.hit:
                break
    assert hits >= 8 * len(FAULTS)
