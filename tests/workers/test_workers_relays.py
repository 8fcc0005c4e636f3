"""The relays of all workers as the doors of one see them."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from fxgateway.routing.offers import Forward, OfferTable, Readiness, Reject, RejectReason
from fxgateway.workers.worker_relays import AllRelays, WorkerRelay, holders
from fxtunnel.model import InstanceId, Offer, RelayId, ServiceName

SSH, DESK = ServiceName("ssh"), ServiceName("desk")
A, B, C = (RelayId(f"node-{letter}") for letter in "abc")
FIRST = InstanceId("first")
UP, HELD, NONE = int(Readiness.UP), int(Readiness.HELD), int(Readiness.NONE)


@dataclass
class Near:
    relay_id: RelayId
    open_streams: int = 0
    readiness: Readiness = Readiness.UP
    instance: InstanceId = FIRST
    epoch: int = 1
    offers: tuple[Offer, ...] = (Offer(SSH),)


@dataclass
class Registry:
    here: dict[RelayId, Near] = field(default_factory=dict)
    offers: OfferTable[Near] = field(default_factory=OfferTable)
    relieved: list[RelayId] = field(default_factory=list)

    def relays(self) -> tuple[Near, ...]:
        return tuple(self.here.values())

    def named(self, relay_id: RelayId) -> Near | None:
        return self.here.get(relay_id)

    def yield_name(self, relay_id: RelayId, instance: InstanceId, epoch: int, successor: InstanceId) -> None:
        pass

    def relieve(self, relay_id: RelayId) -> None:
        self.relieved.append(relay_id)

    def put(self, relay: Near) -> Near:
        self.here[relay.relay_id] = relay
        self.offers.put(relay, [offer.name for offer in relay.offers])
        return relay


@dataclass
class World:
    registry: Registry = field(default_factory=Registry)
    passed: list[int] = field(default_factory=list)
    late_news: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.relays = AllRelays(self.registry, self.pass_on, self.catch_up)

    def pass_on(self, worker: int, client: object, failover: object) -> bool:
        self.passed.append(worker)
        return True

    def catch_up(self) -> None:
        self.relays.note(2, self.late_news)

    def chosen(self, service: ServiceName = SSH, tried: tuple[RelayId, ...] = ()) -> RelayId | RejectReason:
        match self.relays.decide(service, tried):
            case Forward(relay):
                return relay.relay_id
            case Reject(reason):
                return reason


def test_the_fewest_streams_decide_wherever_the_relay_is() -> None:
    world = World()
    near = world.registry.put(Near(A, 5))
    world.relays.note(2, {B: ["i", 1, UP, 4, [SSH]], C: ["i", 1, HELD, 0, [SSH, DESK]]})
    assert world.chosen() == B
    assert world.chosen(tried=(B,)) == A
    near.open_streams = 4
    assert world.chosen() == A  # our own where two are alike
    assert world.chosen(DESK) == C
    assert world.chosen(tried=(A, B, C)) is RejectReason.EXHAUSTED


def test_a_reluctant_relay_comes_after_the_willing_wherever_it_is() -> None:
    world = World()
    near = world.registry.put(Near(A, 0, Readiness.RELUCTANT))
    world.relays.note(2, {B: ["i", 1, UP, 4, [SSH]]})
    assert world.chosen() == B
    near.readiness = Readiness.UP
    world.relays.note(2, {B: ["i", 1, int(Readiness.RELUCTANT), 0]})
    assert world.chosen() == A
    assert world.registry.relieved == [B, B]  # it serves all the same: who yielded its name here takes nothing more


def test_a_client_that_was_passed_on_counts_until_the_next_news() -> None:
    world = World()
    world.registry.put(Near(A, 2))
    world.relays.note(2, {B: ["i", 1, UP, 1, [SSH]]})
    far = world.relays.named(B)
    assert isinstance(far, WorkerRelay)
    assert far.take(None, None)
    assert world.passed == [2]
    assert world.chosen() == A
    world.relays.note(2, {B: ["i", 1, UP, 1]})  # without services: they are the same
    assert world.chosen() == B


def test_what_is_gone_is_not_chosen() -> None:
    world = World()
    world.relays.note(2, {B: ["i", 1, UP, 0, [SSH]], C: ["i", 1, UP, 9, [SSH]]})
    world.relays.note(2, {B: None})
    assert world.chosen() == C
    world.relays.note(3, {C: ["j", 2, UP, 0, [SSH]]})  # it has moved
    world.relays.note(2, {C: None})
    assert world.relays.named(C) is not None
    world.relays.note(3, {C: ["j", 2, NONE, 0]})
    assert world.relays.named(C) is None
    world.relays.forget(3)
    assert world.chosen() is RejectReason.NO_RELAY


def test_before_a_client_is_turned_away_the_latest_news_is_read() -> None:
    world = World()
    world.late_news = {B: ["i", 1, UP, 0, [SSH]]}
    assert world.chosen() == B


def test_news_is_what_has_changed() -> None:
    world = World()
    near = world.registry.put(Near(A))
    assert world.relays.news() == {A: ["first", 1, UP, 0, [SSH]]}
    assert world.relays.news() == {}
    near.open_streams = 3
    assert world.relays.news() == {A: ["first", 1, UP, 3]}
    assert world.relays.everything() == {A: ["first", 1, UP, 3, [SSH]]}
    del world.registry.here[A]
    assert world.relays.news() == {A: None}


def test_a_name_that_was_claimed_in_vain_is_given_back() -> None:
    world = World()
    world.relays.expect(A)
    assert world.relays.everything() == {}
    news = world.relays.news()
    assert list(holders(news)) == [(A, None)]
    assert list(holders({B: ["i", 7, UP, 0]})) == [(B, (InstanceId("i"), 7))]


def test_a_successor_is_told_of_when_it_can_take_streams() -> None:
    world = World()
    world.relays.expect(A)
    near = world.registry.put(Near(A, readiness=Readiness.NONE))
    assert world.relays.news() == {}
    assert world.relays.everything() == {}
    near.readiness = Readiness.UP
    assert world.relays.news() == {A: ["first", 1, UP, 0, [SSH]]}
    near.readiness = Readiness.NONE
    assert world.relays.news() == {A: ["first", 1, NONE, 0]}


def test_a_successor_that_does_not_come_after_all_is_news() -> None:
    world = World()
    world.relays.expect(A)
    world.registry.put(Near(A, readiness=Readiness.NONE))
    assert world.relays.news() == {}
    del world.registry.here[A]
    assert world.relays.news() == {A: None}


@pytest.mark.parametrize("order", [("yield", "news"), ("news", "yield")])
def test_who_has_yielded_is_relieved_when_its_successor_serves_elsewhere(order: tuple[str, str]) -> None:
    world = World()
    world.registry.put(Near(A))
    world.relays.note(2, {A: ["second", 2, HELD, 0, [SSH]]})
    assert world.registry.relieved == []
    for what in order:
        world.registry.relieved.clear()
        if what == "yield":
            world.relays.yield_name(A, FIRST, 2, InstanceId("second"))
        else:
            world.relays.note(2, {A: ["second", 2, UP, 0]})
    assert world.registry.relieved == [A]  # it knows whether its own has yielded
