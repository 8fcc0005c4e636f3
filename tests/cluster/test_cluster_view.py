"""What a relay believes of its cluster, from messages that anyone may have written, and while nothing can be heard."""

import json
import logging

import pytest
from cluster_fakes import server_text
from hypothesis import given, settings
from hypothesis import strategies as st

from fxrelay.cluster.inflight import Placement, PlacementId
from fxrelay.cluster.members import Ages, Control, MemberState
from fxrelay.cluster.ports import CONTROLS, MAX_DOCUMENT_BYTES, PLACEMENTS, SERVERS, TOPICS, Document, Message
from fxrelay.cluster.view import ENDED, PLACED, ClusterView, encode_control, encode_placement
from fxtunnel.model import RelayId

A = RelayId("a")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> ClusterView:
    view = ClusterView(Ages(30, 90), clock)
    view.store_said(5_000_000)
    return view


def state(view: ClusterView, server_id: str = "a") -> MemberState:
    member = view.members.get(RelayId(server_id), view.now)
    assert member is not None
    return member.state


def test_ages_of_documents_are_taken_from_the_stores_clock(view: ClusterView, clock: Clock) -> None:
    view.read_servers([Document("a", server_text(), 5_000_000 - 40_000), Document("b", server_text("b"), 5_000_000 - 10_000)])
    assert (state(view), state(view, "b")) == (MemberState.STALE, MemberState.UP)
    clock.now += 7
    assert view.now_ms == 5_007_000


def test_placements_count_until_the_server_was_measured_after_them(view: ClusterView) -> None:
    view.hear(Message(SERVERS, server_text(measuredAt=4_990_000)))
    for number in range(3):
        placement = Placement(PlacementId(f"p{number}"), A, 4_995_000 + number)
        view.hear(Message(PLACEMENTS, encode_placement(PLACED, placement)))
    assert view.in_flight.counts(view.now) == {"a": 3}
    view.hear(Message(PLACEMENTS, encode_placement(ENDED, Placement(PlacementId("p0"), A, 0))))
    assert view.in_flight.counts(view.now) == {"a": 2}
    view.hear(Message(SERVERS, server_text(seq=2, measuredAt=4_996_000)))
    assert view.in_flight.counts(view.now) == {}


def test_news_of_a_placement_that_the_server_counts_already_adds_nothing(view: ClusterView) -> None:
    view.hear(Message(SERVERS, server_text(measuredAt=4_000_000)))
    for placed_ms, expected in ((3_999_700, {}), (3_999_900, {A: 1})):
        view.hear(Message(PLACEMENTS, encode_placement(PLACED, Placement(PlacementId(f"p{placed_ms}"), A, placed_ms))))
        assert view.in_flight.counts(view.now) == expected


def test_a_placement_from_the_future_does_not_stay_longer_than_one_of_now(view: ClusterView) -> None:
    view.hear(Message(PLACEMENTS, encode_placement(PLACED, Placement(PlacementId("p"), A, 9_000_000))))
    view.hear(Message(SERVERS, server_text(measuredAt=5_001_000)))
    assert view.in_flight.counts(view.now) == {}


def test_controls_are_heard(view: ClusterView) -> None:
    view.hear(Message(SERVERS, server_text()))
    view.hear(Message(CONTROLS, encode_control("a", Control(True, frozenset({"login"})))))
    member = view.members.get(A, view.now)
    assert member is not None
    assert (member.is_drained, member.disabled) == (True, {"login"})
    view.read_controls([])
    assert [found.is_drained for found in view.everyone()] == [False]


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        (PLACEMENTS, ""),
        (PLACEMENTS, "[]"),
        (PLACEMENTS, "{}"),
        (PLACEMENTS, '{"id":"p","serverId":"a","at":-1,"event":"placed"}'),
        (PLACEMENTS, '{"id":"p","serverId":"a","at":true,"event":"placed"}'),
        (PLACEMENTS, '{"id":"p","serverId":"a","at":1e300,"event":"placed"}'),
        (PLACEMENTS, '{"id":"p","serverId":"?","at":1,"event":"placed"}'),
        (PLACEMENTS, '{"id":["p"],"event":"ended"}'),
        (CONTROLS, '{"serverId":["a"]}'),
        (CONTROLS, "[" * 100_000),
        ("unknown", "{}"),
        (SERVERS, " " * (MAX_DOCUMENT_BYTES + 1)),
    ],
)
def test_what_is_malformed_is_dropped_and_counted(view: ClusterView, topic: str, text: str) -> None:
    view.hear(Message(topic, text))
    assert view.dropped_messages == 1
    assert len(view.members) == len(view.in_flight) == 0


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(TOPICS),
    st.text()
    | st.dictionaries(
        st.sampled_from(["id", "serverId", "at", "event", "control"]),
        st.none() | st.integers() | st.sampled_from(["a", PLACED, ENDED]) | st.lists(st.integers()) | st.dictionaries(st.text(), st.none()),
    ).map(json.dumps),
)
def test_hostile_messages_raise_nothing(topic: str, text: str) -> None:
    view = ClusterView(Ages(), Clock())
    view.hear(Message(topic, text))


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_deep_messages_raise_nothing(view: ClusterView, depth: int) -> None:
    view.hear(Message(CONTROLS, '{"serverId":"a","control":' + "[" * depth + "]" * depth + "}"))


def test_a_quarrel_is_told_once_and_again_only_after_it_ended(view: ClusterView, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def quarrel(number: int) -> None:
        for instance, started in (("i1", 1_000), ("i2", 6_000)):
            text = server_text(instance=instance, started=started, seq=number, measuredAt=10_000 + number)
            view.hear(Message(SERVERS, text))

    def told() -> int:
        return sum("two processes call themselves a" in record.message for record in caplog.records)

    with caplog.at_level(logging.ERROR):
        for number in range(1, 5):
            quarrel(number)
        assert told() == 1
        clock.now += 40
        view.hear(Message(SERVERS, server_text(instance="i2", started=6_000, seq=90, measuredAt=90_000)))
        quarrel(100)
        assert told() == 2


def test_nobody_gets_stale_while_nothing_can_be_heard(view: ClusterView, clock: Clock) -> None:
    view.live_updates_heard()
    view.hear(Message(SERVERS, server_text()))
    clock.now += 5
    view.store_failed("gone")
    clock.now += 1
    assert view.now == 1_000.0, "that a subscription stands proves nothing; nothing was heard since the last message"
    view.hear(Message(SERVERS, server_text(seq=8)))
    clock.now += 10
    view.hear(Message(SERVERS, server_text(seq=9)))
    clock.now += 9
    assert view.now == 1_019.0, "live messages are still heard"
    view.hear(Message(SERVERS, server_text(seq=10)))
    view.live_updates_lost("gone too")
    clock.now += 3_600
    assert state(view) is MemberState.UP
    assert view.health().store_down_s == 3_620.0
    view.store_said(8_625_000)
    assert (view.health().store_down_s, view.now) == (0.0, 1_019.0)
    clock.now += 30
    assert state(view) is MemberState.STALE, "the time before and after counts"
    assert view.now_ms == 8_655_000


def test_a_store_that_fails_alone_stops_no_clock(view: ClusterView, clock: Clock) -> None:
    view.live_updates_heard()
    view.hear(Message(SERVERS, server_text()))
    view.store_failed("gone")
    clock.now += 0.5
    for seq in range(4):
        view.hear(Message(SERVERS, server_text("b", seq=seq + 8)))
        clock.now += 10
    assert (state(view), state(view, "b")) == (MemberState.STALE, MemberState.UP)


def test_a_message_that_was_on_its_way_when_the_store_went_makes_nobody_stale(view: ClusterView, clock: Clock) -> None:
    view.live_updates_heard()
    view.store_refused("disk is full")
    clock.now += 0.2
    view.hear(Message(SERVERS, server_text()))
    heard = view.now
    for _ in range(3):
        clock.now += 600
        assert (state(view), view.now) == (MemberState.UP, heard)
        view.store_refused("disk is full")
    clock.now += 600
    view.hear(Message(SERVERS, server_text(seq=8)))
    assert view.now == heard, "while nothing was heard, no time went by"
    clock.now += 1
    assert view.now == heard + 1


def test_a_store_that_can_be_read_and_not_written_makes_nobody_stale(view: ClusterView, clock: Clock) -> None:
    view.live_updates_heard()
    view.store_refused("disk is full")
    clock.now += 0.2
    view.hear(Message(SERVERS, server_text()))
    for clock_ms in (5_020_000, 5_040_000, 5_060_000):
        clock.now += 20
        view.store_said(clock_ms)
        assert state(view) is MemberState.UP
    clock.now += 20
    view.store_took(5_080_000)
    assert state(view) is MemberState.UP
    clock.now += 31
    assert state(view) is MemberState.STALE


def test_another_reason_is_told_and_none_twice(view: ClusterView, caplog: pytest.LogCaptureFixture) -> None:
    """A Redis that is back, and has forgotten its user, must not look like one that is still away."""
    with caplog.at_level(logging.WARNING):
        for error in ("refused", "wrong password", "refused", "wrong password"):
            view.store_failed(error)
        view.store_said(8_000_000)
        view.store_failed("wrong password")
    texts = [record.message for record in caplog.records]
    assert [text.rpartition(": ")[2] for text in texts if "answers again" not in text] == ["refused", "wrong password", "wrong password"]
    assert ["still" in text for text in texts] == [False, True, False, False]


def test_an_interruption_is_told_once(view: ClusterView, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            view.live_updates_lost("no route")
        view.live_updates_heard()
        for _ in range(3):
            view.live_updates_lost("no route")
        view.live_updates_heard()
        for _ in range(3):
            view.store_failed("no route")
    texts = [record.message for record in caplog.records]
    assert len(texts) == 4, texts
    assert sum("interrupted" in text for text in texts) == 2
    assert sum("heard again" in text for text in texts) == 1
