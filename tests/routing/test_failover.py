"""Where a client goes next, whatever relays answer."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgateway.routing.failover import MAX_ATTEMPTS, MAX_HOPS, FailoverState, GiveUp, Offers, OpenOn, PassOn, Step, next_step
from fxgateway.routing.offers import OfferTable, Readiness, RejectReason
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import MAX_AVOIDED

SSH = ServiceName("ssh")
A, B, C, Z = (RelayId(name) for name in "abcz")
USED_UP = FailoverState((A,), attempts=MAX_ATTEMPTS)


@dataclass
class FakeRelay:
    relay_id: RelayId
    is_remote: Any = False
    readiness: Readiness = Readiness.UP
    open_streams: int = 0

    def __post_init__(self) -> None:
        self.first_step = FailoverState.after_first_step(self.relay_id)


class LocalRelay(FakeRelay):
    is_remote: Literal[False]


class RemoteRelay(FakeRelay):
    is_remote: Literal[True]


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
    def offers(self) -> Offers[LocalRelay, RemoteRelay]:
        return self.table

    def named(self, relay_id: RelayId) -> Any:
        return self.all.get(relay_id)


def told(step: Step[LocalRelay, RemoteRelay]) -> tuple[str, FailoverState]:
    """A step as the tables below write it."""
    match step:
        case OpenOn(relay, failover):
            return f"ask {relay.relay_id}", failover
        case PassOn(relay, failover):
            return f"pass on to {relay.relay_id}", failover
        case GiveUp(reason, failover):
            return reason.value, failover


NEAR = FakeRelays()
STEPS: dict[str, tuple[FailoverState, FakeRelays, str, FailoverState]] = {
    "the first": (FailoverState(), NEAR, "ask a", FailoverState((A,), attempts=1)),
    "nobody is there": (FailoverState(), FakeRelays(""), "no-relay", FailoverState()),
    "on by the offers": (FailoverState((A,), attempts=1), NEAR, "ask b", FailoverState((A, B), attempts=2)),
    "all have refused": (FailoverState((A, B, C), attempts=3), NEAR, "all-refused", FailoverState((A, B, C), attempts=3)),
    "the others are gone": (FailoverState((A,), attempts=1), FakeRelays("a"), "all-refused", FailoverState((A,), attempts=1)),
    "redirected": (FailoverState((A,), B, attempts=1), NEAR, "ask b", FailoverState((A,), B, attempts=2)),
    "redirected to one that nobody knows": (
        FailoverState((A,), B, attempts=1),
        FakeRelays(hidden="b"),
        "ask b",
        FailoverState((A,), B, attempts=2),
    ),
    "redirected to one that has refused before": (
        FailoverState((A, B), A, attempts=2),
        NEAR,
        "ask a",
        FailoverState((A, B), A, attempts=3),
    ),
    "redirected to nobody: asked again": (FailoverState((A,), Z, attempts=1), NEAR, "ask a", FailoverState((A,), None, (Z,), attempts=2)),
    "redirected to itself: asked again": (FailoverState((A,), A, attempts=1), NEAR, "ask a", FailoverState((A,), None, (A,), attempts=2)),
    "redirected to nobody, and gone": (
        FailoverState((A,), Z, attempts=1),
        FakeRelays("bc"),
        "ask b",
        FailoverState((A, B), None, (Z,), attempts=2),
    ),
    "redirected to nobody, and all are gone": (
        FailoverState((A,), Z, attempts=1),
        FakeRelays(""),
        "all-refused",
        FailoverState((A,), None, (Z,), attempts=1, asks_again=True),
    ),
    "asked again": (FailoverState((A,), None, (B,), 2, asks_again=True), NEAR, "ask a", FailoverState((A,), None, (B,), 3)),
    "asked again: the last one": (
        FailoverState((A, B), None, (C,), 2, asks_again=True),
        NEAR,
        "ask b",
        FailoverState((A, B), None, (C,), 3),
    ),
    "asked again, and gone": (
        FailoverState((A,), None, (B,), 2, asks_again=True),
        FakeRelays("bc"),
        "ask b",
        FailoverState((A, B), None, (B,), 3),
    ),
    "attempts are used up": (USED_UP, NEAR, "too-many-attempts", USED_UP),
    "attempts are used up when it is redirected": (
        USED_UP._replace(target=B),
        NEAR,
        "too-many-attempts",
        USED_UP._replace(target=B),
    ),
    "the last attempt": (FailoverState((A,), attempts=MAX_ATTEMPTS - 1), NEAR, "ask b", FailoverState((A, B), attempts=MAX_ATTEMPTS)),
    "another worker's": (FailoverState(), FakeRelays("", "a"), "pass on to a", FailoverState((A,), hops=1, asks_again=True)),
    "another worker's target": (FailoverState((A,), B, attempts=1), FakeRelays("a", "b"), "pass on to b", FailoverState((A,), B, (), 1, 1)),
    "another worker redirected in vain": (
        FailoverState((A,), Z, attempts=1),
        FakeRelays("b", "a"),
        "pass on to a",
        FailoverState((A,), None, (Z,), 1, 1, asks_again=True),
    ),
    "passed on to us": (FailoverState((A,), hops=1, asks_again=True), NEAR, "ask a", FailoverState((A,), attempts=1, hops=1)),
    "passed on to us for a target": (FailoverState((A,), B, (), 1, 1), NEAR, "ask b", FailoverState((A,), B, (), 2, 1)),
    "the last hop": (
        FailoverState(hops=MAX_HOPS - 1),
        FakeRelays("", "a"),
        "pass on to a",
        FailoverState((A,), hops=MAX_HOPS, asks_again=True),
    ),
    "hops are used up": (FailoverState(hops=MAX_HOPS), FakeRelays("b", "a"), "ask b", FailoverState((A, B), attempts=2, hops=MAX_HOPS)),
    "hops are used up, and nobody is near": (
        FailoverState(hops=MAX_HOPS),
        FakeRelays("", "ab"),
        "all-refused",
        FailoverState((A, B), attempts=2, hops=MAX_HOPS),
    ),
    "hops are used up, and the target is far": (
        FailoverState((A,), B, (), 1, MAX_HOPS),
        FakeRelays("a", "b"),
        "ask a",
        FailoverState((A,), None, (B,), 3, MAX_HOPS),
    ),
}


@pytest.mark.parametrize(("failover", "relays", "expected", "then"), STEPS.values(), ids=STEPS)
def test_which_relay_is_asked_next(failover: FailoverState, relays: FakeRelays, expected: str, then: FailoverState) -> None:
    assert told(next_step(failover, SSH, relays)) == (expected, then)


OTHERWISE: dict[str, tuple[FailoverState, FakeRelays, FailoverState]] = {
    "chosen": (FailoverState(), FakeRelays("b", "a"), FailoverState((A,), attempts=1)),
    "a target": (FailoverState((A,), B, attempts=1), FakeRelays("a", "b"), FailoverState((A,), None, (B,), 2, asks_again=True)),
}


@pytest.mark.parametrize(("failover", "relays", "otherwise"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_worker_that_takes_nobody_counts_as_a_relay_that_refused(
    failover: FailoverState, relays: FakeRelays, otherwise: FailoverState
) -> None:
    step = next_step(failover, SSH, relays)
    assert isinstance(step, PassOn)
    assert step.otherwise == otherwise


FULL = tuple(RelayId(f"n{number}") for number in range(MAX_AVOIDED))
ASKED, LED = FailoverState((A, B), None, (Z,), 3, 1), FailoverState((A, B), C, (Z,), 3, 1)
BACK = FailoverState((A, B), None, (Z, C), 3, 1, asks_again=True)
ANSWERS: dict[str, tuple[FailoverState, FailoverState]] = {
    "refused": (ASKED.refused(), ASKED),
    "refused by the target": (LED.refused(), BACK),
    "redirected": (ASKED.redirected("c"), LED),
    "redirected once more by the target": (LED.redirected("a"), BACK),
    "redirected to what is no name": (ASKED.redirected("no name"), ASKED),
    "redirected to where it was in vain": (ASKED.redirected("z"), ASKED),
    "redirected too often": (FailoverState((A,), None, FULL, 5).redirected("c"), FailoverState((A,), None, FULL, 5)),
    "lost": (ASKED.lost(), FailoverState((A,), None, (Z,), 3, 1)),
    "the target is lost": (LED.lost(), BACK),
    "not asked after all": (ASKED.unasked(), FailoverState((A,), None, (Z,), 3, 1)),
    "the target is not asked after all": (LED.unasked(), LED),
}


@pytest.mark.parametrize(("found", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_what_an_answer_makes_of_a_failover(found: FailoverState, expected: FailoverState) -> None:
    assert found == expected


def test_what_an_open_is_told() -> None:
    assert (FailoverState().via, ASKED.via, LED.via) == (None, None, "b")


NAMES = st.text("abcdefgh", max_size=8)


@given(NAMES, NAMES, st.lists(st.sampled_from(["refused", "lost", "unasked", "a", "b", "nobody", "no name"]), max_size=40))
def test_every_failover_ends_and_asks_only_who_is_there(near: str, far: str, answers: list[str]) -> None:
    relays = FakeRelays("".join(set(near) - set(far)), "".join(set(far)))
    failover, steps = FailoverState(), 0
    while not isinstance(step := next_step(failover, SSH, relays), GiveUp):
        steps += 1
        assert relays.all[step.relay.relay_id] is step.relay
        assert len(step.failover.avoid) <= MAX_AVOIDED
        if isinstance(step, PassOn):
            failover = step.failover
            relays = FakeRelays(relays.far, relays.near)  # as the other worker sees them
        else:
            answer = answers.pop() if answers else "refused"
            failover = getattr(step.failover, answer)() if hasattr(step.failover, answer) else step.failover.redirected(answer)
    assert steps <= MAX_ATTEMPTS + MAX_HOPS
    assert step.reason is not RejectReason.NO_RELAY or not step.failover.asked
