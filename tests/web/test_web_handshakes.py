"""TLS handshakes of many clients at once, at a door and at a relay that end TLS: a crowd from one address keeps nobody else waiting."""

import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing
import trustme
from peers import LOOPBACK
from plane import SERVICE, Contexts, open_plane
from web_rig import OK, Canned, add_web_relay

from fxgateway.doors.client_handshake import ClientHandshake
from fxgateway.routing.hosts import HostTable, Route
from fxgateway.routing.preread_router import DoorKind, PrereadRouter
from fxrelay.web.ports import WebLimits, WebRules
from fxrelay.web.secure import STEPS_AT_ONCE, HandshakeTurns

CROWD, OTHER = "127.0.0.2", "127.0.0.3"
MANY = 200
GET = b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n"


class Site:
    """`order`: the names in the hellos, as they were worked on."""

    def __init__(self) -> None:
        authority = trustme.CA()
        self.order: list[str] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("other.test").configure_cert(self.context)
        self.context.sni_callback = lambda sock, name, context: self.order.append(str(name))
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)

    def hello(self) -> bytes:
        """What a client of the crowd says."""
        outgoing = ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            self.trust.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="crowd.test").do_handshake()
        return outgoing.read()

    @asynccontextmanager
    async def crowd(self, port: int) -> AsyncIterator[None]:
        """Clients of one address that have said hello, and wait."""
        hello = self.hello()
        async with AsyncExitStack() as stack:
            for _ in range(MANY):
                stream = await trio.open_tcp_stream(LOOPBACK, port, local_address=CROWD)
                await stack.enter_async_context(stream)
                await stream.send_all(hello)
            yield

    async def other_is_served(self, port: int) -> None:
        """A client of another address asks, and has its answer."""
        transport = await trio.open_tcp_stream(LOOPBACK, port, local_address=OTHER)
        async with trio.SSLStream(transport, self.trust, server_hostname="other.test", https_compatible=True) as stream:
            await stream.send_all(GET)
            assert (await stream.receive_some()).endswith(OK[-2:])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def test_a_crowd_at_a_door_keeps_nobody_else_waiting(contexts: Contexts) -> None:
    site, may_go_on = Site(), threading.Event()
    async with open_plane(contexts) as plane:
        await add_web_relay(plane, await plane.serve(Canned()), WebRules(SERVICE))
        preread_router = PrereadRouter(DoorKind.HTTPS, HostTable([Route("other.test", "/", SERVICE)]), None, None)
        port = plane.add_door(preread_router=preread_router, tls=site.context)
        pending = plane.doors[0].pending.clients

        def waiting() -> int:
            return sum(isinstance(each, ClientHandshake) and each._handshake._is_offloaded for each in pending)

        plane.reactor.offload.do(lambda: may_go_on.wait(20), lambda _: None)
        try:
            async with site.crowd(port), trio.open_nursery() as nursery:
                await until(lambda: waiting() == MANY)
                nursery.start_soon(site.other_is_served, port)
                await until(lambda: waiting() == MANY + 1)
                may_go_on.set()
        finally:
            may_go_on.set()
        assert site.order.index("other.test") <= 1


async def test_a_crowd_at_a_relay_keeps_nobody_else_waiting(contexts: Contexts) -> None:
    site = Site()
    async with open_plane(contexts) as plane:
        rules = WebRules(SERVICE, tls=site.context)
        _, desk = await add_web_relay(plane, await plane.serve(Canned()), rules, limits=WebLimits())
        port = plane.add_door()
        await until(lambda: desk.handshakes._used_up._task is not None)
        desk.handshakes._left = 0  # nobody has a turn until `run` is woken
        async with site.crowd(port), trio.open_nursery() as nursery:
            await until(lambda: len(desk.handshakes.waiting) == MANY)
            nursery.start_soon(site.other_is_served, port)
            await until(lambda: len(desk.handshakes.waiting) == MANY + 1)
            assert site.order == []
            desk.handshakes._used_up.wake()
        assert site.order.index("other.test") < STEPS_AT_ONCE


async def test_so_many_steps_in_one_turn_of_the_loop() -> None:
    turns, done = HandshakeTurns(), []

    async def step(source: str) -> None:
        if not turns.begin_nowait():
            await turns.begin(source)
        done.append(source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as steps:
            for source in ("crowd",) * 50 + ("other",):
                steps.start_soon(step, source)
            counted = 0
            while len(done) < 51:
                await trio.lowlevel.checkpoint()
                assert len(done) - counted <= 2 * STEPS_AT_ONCE  # two turns, as trio mixes the order of tasks
                counted = len(done)
        assert done.index("other") < 4 * STEPS_AT_ONCE
        with trio.move_on_after(0):  # who leaves is not waited for
            turns._left = 0
            await turns.begin("gone")
        assert not turns.waiting
        nursery.cancel_scope.cancel()
