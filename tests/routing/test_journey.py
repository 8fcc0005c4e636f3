"""Where a client goes next, whatever relays answer."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgateway.routing.journey import MAX_ATTEMPTS, MAX_HOPS, Ask, GiveUp, Journey, Offers, PassOn, Step, next_step
from fxgateway.routing.offers import OfferTable, Readiness, RejectReason
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import MAX_AVOIDED

SSH = ServiceName("ssh")
A, B, C, Z = (RelayId(name) for name in "abcz")
USED_UP = Journey((A,), attempts=MAX_ATTEMPTS)


@dataclass
class FakeRelay:
    relay_id: RelayId
    is_far: Any = False
    readiness: Readiness = Readiness.UP
    open_streams: int = 0


class NearRelay(FakeRelay):
    is_far: Literal[False]


class FarRelay(FakeRelay):
    is_far: Literal[True]


@dataclass
class FakeRelays:
    """What relays are there: `a` to `c`, by default. Those in `hidden` offer nothing, and are found by their names alone."""

    near: str = "abc"
    far: str = ""
    hidden: str = ""
    table: OfferTable[Any] = field(default_factory=OfferTable)

    def __post_init__(self) -> None:
        self.all = {name: FakeRelay(RelayId(name), name in self.far) for name in sorted(self.near + self.far)}
        for relay in self.all.values():
            self.table.put(relay, [] if relay.relay_id in self.hidden else [SSH])

    @property
    def offers(self) -> Offers[NearRelay, FarRelay]:
        return self.table

    def named(self, relay_id: RelayId) -> Any:
        return self.all.get(relay_id)


def told(step: Step[NearRelay, FarRelay]) -> tuple[str, Journey]:
    """A step as the tables below write it."""
    match step:
        case Ask(relay, journey):
            return f"ask {relay.relay_id}", journey
        case PassOn(relay, journey):
            return f"pass on to {relay.relay_id}", journey
        case GiveUp(reason, journey):
            return reason.value, journey


NEAR = FakeRelays()
STEPS: dict[str, tuple[Journey, FakeRelays, str, Journey]] = {
    "the first": (Journey(), NEAR, "ask a", Journey((A,), attempts=1)),
    "nobody is there": (Journey(), FakeRelays(""), "no-relay", Journey()),
    "on by the offers": (Journey((A,), attempts=1), NEAR, "ask b", Journey((A, B), attempts=2)),
    "all have refused": (Journey((A, B, C), attempts=3), NEAR, "all-refused", Journey((A, B, C), attempts=3)),
    "the others are gone": (Journey((A,), attempts=1), FakeRelays("a"), "all-refused", Journey((A,), attempts=1)),
    "redirected": (Journey((A,), B, attempts=1), NEAR, "ask b", Journey((A,), B, attempts=2)),
    "redirected to one that nobody knows": (
        Journey((A,), B, attempts=1),
        FakeRelays(hidden="b"),
        "ask b",
        Journey((A,), B, attempts=2),
    ),
    "redirected to one that has refused before": (Journey((A, B), A, attempts=2), NEAR, "ask a", Journey((A, B), A, attempts=3)),
    "redirected to nobody: asked again": (Journey((A,), Z, attempts=1), NEAR, "ask a", Journey((A,), None, (Z,), attempts=2)),
    "redirected to itself: asked again": (Journey((A,), A, attempts=1), NEAR, "ask a", Journey((A,), None, (A,), attempts=2)),
    "redirected to nobody, and gone": (Journey((A,), Z, attempts=1), FakeRelays("bc"), "ask b", Journey((A, B), None, (Z,), attempts=2)),
    "redirected to nobody, and all are gone": (
        Journey((A,), Z, attempts=1),
        FakeRelays(""),
        "all-refused",
        Journey((A,), None, (Z,), attempts=1, asks_again=True),
    ),
    "asked again": (Journey((A,), None, (B,), 2, asks_again=True), NEAR, "ask a", Journey((A,), None, (B,), 3)),
    "asked again: the last one": (Journey((A, B), None, (C,), 2, asks_again=True), NEAR, "ask b", Journey((A, B), None, (C,), 3)),
    "asked again, and gone": (Journey((A,), None, (B,), 2, asks_again=True), FakeRelays("bc"), "ask b", Journey((A, B), None, (B,), 3)),
    "attempts are used up": (USED_UP, NEAR, "too-many-attempts", USED_UP),
    "attempts are used up when it is redirected": (
        USED_UP._replace(target=B),
        NEAR,
        "too-many-attempts",
        USED_UP._replace(target=B),
    ),
    "the last attempt": (Journey((A,), attempts=MAX_ATTEMPTS - 1), NEAR, "ask b", Journey((A, B), attempts=MAX_ATTEMPTS)),
    "another worker's": (Journey(), FakeRelays("", "a"), "pass on to a", Journey((A,), hops=1, asks_again=True)),
    "another worker's target": (Journey((A,), B, attempts=1), FakeRelays("a", "b"), "pass on to b", Journey((A,), B, (), 1, 1)),
    "another worker redirected in vain": (
        Journey((A,), Z, attempts=1),
        FakeRelays("b", "a"),
        "pass on to a",
        Journey((A,), None, (Z,), 1, 1, asks_again=True),
    ),
    "passed on to us": (Journey((A,), hops=1, asks_again=True), NEAR, "ask a", Journey((A,), attempts=1, hops=1)),
    "passed on to us for a target": (Journey((A,), B, (), 1, 1), NEAR, "ask b", Journey((A,), B, (), 2, 1)),
    "the last hop": (Journey(hops=MAX_HOPS - 1), FakeRelays("", "a"), "pass on to a", Journey((A,), hops=MAX_HOPS, asks_again=True)),
    "hops are used up": (Journey(hops=MAX_HOPS), FakeRelays("b", "a"), "ask b", Journey((A, B), attempts=2, hops=MAX_HOPS)),
    "hops are used up, and nobody is near": (
        Journey(hops=MAX_HOPS),
        FakeRelays("", "ab"),
        "all-refused",
        Journey((A, B), attempts=2, hops=MAX_HOPS),
    ),
    "hops are used up, and the target is far": (
        Journey((A,), B, (), 1, MAX_HOPS),
        FakeRelays("a", "b"),
        "ask a",
        Journey((A,), None, (B,), 3, MAX_HOPS),
    ),
}


@pytest.mark.parametrize(("journey", "relays", "expected", "then"), STEPS.values(), ids=STEPS)
def test_which_relay_is_asked_next(journey: Journey, relays: FakeRelays, expected: str, then: Journey) -> None:
    assert told(next_step(journey, SSH, relays)) == (expected, then)


OTHERWISE: dict[str, tuple[Journey, FakeRelays, Journey]] = {
    "chosen": (Journey(), FakeRelays("b", "a"), Journey((A,), attempts=1)),
    "a target": (Journey((A,), B, attempts=1), FakeRelays("a", "b"), Journey((A,), None, (B,), 2, asks_again=True)),
}


@pytest.mark.parametrize(("journey", "relays", "otherwise"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_worker_that_takes_nobody_counts_as_a_relay_that_refused(journey: Journey, relays: FakeRelays, otherwise: Journey) -> None:
    step = next_step(journey, SSH, relays)
    assert isinstance(step, PassOn)
    assert step.otherwise == otherwise


FULL = tuple(RelayId(f"n{number}") for number in range(MAX_AVOIDED))
ASKED, LED = Journey((A, B), None, (Z,), 3, 1), Journey((A, B), C, (Z,), 3, 1)
BACK = Journey((A, B), None, (Z, C), 3, 1, asks_again=True)
ANSWERS: dict[str, tuple[Journey, Journey]] = {
    "refused": (ASKED.refused(), ASKED),
    "refused by the target": (LED.refused(), BACK),
    "redirected": (ASKED.redirected("c"), LED),
    "redirected once more by the target": (LED.redirected("a"), BACK),
    "redirected to what is no name": (ASKED.redirected("no name"), ASKED),
    "redirected to where it was in vain": (ASKED.redirected("z"), ASKED),
    "redirected too often": (Journey((A,), None, FULL, 5).redirected("c"), Journey((A,), None, FULL, 5)),
    "lost": (ASKED.lost(), Journey((A,), None, (Z,), 3, 1)),
    "the target is lost": (LED.lost(), BACK),
    "not asked after all": (ASKED.unasked(), Journey((A,), None, (Z,), 3, 1)),
    "the target is not asked after all": (LED.unasked(), LED),
}


@pytest.mark.parametrize(("found", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_what_an_answer_makes_of_a_journey(found: Journey, expected: Journey) -> None:
    assert found == expected


def test_what_an_open_is_told() -> None:
    assert (Journey().via, ASKED.via, LED.via) == (None, None, "b")


NAMES = st.text("abcdefgh", max_size=8)


@given(NAMES, NAMES, st.lists(st.sampled_from(["refused", "lost", "unasked", "a", "b", "nobody", "no name"]), max_size=40))
def test_every_journey_ends_and_asks_only_who_is_there(near: str, far: str, answers: list[str]) -> None:
    relays = FakeRelays("".join(set(near) - set(far)), "".join(set(far)))
    journey, steps = Journey(), 0
    while not isinstance(step := next_step(journey, SSH, relays), GiveUp):
        steps += 1
        assert relays.all[step.relay.relay_id] is step.relay
        assert len(step.journey.avoid) <= MAX_AVOIDED
        if isinstance(step, PassOn):
            journey = step.journey
            relays = FakeRelays(relays.far, relays.near)  # as the other worker sees them
        else:
            answer = answers.pop() if answers else "refused"
            journey = getattr(step.journey, answer)() if hasattr(step.journey, answer) else step.journey.redirected(answer)
    assert steps <= MAX_ATTEMPTS + MAX_HOPS
    assert step.reason is not RejectReason.NO_RELAY or not step.journey.asked
