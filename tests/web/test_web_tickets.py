"""Guarded HTTP services: tickets in requests, the passes they are changed for, and what the service gets to see of both."""

import json
import re
from dataclasses import replace

import pytest
import trio
from admitting_rig import NOW, RULES, Memory, ScriptedOwner, mint, porter_of
from delivery_rig import Spec, listen_everywhere, serve_on
from hypothesis import given
from hypothesis import strategies as st
from peers import connect
from plane import SERVICE, Contexts, Plane, open_plane
from web_rig import Canned, NamingChooser, add_web_relay, ask, read_head, statuses

from fxrelay.admitting.quotas import StreamLimits
from fxrelay.admitting.stream_admission import StreamAdmission
from fxrelay.admitting.ticket import Caller, TicketRules
from fxrelay.web.heads import parse_request
from fxrelay.web.passes import Passes, split_ticket
from fxrelay.web.ports import WebRules
from fxtunnel.model import RelayId

KEY = b"k" * 32
PASSES = Passes(SERVICE, 3_600, KEY)
GUARDED = WebRules(SERVICE, is_guarded=True, passes=PASSES, takes_bearers=True)
A, B = "127.0.0.11", "127.0.0.12"


def request(path: str = "/", *fields: str, close: bool = True) -> bytes:
    last = ("Connection: close",) if close else ()
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: s", *fields, *last, "", ""]).encode()


def bearer(ticket: str) -> str:
    return f"Authorization: Bearer {ticket}"


def pass_in(answer: bytes) -> str:
    """The cookie of an answer, as a request shows it."""
    found = re.search(rb"Set-Cookie: (fxpass_s=[^;]+); Max-Age=3600; Path=/; HttpOnly; SameSite=Lax\r\n", answer)
    assert found is not None, answer
    return f"Cookie: {found[1].decode()}"


async def guarded(plane: Plane, service: Canned, admission: StreamAdmission | None = None, rules: WebRules = GUARDED) -> int:
    _, web = await add_web_relay(plane, await plane.serve(service), rules)
    web.admission = admission or porter_of(Memory())
    return plane.add_door()


async def test_nobody_without_a_ticket(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port = await guarded(plane, service)
        answer = await ask(port, request("/", "Accept: application/json"))
        assert statuses(answer) == [401]
        assert b"WWW-Authenticate: Bearer\r\n" in answer
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["name"] == "BadTicket"
        assert error["trace"]
        assert not service.got


@pytest.mark.parametrize("how", ["bearer", "query"])
async def test_a_ticket_is_changed_for_a_pass(contexts: Contexts, how: str) -> None:
    async with open_plane(contexts) as plane:
        service, ticket = Canned(), mint(groups=("cad",))
        port = await guarded(plane, service)
        shown = request("/a?x=1&y", bearer(ticket)) if how == "bearer" else request(f"/a?x=1&fx_ticket={ticket}&y")
        answer = await ask(port, shown)
        assert statuses(answer) == [200]
        assert statuses(await ask(port, shown)) == [401]  # it was used
        cookie = pass_in(answer)
        again = await ask(port, request("/b", f"{cookie}; other=1"))
        assert statuses(again) == [200]
        assert b"Set-Cookie" not in again
        first, second = service.got
        assert first.startswith(b"GET /a?x=1&y HTTP/1.1\r\n")
        assert ticket.encode() not in first
        assert b"uthorization" not in first
        assert b"\r\nCookie: other=1\r\n" in second
        assert b"fxpass" not in second


async def test_requests_of_one_connection_each_show_something(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service, memory = Canned(), Memory()
        port = await guarded(plane, service, porter_of(memory))
        first, second = mint("alice"), mint("bob")
        batch = [request("/1", bearer(first), close=False), request("/2", close=False), request("/3", bearer(first), close=False)]
        answer = await ask(port, b"".join([*batch, request("/4", bearer(second))]))
        assert statuses(answer) == [200, 401, 401, 200]
        assert [head.split()[1] for head in service.got] == [b"/1", b"/4"]
        assert len(memory.spent) == 2


async def test_a_pass_of_somebody_elses_making(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port = await guarded(plane, service)
        caller = Caller("alice")
        for made in (
            Passes(SERVICE, 3_600, b"x" * 32),
            replace(PASSES, service="other"),
            replace(PASSES, life_s=-10),
        ):
            line = made.set_cookie(caller, 2_000_000_000 if made.life_s > 0 else NOW, secure=False).decode()
            value = line.partition("=")[2].partition(";")[0]
            assert statuses(await ask(port, request("/", f"Cookie: fxpass_s={value}"))) == [401]
        good = PASSES.set_cookie(caller, 2_000_000_000, secure=False).decode().partition(": ")[2].partition(";")[0]
        assert statuses(await ask(port, request("/", f"Cookie: {good}"))) == [200]
        for broken in (good[:-1], good.replace(".", ""), good + "A", good.replace("=", "=A", 1)):
            assert statuses(await ask(port, request("/", f"Cookie: {broken}"))) == [401]


async def test_a_stream_that_came_with_a_ticket_is_one_callers(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service, memory, ticket = Canned(), Memory(), mint()
        relay, web = await add_web_relay(plane, await plane.serve(service), GUARDED)
        web.admission = porter_of(memory)
        relay.session.mux._on_open = lambda stream, opening: relay.desk.on_open(relay.session, stream, opening._replace(ticket=ticket))
        port = plane.add_door()
        answer = await ask(port, request("/1", "Authorization: Bearer own", close=False) + request("/2"))
        assert statuses(answer) == [200, 200]
        assert b"Set-Cookie" not in answer
        assert b"Authorization: Bearer own" in service.got[0]  # that one is the service's
        assert len(memory.spent) == 1
        assert statuses(await ask(port, request("/3"))) == [401]


async def test_a_ticket_for_a_node_leads_there_and_nowhere_else(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes = {A: Canned(), B: Canned()}
        listeners = listen_everywhere(A, B)
        pool_port = listeners[A].getsockname()[1]
        for host, listener in listeners.items():
            serve_on(plane, listener, nodes[host])
        chooser = NamingChooser(Spec("a", is_local=True), Spec("b", address=B))
        owner = ScriptedOwner()
        rules = replace(GUARDED, node_paths=True)
        _, web = await add_web_relay(plane, pool_port, rules, chooser=chooser, host=A, is_pool=True)
        web.admission = porter_of(Memory(), owner=owner)
        port = plane.add_door()
        answer = await ask(port, request("/node/a/x", bearer(mint(node="b"))))
        assert statuses(answer) == [403]
        answer = await ask(port, request("/", bearer(mint(node="b"))))
        assert statuses(answer) == [200]
        cookie = pass_in(answer)
        assert statuses(await ask(port, request("/node/b/x", cookie))) == [200]
        assert statuses(await ask(port, request("/node/a/x", cookie))) == [403]
        assert [len(nodes[host].got) for host in (A, B)] == [0, 2]
        assert {question.node for question in owner.asked} == {"b"}
        assert statuses(await ask(port, request("/node/a/x", bearer(mint())))) == [200]
        assert owner.asked[-1].node == "a"


async def test_the_chain_hears_who_asks(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        port = await plane.serve(service)
        chooser = NamingChooser(Spec("a", is_local=True))
        _, web = await add_web_relay(plane, port, GUARDED, chooser=chooser, is_pool=True)
        web.admission = porter_of(Memory())
        door = plane.add_door()
        batch = request("/", bearer(mint("alice", groups=("cad",))), close=False) + request("/", bearer(mint("bob")))
        assert statuses(await ask(door, batch)) == [200, 200]
        found = [(wanted.user, wanted.groups, wanted.is_proven) for wanted, _ in chooser.asked]
        assert found == [("alice", ("cad",), True), ("bob", (), True)]


async def test_the_owner_says_no_and_the_ticket_is_not_used(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service, memory, ticket = Canned(), Memory(), mint()
        owner = ScriptedOwner(lambda question: "not today")
        port = await guarded(plane, service, porter_of(memory, owner=owner))
        answer = await ask(port, request("/", bearer(ticket)))
        assert statuses(answer) == [403]
        assert b"not today" not in answer
        assert not service.got
        assert not memory.spent
        owner.reason = lambda question: None
        answer = await ask(port, request("/", bearer(ticket), close=False) + request("/", bearer(mint())))
        assert statuses(answer) == [200, 200]
        assert len(owner.asked) == 2  # a yes is remembered for the connection's next requests


async def test_limits_count_connections(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        admission = porter_of(Memory(), limits=StreamLimits(per_user=1, per_address=2))
        port = await guarded(plane, Canned(), admission)
        cookie = PASSES.set_cookie(Caller("alice"), 2_000_000_000, secure=False).decode().partition(": ")[2].partition(";")[0]
        first = await connect(port)
        for _ in range(3):  # one connection, however many requests
            await first.send_all(request("/", f"Cookie: {cookie}", close=False))
            assert statuses((await read_head(first))[0]) == [200]
        answer = await ask(port, request("/", f"Cookie: {cookie}"))
        assert statuses(answer) == [429]
        assert b"Retry-After: 5\r\n" in answer
        second = await connect(port)
        await second.send_all(request("/", bearer(mint("bob")), close=False))
        assert statuses((await read_head(second))[0]) == [200]
        assert statuses(await ask(port, request("/", bearer(mint("carol"))))) == [429]
        await first.aclose()
        await second.aclose()
        with trio.fail_after(5):
            while len(admission.quotas):
                await trio.sleep(0.01)


async def test_a_connection_counts_for_the_user_who_asked_last(contexts: Contexts) -> None:
    """A proxy in front sends everybody's requests by one connection."""
    async with open_plane(contexts) as plane:
        port = await guarded(plane, Canned(), porter_of(Memory(), limits=StreamLimits(per_user=1)))
        shared = await connect(port)
        for user in ("alice", "bob"):
            await shared.send_all(request("/", bearer(mint(user)), close=False))
            assert statuses((await read_head(shared))[0]) == [200]
        assert statuses(await ask(port, request("/", bearer(mint("bob"))))) == [429]
        assert statuses(await ask(port, request("/", bearer(mint("alice"))))) == [200]
        await shared.aclose()


async def test_an_upgrade_with_a_pass(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        switching = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        service = Canned(switching)
        admission = porter_of(Memory(), limits=StreamLimits(per_user=1))
        port = await guarded(plane, service, admission)
        words = ("Connection: Upgrade", "Upgrade: websocket")
        assert statuses(await ask(port, request("/ws", *words, close=False))) == [401]
        stream = await connect(port)
        await stream.send_all(request(f"/ws?fx_ticket={mint()}", *words, close=False))
        assert statuses((await read_head(stream))[0]) == [101]
        assert service.got[0].startswith(b"GET /ws HTTP/1.1\r\n")
        assert len(admission.quotas) == 1  # as long as it lasts
        await stream.aclose()
        with trio.fail_after(5):
            while len(admission.quotas):
                await trio.sleep(0.01)


async def test_where_tickets_are_optional_a_token_is_the_services_own(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        rules = replace(GUARDED, takes_bearers=False)
        admission = porter_of(Memory(), ticket=TicketRules(RULES.keys, SERVICE, is_required=False))
        port = await guarded(plane, service, admission, rules)
        assert statuses(await ask(port, request("/", "Authorization: Bearer own"))) == [200]
        assert b"Authorization: Bearer own\r\n" in service.got[0]
        assert statuses(await ask(port, request("/?fx_ticket=own"))) == [401]


async def test_without_a_porter_there_is_nothing(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        await add_web_relay(plane, await plane.serve(service), GUARDED)
        assert statuses(await ask(plane.add_door(), request("/", bearer(mint())))) == [503]
        assert not service.got


async def test_two_tickets_are_a_bad_request(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port = await guarded(plane, Canned())
        assert statuses(await ask(port, request(f"/?fx_ticket={mint()}&fx_ticket={mint()}"))) == [400]


@pytest.mark.parametrize(
    ("path", "rest", "tickets"),
    [
        (b"/", b"/", []),
        (b"/?fx_ticket=a", b"/", [b"a"]),
        (b"/?fx_ticket=a&b=c", b"/?b=c", [b"a"]),
        (b"/?b=c&fx_ticket=a", b"/?b=c", [b"a"]),
        (b"/?b=%20&&fx_ticket=a&c", b"/?b=%20&&c", [b"a"]),
        (b"/?xfx_ticket=a", b"/?xfx_ticket=a", []),
        (b"/fx_ticket=a?b", b"/fx_ticket=a?b", []),
        (b"/?fx_ticket", b"/", [b""]),
        (b"/?b=?fx_ticket=a", b"/?b=?fx_ticket=a", []),
    ],
)
def test_a_ticket_is_taken_out_of_a_path(path: bytes, rest: bytes, tickets: list[bytes]) -> None:
    assert split_ticket(path) == (rest, tickets)


@given(st.binary(max_size=60), st.sampled_from([b"", b"&"]), st.binary(max_size=20))
def test_no_ticket_stays_in_a_path(before: bytes, mark: bytes, after: bytes) -> None:
    path, _ = split_ticket(b"/?" + before + mark + b"fx_ticket=" + after)
    assert not any(part.partition(b"=")[0] == b"fx_ticket" for part in path.partition(b"?")[2].split(b"&"))


CALLERS = st.builds(
    Caller,
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=40),
    st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20), max_size=8).map(tuple),
    st.none() | st.just(RelayId("node-a")),
)


@given(CALLERS, st.integers(0, 3_599))
def test_a_pass_says_who_it_was_made_for(caller: Caller, later: int) -> None:
    line = PASSES.set_cookie(caller, NOW, secure=True)
    assert line.endswith(b"; Max-Age=3600; Path=/; HttpOnly; SameSite=Lax; Secure\r\n")
    shown = line.partition(b": ")[2].partition(b";")[0]
    head = parse_request(b"GET / HTTP/1.1\r\nHost: s\r\nCookie: a=b; " + shown)
    assert PASSES.caller_of(head, NOW + later) == caller
    assert PASSES.caller_of(head, NOW + 3_601) is None
    assert PASSES.without(head).get(b"cookie") == b"a=b"


@given(st.binary(max_size=80))
def test_any_cookie_is_read_or_not(value: bytes) -> None:
    clean = bytes(byte for byte in value if 0x20 < byte < 0x7F and byte not in b";,")
    head = parse_request(b"GET / HTTP/1.1\r\nHost: s\r\nCookie: fxpass_s=" + clean)
    assert PASSES.caller_of(head, NOW) is None
