"""Streams of guarded services, on a whole data plane: what gets in, what is told, and what is given back."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from admitting_rig import RULES, Memory, ScriptedOwner, add_guarded_relay, mint, porter_of
from delivery_rig import ScriptedChooser, Spec, serve_nodes
from peers import connect, hanging_port, receive_all, refused, until_reset
from plane import SERVICE, Contexts, open_plane

from fxrelay.admitting.quotas import Quotas, StreamLimits
from fxrelay.admitting.ticket import Caller, TicketRules
from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.ports import Node, NoNode, Taken, Wanted
from fxtunnel.kit.sources import source_of
from fxtunnel.model import RelayId

A, B = "127.0.0.11", "127.0.0.12"


async def ask(port: int, data: bytes = b"hello") -> bytes:
    async with await connect(port) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        with trio.fail_after(5):
            return await receive_all(stream)


async def until(condition) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.parametrize("is_pool", [False, True])
async def test_a_ticket_opens_one_stream(contexts: Contexts, is_pool: bool) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory, ticket = serve_nodes(plane, A), Memory(), mint(groups=("cad",))
        chooser = ScriptedChooser(Spec("a", is_local=True)) if is_pool else None
        relay = await add_guarded_relay(plane, porter_of(memory), nodes.port, lambda: ticket, chooser=chooser, host=A)
        port = plane.add_door()
        assert await ask(port) == A.encode()
        assert nodes.got[A] == [b"hello"]
        await refused(port)
        assert len(memory.spent) == 1
        assert relay.desk.counters.refused_by_service == {SERVICE: {"bad-ticket": 1}}
        assert not memory.given_back
        if chooser is not None:
            wanted, _ = chooser.asked[0]
            assert (wanted.user, wanted.groups, wanted.is_proven) == ("alice", ("cad",), True)
            await chooser.settled()


async def test_what_one_relay_refuses_no_other_is_asked(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, asked = serve_nodes(plane, A), []
        for name in ("a", "b", "c"):
            await add_guarded_relay(plane, porter_of(Memory(), name), nodes.port, lambda: mint(service="other"), host=A, asked=asked)
        port = plane.add_door()
        await refused(port)
        assert len(asked) == 1
        assert nodes.got[A] == []


async def test_a_ticket_that_did_not_get_through_is_as_good_as_new_elsewhere(contexts: Contexts) -> None:
    """The first relay's service is dead. What it used must be free again before the gateway hears of it."""
    async with open_plane(contexts) as plane:
        nodes, memory, ticket, asked = serve_nodes(plane, A), Memory(), mint(), []
        for name, host in (("a", B), ("b", A)):
            await add_guarded_relay(plane, porter_of(memory, name), nodes.port, lambda: ticket, host=host, asked=asked)
        port = plane.add_door()
        answers = await ask(port)
        assert answers == A.encode()
        assert (asked[-1], len(memory.spent)) == ("b", 1)
        assert len(memory.given_back) == asked.count("a")


async def test_a_pool_whose_nodes_are_all_dead_gives_the_ticket_back(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory = serve_nodes(plane, A), Memory()
        chooser = ScriptedChooser(Spec("a", is_local=True), Spec("b", address=B))
        relay = await add_guarded_relay(plane, porter_of(memory), nodes.port, mint, chooser=chooser, host="127.0.0.13")
        await refused(plane.add_door(), within_s=5)
        await chooser.settled()
        assert (memory.spent, len(memory.given_back)) == ([], 1)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1}}


async def test_a_redirecting_relay_uses_nothing_and_the_node_does(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory, ticket = serve_nodes(plane, A, B), Memory(), mint(node="b")
        owners = {name: ScriptedOwner() for name in "ab"}
        first = ScriptedChooser(Spec("b", can_redirect=True))
        for name, host, chooser in (("a", A, first), ("b", B, ScriptedChooser())):
            admission = porter_of(memory, name, owner=owners[name])
            relay = await add_guarded_relay(plane, admission, nodes.port, lambda: ticket, chooser=chooser, host=host)
            if name == "b":
                plane.registry.offers.remove(relay.id)  # clients get there by redirects only
        port = plane.add_door()
        assert await ask(port) == B.encode()
        assert first.asked[0][0].node == "b"
        assert len(memory.spent) == 1
        assert not owners["a"].asked
        (question,) = owners["b"].asked
        assert (question.user, question.node, question.service, question.client) == ("alice", "b", SERVICE, "127.0.0.1")
        assert question.trace
        await refused(port, within_s=5)


@pytest.mark.parametrize(("spec", "reason"), [(Spec("b", address=B), "chosen"), (Spec("a", is_local=True), "chosen")])
async def test_a_ticket_for_a_node_is_for_no_other(contexts: Contexts, spec: Spec, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A chooser that does not keep to the node, or is told another one by a gateway in wrong hands."""
    async with open_plane(contexts) as plane:
        nodes, memory = serve_nodes(plane, A, B), Memory()
        other = "a" if spec.name == "b" else "b"
        chooser = ScriptedChooser(spec)
        relay = await add_guarded_relay(plane, porter_of(memory), nodes.port, lambda: mint(node=other), chooser=chooser, host=A)
        await refused(plane.add_door())
        await chooser.settled()
        assert nodes.got == {A: [], B: []}
        assert not memory.spent
        assert relay.desk.counters.refused_by_service == {SERVICE: {"forbidden": 1}}
        assert f"the ticket is for {other}, {reason} is {spec.name}" in caplog.text


async def test_the_relay_of_another_node_is_passed_over(contexts: Contexts) -> None:
    """One name, one address a relay: the gateway goes on until it is at the ticket's node."""
    async with open_plane(contexts) as plane:
        nodes, memory, asked = serve_nodes(plane, A, B), Memory(), []
        for name, host in (("a", A), ("b", B)):
            await add_guarded_relay(plane, porter_of(memory, name), nodes.port, lambda: mint(node="b"), host=host, asked=asked)
        port = plane.add_door()
        for _ in range(4):
            assert await ask(port) == B.encode()
        assert asked.count("b") == 4


async def test_who_asks_for_another_node_than_the_tickets_is_told_so(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    """Also where it is asked for by the name of the relay in front of the one address."""
    async with open_plane(contexts) as plane:
        nodes, memory = serve_nodes(plane, A), Memory()
        relay = await add_guarded_relay(plane, porter_of(memory, "a"), nodes.port, lambda: mint(node="b"), host=A)
        relay.desk.node = RelayId("a")
        inner = relay.session.mux._on_open
        relay.session.mux._on_open = lambda stream, opening: inner(stream, opening._replace(node=RelayId("a")))
        await refused(plane.add_door())
        assert relay.desk.counters.refused_by_service == {SERVICE: {"forbidden": 1}}
        assert "the ticket is for b, asked for is a" in caplog.text
        assert nodes.got == {A: []}


async def test_the_owner_says_no_before_anything_is_used(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory, owner = serve_nodes(plane, A), Memory(), ScriptedOwner(lambda question: f"not for {question.user}")
        relay = await add_guarded_relay(plane, porter_of(memory, owner=owner), nodes.port, mint, host=A)
        await refused(plane.add_door())
        assert not memory.spent
        assert nodes.got[A] == []
        assert relay.desk.counters.refused_by_service == {SERVICE: {"forbidden": 1}}
        assert "not for alice" in caplog.text


class CountedSeat:
    """Implements `Seat`."""

    def __init__(self) -> None:
        self.taken = 0
        self.released = 0

    async def take(self) -> Taken:
        await trio.lowlevel.checkpoint()
        self.taken += 1
        return Taken()

    def watch(self, lost: Callable[[], None]) -> None: ...

    def release(self) -> None:
        self.released += 1


class SeatedChooser(ScriptedChooser):
    """Its nodes are for one user each."""

    def __init__(self, *nodes: Spec) -> None:
        super().__init__(*nodes)
        self.seat = CountedSeat()

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        answer = await super().choose(wanted, excluded)
        return replace(answer, seat=self.seat) if isinstance(answer, Node) else answer


@pytest.mark.parametrize("reason", [None, "not hers"])
async def test_who_may_not_have_a_node_does_not_reserve_it(contexts: Contexts, reason: str | None) -> None:
    async with open_plane(contexts) as plane:
        nodes, chooser = serve_nodes(plane, A), SeatedChooser(Spec("a", is_local=True))
        admission = porter_of(Memory(), owner=ScriptedOwner(lambda question: reason))
        await add_guarded_relay(plane, admission, nodes.port, mint, chooser=chooser, host=A)
        port = plane.add_door()
        if reason is None:
            assert await ask(port) == A.encode()
        else:
            await refused(port)
        assert chooser.seat.taken == (1 if reason is None else 0)
        await chooser.settled()


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_store_that_is_away(contexts: Contexts, refuses: bool) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory = serve_nodes(plane, A), Memory()
        memory.is_away = True
        rules = TicketRules(RULES.keys, SERVICE, refuses_without_store=refuses)
        relay = await add_guarded_relay(plane, porter_of(memory, ticket=rules), nodes.port, mint, host=A)
        port = plane.add_door()
        if refuses:
            await refused(port)
            assert relay.desk.counters.refused_by_service == {SERVICE: {"busy": 1}}
        else:
            assert await ask(port) == A.encode()


async def test_what_a_relay_without_its_store_cannot_tell_another_one_is_asked(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, cut_off, memory, ticket = serve_nodes(plane, A), Memory(), Memory(), mint()
        cut_off.is_away = True
        for name, its in (("a", cut_off), ("b", memory)):
            await add_guarded_relay(plane, porter_of(its, name), nodes.port, lambda: ticket, host=A)
        port = plane.add_door()
        assert await ask(port) == A.encode()
        assert nodes.got[A] == [b"hello"]
        assert len(memory.spent) == 1
        await refused(port)  # it is used now
        assert not cut_off.spent


async def test_a_memory_that_hangs_ends_in_a_refusal(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory = serve_nodes(plane, A), Memory()
        memory.hangs = True
        limits = DeliveryLimits(place_timeout_s=0.3)
        relay = await add_guarded_relay(plane, porter_of(memory), nodes.port, mint, host=A, limits=limits)
        await refused(plane.add_door(), within_s=5)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-timeout": 1}}
        assert relay.desk.streams == 0


async def test_a_ticket_whose_use_is_broken_off_is_not_given_back() -> None:
    """Nobody knows then whether it was used before: whoever shows a used one and leaves at once must not make it good again."""
    memory = Memory()
    client_admission = porter_of(memory).receive(SERVICE, "192.0.2.1:5", "t")
    caller = client_admission.identify(mint())
    assert isinstance(caller, Caller)
    memory.hangs = True
    with trio.move_on_after(0.01):
        await client_admission.use(caller, "a")
    await client_admission.give_back()
    assert memory.given_back == []


async def test_a_stream_that_is_given_up_while_it_is_looked_at(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, memory = serve_nodes(plane, A), Memory()
        memory.hangs = True
        admission = porter_of(memory, limits=StreamLimits(per_user=1, per_address=1))
        relay = await add_guarded_relay(plane, admission, nodes.port, mint, host=A)
        stream = await connect(plane.add_door(open_timeout_s=0.2))
        await until(lambda: len(admission.quotas) == 2)
        assert await until_reset(stream, 5) == b""
        await until(lambda: not len(admission.quotas) and relay.desk.streams == 0)


async def test_limits_are_by_user_and_by_address(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        users = iter(["alice", "alice", "alice", "bob", "carol", "alice"])
        nodes, memory = serve_nodes(plane, A), Memory()
        admission = porter_of(memory, limits=StreamLimits(per_user=2, per_address=3))
        relay = await add_guarded_relay(plane, admission, nodes.port, lambda: mint(next(users)), host=A)
        port = plane.add_door()
        streams = [await connect(port) for _ in range(2)]
        await until(lambda: len(memory.spent) == 2)
        await refused(port)  # alice's third
        streams.append(await connect(port))
        await until(lambda: len(memory.spent) == 3)
        await refused(port)  # the address's fourth
        assert relay.desk.counters.refused_by_service == {SERVICE: {"over-limit": 2}}
        await streams.pop(0).aclose()
        await until(lambda: len(relay.desk.deliveries) == 2)
        streams.append(await connect(port))
        await until(lambda: len(memory.spent) == 4)
        for stream in streams:
            await stream.aclose()
        await until(lambda: not len(admission.quotas))


async def test_where_tickets_are_optional_the_address_counts(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        shown = iter(["", mint("bob"), "nonsense"])
        nodes, memory, owner = serve_nodes(plane, A), Memory(), ScriptedOwner()
        rules = TicketRules(RULES.keys, SERVICE, is_required=False)
        chooser = ScriptedChooser(Spec("a", is_local=True))
        admission = porter_of(memory, ticket=rules, owner=owner)
        await add_guarded_relay(plane, admission, nodes.port, lambda: next(shown), chooser=chooser, host=A)
        port = plane.add_door()
        assert [await ask(port) for _ in range(2)] == [A.encode()] * 2
        await refused(port)  # a bad one is worse than none
        assert [(wanted.user, wanted.is_proven) for wanted, _ in chooser.asked] == [("127.0.0.1", False), ("bob", True)]
        assert [question.user for question in owner.asked] == ["", "bob"]


async def test_without_a_porter_nobody_gets_in(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, A)
        relay = await add_guarded_relay(plane, porter_of(Memory()), nodes.port, mint, host=A)
        assert relay.desk.placer is not None
        relay.desk.placer.entries = None
        port = plane.add_door()
        await refused(port)
        relay.desk.placer = None
        await refused(port)
        assert nodes.got[A] == []


async def test_a_service_whose_rules_are_not_known_is_closed(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes, admission = serve_nodes(plane, A), porter_of(Memory())
        admission.reconfigure({})
        await add_guarded_relay(plane, admission, nodes.port, mint, host=A)
        await refused(plane.add_door())
        assert nodes.got[A] == []


async def test_the_log_says_why_and_never_what(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_plane(contexts) as plane:
        nodes, ticket = serve_nodes(plane, A), mint(now=1_699_999_800)
        await add_guarded_relay(plane, porter_of(Memory()), nodes.port, lambda: ticket, host=A)
        await refused(plane.add_door())
    (record,) = [record for record in caplog.records if getattr(record, "refused", "")]
    assert "it expired 140 s ago" in record.getMessage()
    assert (record.why, record.client, record.service) == ("expired", "127.0.0.1", SERVICE)
    assert ticket not in caplog.text
    assert ticket.split(".")[2] not in caplog.text


def test_a_place_is_taken_and_given_back() -> None:
    quotas, key = Quotas(), ("s", "user", "alice")
    assert [quotas.take(key, 2) for _ in range(3)] == [True, True, False]
    quotas.give_back(key)
    assert quotas.take(key, 2)
    for _ in range(2):
        quotas.give_back(key)
    assert len(quotas) == 0


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("", ""),
        ("door", "door"),
    ],
)
def test_a_source_is_an_address_or_a_64(address: str, source: str) -> None:
    assert source_of(address) == source


async def test_a_node_that_never_answers_costs_no_ticket(contexts: Contexts) -> None:
    with hanging_port() as target:
        async with open_plane(contexts) as plane:
            memory = Memory()
            limits = DeliveryLimits(connect_timeout_s=0.3)
            relay = await add_guarded_relay(plane, porter_of(memory), target, mint, limits=limits)
            stream = await connect(plane.add_door())
            assert await until_reset(stream, 5) == b""
            await until(lambda: relay.desk.streams == 0)
            assert (memory.spent, len(memory.given_back)) == ([], 1)
