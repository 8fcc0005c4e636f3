"""Which relay gets a client."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgateway.routing.offers import Forward, OfferTable, Readiness, Reject, RejectReason
from fxtunnel.model import RelayId, ServiceName

SSH = ServiceName("ssh")
DB = ServiceName("db")


@dataclass
class FakeRelay:
    relay_id: RelayId
    readiness: Readiness = Readiness.UP
    open_streams: int = 0


def relay(name: str, readiness: Readiness = Readiness.UP, streams: int = 0) -> FakeRelay:
    return FakeRelay(RelayId(name), readiness, streams)


def table(*relays: FakeRelay) -> OfferTable[FakeRelay]:
    offers: OfferTable[FakeRelay] = OfferTable()
    for one in relays:
        offers.put(one, [SSH])
    return offers


def chosen(decision: Forward[FakeRelay] | Reject) -> str:
    return decision.relay.relay_id if isinstance(decision, Forward) else decision.reason.value


UP, RELUCTANT, LEAVING, HELD, NONE = Readiness

DECISIONS: dict[str, tuple[list[FakeRelay], set[str], str]] = {
    "nobody": ([], set(), "no-relay"),
    "the only one": ([relay("a", UP, 900)], set(), "a"),
    "the only one is held": ([relay("a", HELD)], set(), "a"),
    "the only one is gone": ([relay("a", NONE)], set(), "no-relay"),
    "the only one was tried": ([relay("a")], {"a"}, "all-refused"),
    "another was tried": ([relay("a")], {"z"}, "a"),
    "fewest streams": ([relay("a", UP, 3), relay("b", UP, 1), relay("c", UP, 2)], set(), "b"),
    "equal: the first": ([relay("a", UP, 1), relay("b", UP, 1)], set(), "a"),
    "up before held": ([relay("a", HELD, 0), relay("b", UP, 900)], set(), "b"),
    "up before held, the other way round": ([relay("b", UP, 900), relay("a", HELD, 0)], set(), "b"),
    "the only one is reluctant": ([relay("a", RELUCTANT)], set(), "a"),
    "willing before reluctant": ([relay("a", RELUCTANT, 0), relay("b", UP, 900)], set(), "b"),
    "reluctant before one that makes way": ([relay("a", LEAVING, 0), relay("b", RELUCTANT, 900)], set(), "b"),
    "fewest streams of the reluctant": ([relay("a", RELUCTANT, 5), relay("b", RELUCTANT, 4)], set(), "b"),
    "all willing were tried": ([relay("a", UP), relay("b", RELUCTANT, 7)], {"a"}, "b"),
    "held before nothing": ([relay("a", NONE, 0), relay("b", HELD, 5)], set(), "b"),
    "fewest streams of the held": ([relay("a", HELD, 5), relay("b", HELD, 4)], set(), "b"),
    "all gone": ([relay("a", NONE), relay("b", NONE)], set(), "no-relay"),
    "the best was tried": ([relay("a", UP, 0), relay("b", UP, 7)], {"a"}, "b"),
    "all up were tried": ([relay("a", UP, 0), relay("b", HELD, 7)], {"a"}, "b"),
    "all were tried": ([relay("a"), relay("b")], {"a", "b"}, "all-refused"),
    "the rest is gone": ([relay("a"), relay("b", NONE)], {"a"}, "all-refused"),
}


@pytest.mark.parametrize(("relays", "tried", "expected"), DECISIONS.values(), ids=DECISIONS)
def test_the_readiest_relay_with_the_fewest_streams_is_chosen(relays: list[FakeRelay], tried: set[str], expected: str) -> None:
    assert chosen(table(*relays).decide(SSH, {RelayId(name) for name in tried})) == expected


def test_only_relays_that_offer_the_service_count() -> None:
    offers: OfferTable[FakeRelay] = OfferTable()
    offers.put(relay("a"), [DB])
    offers.put(relay("b", UP, 99), [SSH, DB])
    assert chosen(offers.decide(SSH)) == "b"
    assert chosen(offers.decide(DB)) == "a"
    assert offers.decide(ServiceName("vnc")) == Reject(RejectReason.NO_RELAY)


def test_the_load_counts_that_is_there_now() -> None:
    first, second = relay("a", UP, 1), relay("b", UP, 2)
    offers = table(first, second)
    assert chosen(offers.decide(SSH)) == "a"
    first.open_streams = 3
    assert chosen(offers.decide(SSH)) == "b"
    second.readiness = HELD
    assert chosen(offers.decide(SSH)) == "a"


def test_put_replaces_what_a_relay_offers() -> None:
    offers = table(relay("a"), relay("b"))
    offers.put(relay("a"), [DB])
    assert offers.services() == {SSH: (RelayId("b"),), DB: (RelayId("a"),)}
    offers.put(relay("a"), [])
    assert offers.services() == {SSH: (RelayId("b"),)}


def test_put_replaces_the_relay_itself() -> None:
    offers = table(relay("a", UP, 1))
    newer = relay("a", UP, 0)
    offers.put(newer, [SSH])
    decision = offers.decide(SSH)
    assert isinstance(decision, Forward)
    assert decision.relay is newer


def test_remove_leaves_nothing_behind() -> None:
    offers = table(relay("a"))
    offers.remove(RelayId("unknown"))
    offers.remove(RelayId("a"))
    offers.remove(RelayId("a"))
    assert offers.services() == {}
    assert chosen(offers.decide(SSH)) == "no-relay"


RELAYS = st.lists(st.tuples(st.sampled_from(Readiness), st.integers(0, 4)), max_size=6)


@given(RELAYS, st.sets(st.integers(0, 5)))
def test_no_usable_relay_is_better_than_the_chosen_one(states: list[tuple[Readiness, int]], tried: set[int]) -> None:
    relays = [relay(str(i), *state) for i, state in enumerate(states)]
    usable = [one for i, one in enumerate(relays) if i not in tried and one.readiness is not NONE]
    decision = table(*relays).decide(SSH, {RelayId(str(i)) for i in tried})
    if not usable:
        assert decision == Reject(RejectReason.EXHAUSTED if tried else RejectReason.NO_RELAY)
        return
    assert isinstance(decision, Forward)
    best = min((one.readiness, one.open_streams) for one in usable)
    assert decision.relay in usable
    assert (decision.relay.readiness, decision.relay.open_streams) == best
