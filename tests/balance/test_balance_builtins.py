"""The built-in entries one by one, and all of them under a burst of logins that meets old metrics."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from balance_samples import GB, LOGIN, START, candidate, candidates, ids, server
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance import builtins
from fxrelay.balance.builtins import BUILTINS, Choose
from fxrelay.balance.model import Candidate, Chosen, Passed, Verdict
from fxrelay.cluster.inflight import InFlight, Placement, PlacementId
from fxrelay.cluster.server import ServerObject
from fxtunnel.model import RelayId

A = RelayId("a")


@st.composite
def some_candidates(draw: st.DrawFn) -> list[Candidate]:
    names = sorted(draw(st.sets(st.sampled_from([f"n{n}" for n in range(8)]), max_size=8)))
    return [
        candidate(
            name,
            draw(st.integers(0, 5)),
            sessions=draw(st.integers(0, 6)),
            maxSessions=draw(st.integers(0, 8)),
            weight=draw(st.integers(0, 3)),
            availmem=draw(st.integers(0, 8)) * GB,
            totalmem=draw(st.integers(0, 8)) * GB,
        )
        for name in names
    ]


@given(st.sampled_from([*BUILTINS]), some_candidates(), st.sampled_from(["n1", "elsewhere"]), st.text())
def test_one_of_the_candidates_or_no_opinion(name: str, offered: list[Candidate], local_id: str, user: str) -> None:
    verdict = BUILTINS[name](replace(LOGIN, user=user), offered, RelayId(local_id))
    if isinstance(verdict, Chosen):
        assert verdict.server_id in [each.server_id for each in offered]
    else:
        assert verdict == Passed()
        assert not offered or name in ("local", "weighted-least")


@given(some_candidates(), st.integers(1, 10**12))
def test_round_robin_takes_one_of_the_candidates(offered: list[Candidate], number: int) -> None:
    verdict = builtins.round_robin(offered, number)
    assert verdict == (Chosen(offered[(number - 1) % len(offered)].server_id) if offered else Passed())


@pytest.mark.parametrize("name", ["fewest-sessions", "most-available-memory", "weighted-least", "pack"])
def test_equals_are_told_apart_by_id(name: str) -> None:
    assert BUILTINS[name](LOGIN, candidates("a", "b", "c"), A) == Chosen(A)


@pytest.mark.parametrize(
    ("name", "offered", "expected"),
    [
        ("fewest-sessions", [candidate("a", sessions=3), candidate("b", sessions=2)], "b"),
        ("fewest-sessions", [candidate("a", sessions=3), candidate("b", 2, sessions=2)], "a"),
        ("most-available-memory", [candidate("a", availmem=GB), candidate("b", availmem=2 * GB)], "b"),
        ("most-available-memory", [candidate("a", availmem=GB), candidate("b", 2, availmem=2 * GB)], "a"),
        ("most-available-memory", [candidate("a", 3), candidate("b", 2)], "b"),
        ("weighted-least", [candidate("a", sessions=9, weight=10), candidate("b", sessions=15, weight=20)], "b"),
        ("weighted-least", [candidate("a", sessions=9, weight=10), candidate("b", 6, sessions=15, weight=20)], "a"),
        ("weighted-least", [candidate("a", weight=0), candidate("b", sessions=500, weight=1)], "b"),
        ("local", candidates("a", "b"), "a"),
        ("pack", [candidate("a", sessions=3, maxSessions=10), candidate("b", sessions=7, maxSessions=10)], "b"),
        ("pack", [candidate("a", sessions=3, maxSessions=10), candidate("b", sessions=8, maxSessions=10)], "a"),
        ("pack", [candidate("a", sessions=3, maxSessions=10), candidate("b", 1, sessions=7, maxSessions=10)], "a"),
        ("pack", [candidate("a", sessions=9, maxSessions=10), candidate("b", sessions=8, maxSessions=10)], "b"),
        ("pack", [candidate("a", availmem=6 * GB, totalmem=8 * GB), candidate("b", availmem=3 * GB, totalmem=8 * GB)], "b"),
        ("pack", [candidate("a", availmem=6 * GB, totalmem=8 * GB), candidate("b", 2, availmem=3 * GB, totalmem=8 * GB)], "a"),
        ("pack", [candidate("a"), candidate("b", availmem=6 * GB, totalmem=8 * GB)], "b"),
    ],
)
def test_which_is_taken(name: str, offered: list[Candidate], expected: str) -> None:
    assert BUILTINS[name](LOGIN, offered, A) == Chosen(RelayId(expected))


def test_weight_nothing_takes_none() -> None:
    assert builtins.weighted_least(LOGIN, [candidate("a", weight=0)], A) == Passed()


def test_local_elsewhere_has_no_opinion() -> None:
    assert builtins.local(LOGIN, candidates("b", "c"), A) == Passed()


def of_users(offered: Sequence[Candidate], users: int = 2_000) -> dict[str, Verdict]:
    return {user: builtins.user_hash(replace(LOGIN, user=user), offered, A) for user in (f"user{n}" for n in range(users))}


def test_user_hash_is_the_users_alone_and_spreads_them() -> None:
    offered = candidates(*"abcdefgh")
    first = of_users(offered)
    assert first == of_users(offered[::-1])
    assert first == {user: builtins.user_hash(replace(START, user=user), offered, RelayId("h")) for user in first}
    counts = Counter(first.values())
    assert len(counts) == 8
    assert max(counts.values()) < 1.3 * 250


def test_user_hash_moves_only_those_whose_server_went() -> None:
    before, after = of_users(candidates(*"abcdefgh")), of_users(candidates(*"abcdfgh"))
    moved = {user for user in before if before[user] != after[user]}
    assert moved == {user for user in before if before[user] == Chosen(RelayId("e"))}


def test_round_robin_is_even() -> None:
    offered = candidates("a", "b", "c")
    taken = [builtins.round_robin(offered, number) for number in range(1, 8)]
    assert taken == [Chosen(server_id) for server_id in itertools.islice(itertools.cycle(ids("a", "b", "c")), 7)]


NODES, LOGINS, BURST_S, PERIOD_S = 8, 200, 60.0, 30.0
TOTAL_BYTES = 256 * GB


class Herd:
    """Nodes that publish every PERIOD_S, each at a time of its own; relays that hear of others' placements `delay_s` later."""

    def __init__(self, choose: Choose, relays: int, *, counting: bool, delay_s: float = 0.2) -> None:
        self.choose = choose
        self.counting = counting
        self.delay_s = delay_s
        self.landed: Counter[RelayId] = Counter()
        self.flights = [InFlight() for _ in range(relays)]
        self.heard: list[tuple[float, int, Placement]] = []
        self.published: dict[RelayId, ServerObject] = {}

    def run(self, seed: int) -> Counter[RelayId]:
        rng = Random(seed)
        nodes = [RelayId(f"n{number}") for number in range(NODES)]
        phases = {node: rng.uniform(0, PERIOD_S) for node in nodes}
        for node in nodes:
            self.publish(node, 0.0)
        events: list[tuple[float, RelayId | None]] = [(rng.uniform(0, BURST_S), None) for _ in range(LOGINS)]
        events += [(phases[node] + turn * PERIOD_S, node) for node in nodes for turn in range(3)]
        for number, (now, node) in enumerate(sorted(events, key=lambda event: event[0])):
            self.deliver(now)
            if node is not None:
                self.publish(node, now)
            else:
                self.place(number, now, rng.randrange(len(self.flights)))
        return self.landed

    def publish(self, node: RelayId, now: float) -> None:
        sessions = self.landed[node]
        memory_bytes = TOTAL_BYTES - sessions * builtins.PLACEMENT_BYTES
        self.published[node] = server(node, sessions=sessions, availmem=memory_bytes, totalmem=TOTAL_BYTES)
        for flights in self.flights:
            flights.measured(node, int(now * 1000))

    def place(self, number: int, now: float, relay: int) -> None:
        counts = self.flights[relay].counts(now) if self.counting else {}
        offered = [Candidate(self.published[node], counts.get(node, 0)) for node in sorted(self.published)]
        verdict = self.choose(LOGIN, offered, RelayId("n0"))
        assert isinstance(verdict, Chosen)
        self.landed[verdict.server_id] += 1
        placement = Placement(PlacementId(f"p{number}"), verdict.server_id, int(now * 1000))
        self.flights[relay].add(placement, now)
        self.heard += [(now + self.delay_s, other, placement) for other in range(len(self.flights)) if other != relay]

    def deliver(self, now: float) -> None:
        for at, relay, placement in [each for each in self.heard if each[0] <= now]:
            self.flights[relay].add(placement, at)
        self.heard = [each for each in self.heard if each[0] > now]


SPREADING: list[Choose] = [builtins.fewest_sessions, builtins.most_available_memory, builtins.weighted_least]
name_of: Callable[[Choose], str] = lambda choose: choose.__name__  # noqa: E731 - for parametrize


@pytest.mark.parametrize("choose", SPREADING, ids=name_of)
@pytest.mark.parametrize("relays", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_spread_although_metrics_are_old(choose: Choose, relays: int, seed: int) -> None:
    landed = Herd(choose, relays, counting=True).run(seed)
    assert sum(landed.values()) == LOGINS
    assert max(landed.values()) <= 1.1 * LOGINS / NODES


@pytest.mark.parametrize("choose", SPREADING, ids=name_of)
def test_without_counting_what_is_on_its_way_a_burst_is_a_herd(choose: Choose) -> None:
    assert all(max(Herd(choose, 1, counting=False).run(seed).values()) > 1.8 * LOGINS / NODES for seed in range(5))


@pytest.mark.parametrize("relays", [1, 3])
def test_a_burst_fills_servers_up_to_their_mark_and_no_further(relays: int) -> None:
    herd = Herd(pack_of_40, relays, counting=True)
    landed = herd.run(1)
    assert max(landed.values()) <= 32 + relays
    assert sum(count >= 30 for count in landed.values()) == 6
    assert max(Herd(pack_of_40, relays, counting=False).run(1).values()) > 40


def pack_of_40(request: object, offered: Sequence[Candidate], local_id: RelayId) -> Verdict:
    limited = [replace(each, server=replace(each.server, max_sessions=40)) for each in offered]
    return builtins.pack(LOGIN, limited, local_id)
