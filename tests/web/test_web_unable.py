"""Requests that a relay's gate cannot decide: another relay is asked, as long as nobody has got anything of them."""

from contextlib import suppress

import pytest
import trio
from delivery_rig import listen_everywhere, serve_on
from peers import connect
from plane import SERVICE, Contexts, Plane, RelaySide, open_plane
from web_rig import Canned, add_web_relay, ask, statuses

from fxgateway.routing.hosts import HostTable
from fxgateway.routing.preread_router import DoorKind, PrereadRouter
from fxrelay.delivery.ports import Node
from fxrelay.web.desk import WebDesk
from fxrelay.web.ports import Allow, Reply, RequestFacts, Sender, Unable, WholeAnswer
from fxtunnel.kit.answers import Refused
from fxtunnel.model import ServiceName

HOST = "127.0.0.2"
LOGIN = b"POST /login HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
SMALL = LOGIN + b"Content-Length: 1\r\n\r\nx"
WORDS = b"try again in a moment"


class Gate:
    """Cannot decide about what goes to /login, nor about who goes to /lost; with `node` it does not notice before that one was asked."""

    max_body_bytes = 100_000

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.node: Node | None = None
        self.waits_s = 0.0

    def concerns(self, service: ServiceName) -> bool:
        return True

    async def admit(self, request: RequestFacts) -> Allow:
        if request.path == b"/lost":
            raise self.unable()
        return Allow(held=self) if request.path == b"/login" else Allow()

    async def answered(self, request: RequestFacts, node: object, status: int, fields: object) -> tuple[bytes, ...]:
        return ()

    async def run(self, body: bytes, sender: Sender) -> Reply:
        self.bodies.append(body)
        await trio.sleep(self.waits_s)
        if self.node is not None:
            await sender.send(self.node, 1_000)
        raise self.unable()

    def unable(self) -> Refused:
        return Unable(503, "ReservationsUnavailable", WORDS.decode(), detail="no store")


class Able(Gate):
    async def run(self, body: bytes, sender: Sender) -> Reply:
        self.bodies.append(body)
        return Reply(WholeAnswer(200, b"OK", (), b"in"))

    async def admit(self, request: RequestFacts) -> Allow:
        return Allow(held=self)


class Site:
    """A relay that cannot decide, which is asked first, and one that can."""

    def __init__(self, unable: tuple[RelaySide, WebDesk, Gate], able: tuple[RelaySide, WebDesk, Gate], door: int, service: Canned) -> None:
        (self.first, self.web, self.gate), (self.other, _, self.able) = unable, able
        self.door = door
        self.service = service


async def open_site(plane: Plane) -> Site:
    listener, service = listen_everywhere(HOST)[HOST], Canned()
    serve_on(plane, listener, service)
    found: list[tuple[RelaySide, WebDesk, Gate]] = []
    for name, gate in (("a", Gate()), ("b", Able())):
        relay, web = await add_web_relay(plane, listener.getsockname()[1], host=HOST, gate=gate, name=name)
        web.others_may = lambda service, gateway_id: True
        found.append((relay, web, gate))
    door = plane.add_door(preread_router=PrereadRouter(DoorKind.HTTP, HostTable(), SERVICE))
    return Site(*found, door, service)


@pytest.mark.parametrize("request_", [SMALL, b"GET /lost HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"], ids=["held", "not let in"])
async def test_another_relay_is_asked_what_this_one_cannot_decide(contexts: Contexts, request_: bytes) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        answer = await ask(site.door, request_)
        assert (statuses(answer), answer[-2:]) == ([200], b"in")
        assert site.first.desk.counters.refused_by_service == {SERVICE: {"busy": 1}}
        assert site.able.bodies == [request_.partition(b"\r\n\r\n")[2]]


async def test_where_no_other_relay_may_the_client_is_told(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        site.web.others_may = lambda service, gateway_id: False
        answer = await ask(site.door, SMALL)
        assert statuses(answer) == [503]
        assert WORDS in answer
        assert not site.able.bodies


async def test_more_than_may_be_sent_before_accept_is_not_asked_of_another(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        answer = await ask(site.door, LOGIN + b"Content-Length: 50000\r\n\r\n" + b"x" * 50_000)
        assert statuses(answer) == [503]
        assert not site.able.bodies


async def test_a_small_body_may_come_later(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        async with await connect(site.door) as stream:
            await stream.send_all(LOGIN + b"Content-Length: 1\r\n\r\n")
            await trio.sleep(0.1)
            await stream.send_all(b"x")
            with trio.fail_after(5):
                assert b" 200 " in await stream.receive_some()
        assert site.able.bodies == [b"x"]


async def test_who_leaves_before_all_is_said_is_nobodys(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        async with await connect(site.door) as stream:
            await stream.send_all(LOGIN + b"Content-Length: 2\r\n\r\nx")
            await stream.send_eof()
            with trio.fail_after(5), suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
        assert site.first.desk.counters.opened_by_service == {SERVICE: 1}
        assert site.other.desk.counters.opened_by_service == {}


async def test_a_decision_that_takes_long_is_this_relays(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.web.desk.ACCEPT_AFTER_S", 0.05)
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        site.gate.waits_s = 0.5
        assert statuses(await ask(site.door, SMALL)) == [503]
        assert not site.able.bodies


async def test_what_a_service_has_got_no_other_relay_is_asked(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        site.gate.node = Node(site.first.id, True, HOST, False, _Nothing())
        assert statuses(await ask(site.door, SMALL)) == [503]
        assert not site.able.bodies


async def test_other_requests_of_the_service_go_on_as_before(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        site = await open_site(plane)
        get = b"GET /x HTTP/1.1\r\nHost: a\r\n"
        answer = await ask(site.door, get + b"\r\n" + get + b"\r\n" + SMALL)
        assert statuses(answer) == [200, 200, 503]  # the connection has had answers: it cannot go elsewhere
        assert [head.split()[1] for head in site.service.got] == [b"/x", b"/x"]


class _Nothing:
    def connected(self) -> None: ...
    def release(self) -> None: ...
    def hand_over(self) -> None: ...
