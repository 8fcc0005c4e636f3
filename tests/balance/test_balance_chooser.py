"""Nodes for streams: which ways lead to them, who is left out, and what the other relays are told."""

import json
import time
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
import trio
import trio.lowlevel
from balance_samples import DESK, Says, ids, server, server_text

from fxrelay.balance.chain import builtin
from fxrelay.balance.chooser import TAKES_NO_PART, Balancing, PoolChooser
from fxrelay.balance.environment import ClusterEnvironment
from fxrelay.balance.holders import Holders
from fxrelay.balance.model import Action, Chosen, Failed
from fxrelay.balance.path_rules import PathRules
from fxrelay.balance.reservations import Login, OwnerRelogin, Record
from fxrelay.balance.script_input import script_input
from fxrelay.balance.seating import SeatRules
from fxrelay.cluster.members import Ages
from fxrelay.cluster.placement_news import PlacementNews
from fxrelay.cluster.ports import PLACEMENTS, SERVERS, Message
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxtunnel.codes import Code
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.model import GatewayId, RelayId, ServiceName

GATEWAY = GatewayId("gw")
WANTED = Wanted(ServiceName("desk"), "192.0.2.1:5", GATEWAY, "t1")
ALL = ("local", "redirect", "direct")
LAN = ("10.0.0.0/8", "fc00::/7")


def path_rules(**fields: Any) -> PathRules:
    networks = tuple(ip_network(network) for network in fields.pop("networks", LAN))
    return PathRules(
        **{"server_id": RelayId("a"), "paths": ALL, "force_indirect": False, "networks": networks, "address": "10.0.0.1"} | fields
    )


@pytest.mark.parametrize(
    ("own", "fields", "expected"),
    [
        ({}, {"address": "10.1.2.3"}, "10.1.2.3"),
        ({}, {"address": "fd00::0:1"}, "fd00::1"),
        ({}, {"address": ""}, ""),
        ({}, {"address": "11.1.2.3"}, ""),
        ({}, {"address": "169.254.169.254"}, ""),
        ({}, {"address": "fe80::1"}, ""),
        ({}, {"address": "node.example.com"}, ""),
        ({}, {"address": "10.1.2.3:22"}, ""),
        ({}, {"address": "127.0.0.1"}, ""),
        ({"networks": ("0.0.0.0/0",)}, {"address": "127.0.0.1"}, ""),
        ({"address": "127.0.0.1"}, {"address": "127.0.0.2"}, "127.0.0.2"),
        ({"address": "127.0.0.1"}, {"address": "10.1.2.3"}, "10.1.2.3"),
        ({"address": ""}, {"address": "127.0.0.1"}, ""),
        ({"address": "node.example.com"}, {"address": "127.0.0.1"}, ""),
        ({}, {"address": "::ffff:127.0.0.1"}, ""),
        ({"networks": ("::/0",)}, {"address": "::ffff:127.0.0.1"}, ""),
        ({"networks": ("0.0.0.0/0", "::/0")}, {"address": "169.254.169.254"}, ""),
        ({"networks": ("0.0.0.0/0", "::/0")}, {"address": "::ffff:169.254.169.254"}, ""),
        ({"networks": ("0.0.0.0/0", "::/0")}, {"address": "0.0.0.0"}, ""),
        ({"force_indirect": True}, {"address": "10.1.2.3"}, ""),
        ({}, {"address": "10.1.2.3", "forceIndirect": True}, ""),
        ({"paths": ("local", "redirect")}, {"address": "10.1.2.3"}, ""),
    ],
)
def test_where_a_direct_connection_may_go(own: dict[str, Any], fields: dict[str, Any], expected: str) -> None:
    assert path_rules(**own).direct_address(server("b", **fields)) == expected


def test_which_servers_a_gateway_reaches_by_itself() -> None:
    there = server("b", gateways=["gw"])
    assert path_rules().can_redirect(there, GATEWAY)
    assert not path_rules().can_redirect(there, GatewayId("gw2"))
    assert not path_rules(server_id=RelayId("b")).can_redirect(there, GATEWAY)
    assert not path_rules(paths=("local", "direct")).can_redirect(there, GATEWAY)


class Surroundings:
    """A store and a transporter."""

    def __init__(self) -> None:
        self.error = False
        self.hang_s = 0.0
        self.number = 40
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.batches = 0
        self.news = PlacementNews(self, Threads())

    def add(self, counter: str, amount: int) -> int:
        time.sleep(self.hang_s)
        if self.error:
            raise StoreError("away")
        self.number += amount
        return self.number

    def publish(self, topic: str, *texts: str) -> None:
        if self.error:
            raise TransporterError("away")
        self.said += [(topic, json.loads(text)) for text in texts]
        self.batches += 1


def make(around: Surroundings, *entries: Any) -> tuple[PoolChooser, ClusterView]:
    view = ClusterView(Ages(), time.monotonic)
    view.store_said(1_000_000)
    for text in (server_text("a"), server_text("b", address="10.0.0.2"), server_text("c", gateways=["gw"]), server_text("d")):
        view.hear(Message(SERVERS, text))
    environment = ClusterEnvironment(RelayId("a"), around, Threads())
    chooser = PoolChooser(view, path_rules(), environment, around.news.tell, "i" * 40)
    chain = entries or (builtin("fewest-sessions", "desk"),)
    chooser.reconfigure({ServiceName("desk"): Balancing(DESK, chain)})
    return chooser, view


async def test_all_ways_in_turn_and_those_tried_are_left_out() -> None:
    chooser, _ = make(Surroundings())
    found = []
    for tried in (ids(), ids("a"), ids("a", "b")):
        node = await chooser.choose(WANTED, frozenset(tried))
        assert isinstance(node, Node)
        node.claim.release()
        found.append((node.server_id, node.is_local, node.address, node.can_redirect))
    assert found == [("a", True, "", False), ("b", False, "10.0.0.2", False), ("c", False, "", True)]
    none = await chooser.choose(WANTED, frozenset(ids("a", "b", "c")))
    assert isinstance(none, NoNode)
    assert (none.code, none.text, none.name) == (Code.CONNECT_FAILED, "NoServerAvailable (trace t1)", "NoServerAvailable")
    assert chooser.failures == {"NoServerAvailable": 1}


async def test_built_in_entries_need_no_task() -> None:
    chooser, view = make(Surroundings())
    found = [chooser.choose_nowait(WANTED) for _ in range(3)]
    assert [node.server_id for node in found if node is not None] == list("abc"), "those on their way count at once"
    assert (chooser.decisions, len(view.in_flight)) == (3, 3)
    slow = await chooser.choose(WANTED, frozenset())
    assert isinstance(slow, Node)
    assert slow.server_id == "a"
    for node in (*found, slow):
        assert node is not None
        node.claim.release()
    assert not len(view.in_flight)


async def test_what_has_to_wait_or_to_be_explained_needs_one() -> None:
    chooser, view = make(Surroundings())
    assert chooser.choose_nowait(replace(WANTED, service=ServiceName("nothing"))) is None
    assert chooser.choose_nowait(replace(WANTED, node=RelayId("nobody"))) is None
    assert chooser.failures == {}, "the task counts it, and says why"
    with chooser._lines[ServiceName("desk")].place(0.0):
        assert chooser.choose_nowait(WANTED) is None, "others wait, and came before"
    assert chooser.choose_nowait(WANTED) is not None
    pools = {ServiceName("desk"): Balancing(DESK, (builtin("fewest-sessions", "desk"),), Action.LOGIN, SeatRules(always=True))}
    chooser.reconfigure(pools)
    assert chooser.choose_nowait(WANTED) is None, "a seat has to be taken"
    for entry in (Says(Chosen(RelayId("a"))), builtin("round-robin", "desk")):
        scripted, _ = make(Surroundings(), entry)
        assert scripted.choose_nowait(WANTED) is None
    assert len(view.in_flight) == 1


async def test_refusals_tell_the_gateway_no_more_than_a_name() -> None:
    chooser, _ = make(Surroundings(), Says(Failed("Licence", "secret-server is full", "stack")))
    refused = await chooser.choose(WANTED, frozenset())
    assert refused == NoNode(Code.CONNECT_FAILED, "Licence (trace t1)", "Licence", "secret-server is full")  # the last two are for the user
    chooser, _ = make(Surroundings(), Says(Failed("Licence", "none left", is_refusal=True)))
    assert await chooser.choose(WANTED, frozenset()) == NoNode(Code.FORBIDDEN, "Licence (trace t1)", "Licence", "none left")
    chooser.reconfigure({})
    assert await chooser.choose(WANTED, frozenset()) == NoNode(Code.NO_SERVICE, "not served here")
    chooser, _ = make(Surroundings(), Says(Chosen(RelayId("gone"))))
    assert await chooser.choose(WANTED, frozenset()) == NoNode(
        Code.CONNECT_FAILED, "ServerGone (trace t1)", "ServerGone", "The server chosen has gone."
    )


async def test_scripts_are_told_what_is_known_of_the_user() -> None:
    says = Says(Chosen(RelayId("a")))
    chooser, view = make(Surroundings(), says)
    of_ann, of_bob = {"owner": "ann", "sessionId": "1"}, {"owner": "bob", "sessionId": "2"}
    for name, listed in (("b", [of_bob, "x", {"owner": 3}]), ("a", [of_ann, of_bob]), ("c", "ann"), ("d", [{"owner": ["ann"]}])):
        view.hear(Message(SERVERS, server_text(name, seq=9, sessionList=listed)))
    login = replace(WANTED, user="bob", action="user/login", data={"serverId": "b", "password": "x", "admin": True})
    proven = replace(WANTED, user="ann", is_proven=True, groups=("cad",), node=RelayId("a"))
    for wanted in (login, proven, replace(WANTED, user="ann")):
        assert isinstance(await chooser.choose(wanted, frozenset()), Node)
    at_login, at_start, nobody = says.requests
    assert (at_login.action, at_login.user, at_login.sessions, at_login.claims) == (Action.LOGIN, "bob", (of_bob, of_bob), {})
    told = json.loads(script_input(at_login, (), RelayId("a")).base)
    assert (told["user"]["serverId"], told["data"]) == ("b", {"serverId": "b", "admin": True})
    assert (at_start.user, at_start.groups, at_start.sessions, at_start.claims) == ("ann", ("cad",), (of_ann,), {"sub": "ann"})
    assert json.loads(script_input(at_start, (), RelayId("a")).base)["user"]["serverId"] == "a"
    assert (nobody.user, nobody.sessions, nobody.claims, nobody.data) == ("", (), {}, {})


async def test_claims_are_counted_here_and_told_to_others() -> None:
    around = Surroundings()
    chooser, view = make(around)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(around.news.run)
        first = await chooser.choose(WANTED, frozenset())
        second = await chooser.choose(WANTED, frozenset())
        assert isinstance(first, Node)
        assert isinstance(second, Node)
        assert (first.server_id, second.server_id) == ("a", "b")
        first.claim.connected()
        first.claim.release()
        first.claim.release()
        second.claim.hand_over()
        second.claim.release()
        assert view.in_flight.counts(view.now) == {"b": 1}
        with trio.fail_after(20):
            while {said["serverId"]: said["event"] for _, said in around.said} != {"a": "ended", "b": "placed"}:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert {topic for topic, _ in around.said} == {PLACEMENTS}
    assert len({said["id"] for _, said in around.said}) == 2


async def test_what_changes_while_others_are_told_goes_out_together_as_it_is_then() -> None:
    around = Surroundings()
    chooser, _ = make(around)
    for _ in range(50):
        node = await chooser.choose(WANTED, frozenset())
        assert isinstance(node, Node)
        node.claim.connected()
        node.claim.release()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(around.news.run)
        with trio.fail_after(20):
            while len(around.said) < 50:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert {said["event"] for _, said in around.said} == {"ended"}
    assert around.batches == 1


async def test_claims_work_while_nobody_can_be_told() -> None:
    around = Surroundings()
    around.error = True
    chooser, view = make(around)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(around.news.run)
        for _ in range(20):
            assert isinstance(await chooser.choose(WANTED, frozenset()), Node)
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert sum(view.in_flight.counts(view.now).values()) == 20


async def test_numbers_come_from_the_store_or_from_here() -> None:
    around = Surroundings()
    environment = ClusterEnvironment(RelayId("a"), around, Threads())
    assert [await environment.next_number("x") for _ in range(2)] == [41, 42]
    around.error = True
    assert [await environment.next_number("x") for _ in range(2)] == [43, 44]
    assert await environment.next_number("y") == 1
    around.error, around.hang_s = False, 2.0
    with trio.fail_after(20):
        assert await environment.next_number("x") == 45


async def test_a_named_node_must_belong_to_the_pool_and_need_not_take_new_sessions() -> None:
    around = Surroundings()
    chooser, view = make(around)
    view.hear(Message(SERVERS, server_text("e", address="10.0.0.5", draining=True)))
    view.hear(Message(SERVERS, server_text("f", address="10.0.0.6", services=["other"])))
    for name, address in (("b", "10.0.0.2"), ("e", "10.0.0.5")):
        node = await chooser.named(WANTED, RelayId(name))
        assert isinstance(node, Node)
        assert (node.server_id, node.address) == (name, address)
        node.claim.connected()
        node.claim.release()
    assert view.in_flight.counts(view.now) == {}
    for name in ("f", "nobody"):
        assert await chooser.named(WANTED, RelayId(name)) == NoNode(Code.NO_SERVICE, "no such node in the pool")
    chooser.reconfigure({})
    assert isinstance(await chooser.named(WANTED, RelayId("b")), NoNode)


class Seats:
    """Who has what, and no seats."""

    def __init__(self, **users: str) -> None:
        self.holders = Holders()
        self.changed = trio.Event()
        for name, user in users.items():
            login = Login("l", user, "a", 1 << 60, 1 << 59)
            self.holders.learn(RelayId(name), Record("e", 1, 0, (login,), revision=1))

    def seat(self, server_id: RelayId, user: str, rules: SeatRules, would_do: Any = None) -> Any:
        raise AssertionError("a session start takes no seat")


async def test_guarded_starts_are_kept_off_others_servers_and_not_off_ones_own() -> None:
    chooser, _ = make(Surroundings())
    chain = (builtin("fewest-sessions", "desk"),)

    def guarded(value: bool) -> None:
        chooser.reconfigure({ServiceName("desk"): Balancing(DESK, chain, Action.START, SeatRules(guard_start=value))})

    async def chosen(wanted: Wanted) -> str:
        at_once = chooser.choose_nowait(wanted)
        assert at_once is not None
        at_once.claim.release()
        node = await chooser.choose(wanted, frozenset())
        assert isinstance(node, Node)
        node.claim.release()
        assert node.server_id == at_once.server_id
        return node.server_id

    mine, proven = replace(WANTED, client="192.0.2.7:5"), replace(WANTED, user="ann", is_proven=True)
    chooser.seating = Seats(a="192.0.2.7", b="ann")
    guarded(True)
    assert await chosen(WANTED) == "c"
    assert await chosen(mine) == "a", "a stream without a ticket is its address's"
    assert await chosen(proven) == "b"
    chooser.seating = Seats(a="ann", b="ann", c="ann", d="ann")
    refusal = await chooser.choose(WANTED, frozenset())
    assert isinstance(refusal, NoNode)
    guarded(False)
    assert await chosen(WANTED) == "a"
    chooser.seating = None
    assert await chosen(WANTED) == "a"
    guarded(True)
    assert chooser.choose_nowait(WANTED) is None
    assert await chooser.choose(WANTED, frozenset()) == NoNode(Code.CONNECT_FAILED, TAKES_NO_PART), "nothing known of reservations: closed"


class HomeSeats(Seats):
    """Seats that tell what they were asked; ann has c, and nobody has been told yet."""

    def __init__(self) -> None:
        super().__init__()
        self.sought: list[str] = []
        self.would_do: Any = None

    async def find_homes(self, user: str) -> None:
        await trio.lowlevel.checkpoint()
        self.sought.append(user)
        self.holders.learn(RelayId("c"), Record("e", 1, 0, (Login("l", user, "a", 1 << 60, 1 << 59),), revision=1))

    def seat(self, server_id: RelayId, user: str, rules: SeatRules, would_do: Any = None) -> Any:
        self.would_do = would_do
        return object()


async def test_a_stream_that_came_back_goes_to_the_node_that_is_its_users() -> None:
    chooser, _ = make(Surroundings())
    chain = (builtin("fewest-sessions", "desk"),)
    chooser.reconfigure({ServiceName("desk"): Balancing(DESK, chain, Action.LOGIN, SeatRules(always=True))})
    seats = chooser.seating = HomeSeats()
    ann = replace(WANTED, user="ann")
    first = await chooser.choose(ann, frozenset())
    assert isinstance(first, Node)
    assert (first.server_id, seats.sought) == ("a", [])
    assert [name for name in "abcx" if seats.would_do(name)] == list("abc"), "also those that somebody is just being sent to"
    again = await chooser.choose(replace(ann, came_back=True), frozenset())
    assert isinstance(again, Node)
    assert (again.server_id, seats.sought) == ("c", ["ann"])
    await chooser.choose(ann, frozenset({RelayId("b")}))
    assert not seats.would_do("b"), "a node that could not be reached keeps nobody off the others"
    several = SeatRules(always=True, relogin=OwnerRelogin.DENY)
    chooser.reconfigure({ServiceName("desk"): Balancing(DESK, chain, Action.LOGIN, several)})
    await chooser.choose(replace(ann, user="bob"), frozenset())
    assert seats.would_do is None
