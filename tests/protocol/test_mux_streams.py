"""Streams between two muxes: opening, data, credit, and every way to end."""

import pytest

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import FIRST_WINDOW_BYTES
from fxtunnel.protocol.frames import EARLY_BYTES
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.stream import Stream
from tests.protocol.mux_pair import MIB, TAGS, Eager, Pair, Recorder, Side, pattern


def lazy(pair: Pair) -> None:
    for side in pair.sides:
        side.make_endpoint = Recorder


def check_released(pair: Pair) -> None:
    for side in pair.sides:
        assert not side.mux.streams
        assert (side.budget.promised_bytes, side.budget.grown_bytes) == (0, 0)


def test_an_opening_arrives_as_it_was_asked_for() -> None:
    pair = Pair()
    stream = pair.gateway.open()
    pair.pump()
    ((theirs, opening),) = pair.relay.openings
    assert (theirs.id, opening) == (stream.id, Opening(opening.service, "192.0.2.1:99", "door"))
    assert theirs.send_credit == FIRST_WINDOW_BYTES
    assert stream.send_credit == EARLY_BYTES


def test_ids_count_up_and_are_never_used_again() -> None:
    pair = Pair()
    for expected in range(1, 6):
        stream = pair.gateway.open()
        assert stream.id == expected
        stream.reset(Code.CANCELLED)
        pair.pump()
    assert [stream.id for stream, _ in pair.relay.openings] == [1, 2, 3, 4, 5]
    check_released(pair)


def test_accept_grants_the_rest_of_the_first_window() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    assert (ours.accepted, theirs.accepted, ours.early) == (True, True, None)
    assert ours.send_credit == theirs.window.left_bytes == FIRST_WINDOW_BYTES
    assert pair.gateway.heard(ours).events == [("accept",)]


def test_accept_twice_is_one_accept() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    theirs.accept()
    pair.pump()
    assert pair.gateway.heard(ours).events == [("accept",)]


def test_early_bytes_travel_with_the_opening_and_are_kept_until_accept() -> None:
    pair = Pair()
    ours = pair.gateway.open()
    assert pair.gateway.send(ours, 10_000) == EARLY_BYTES
    assert bytes(ours.early or b"") == pattern(1, 0, EARLY_BYTES)
    pair.pump()
    theirs = pair.relay.streams[1]
    assert pair.relay.heard(theirs).data == pattern(1, 0, EARLY_BYTES)
    theirs.accept()
    pair.pump()
    assert ours.early is None
    assert pair.gateway.heard(ours).events == [("accept",), ("credit",)]
    pair.gateway.send(ours, 100_000)
    pair.pump()
    assert pair.relay.heard(theirs).data == pattern(1, 0, ours.bytes_out)


@pytest.mark.parametrize("taken_before_accept", [False, True])
def test_both_ends_count_the_same_credit_whenever_early_bytes_are_taken(taken_before_accept: bool) -> None:
    pair = Pair(memory_bytes=20_000)
    pair.now = 0.5
    lazy(pair)
    ours = pair.gateway.open()
    pair.gateway.send(ours, EARLY_BYTES)
    pair.pump()
    theirs = pair.relay.streams[1]
    # So little memory makes the early bytes a whole window, for which it may grow.
    assert theirs.window.window_bytes == EARLY_BYTES
    steps = [lambda: pair.relay.heard(theirs).take(EARLY_BYTES), theirs.accept]
    for step in steps if taken_before_accept else reversed(steps):
        step()
    pair.pump()
    assert ours.send_credit == theirs.window.left_bytes


def refuse(stream: Stream) -> None:
    stream.refuse(Code.CONNECT_FAILED, "nobody listens")


def redirect(stream: Stream) -> None:
    stream.redirect("node-b")


@pytest.mark.parametrize(
    ("answer", "event"),
    [(refuse, ("refuse", Code.CONNECT_FAILED, "nobody listens")), (redirect, ("redirect", "node-b"))],
)
def test_what_a_relay_turned_down_is_replayed_elsewhere(answer: object, event: tuple[object, ...]) -> None:
    assert callable(answer)
    first, second = Pair(), Pair()
    ours = first.gateway.open()
    first.gateway.send(ours, 1_000)
    first.gateway.send(ours, 500)
    first.relay.on_opened = answer
    first.pump()
    assert first.gateway.heard(ours).events == [event]
    assert ours.closed
    check_released(first)
    again = second.gateway.open()
    again.replay(ours.early or b"")
    assert again.send_credit == EARLY_BYTES - 1_500
    assert bytes(again.early or b"") == pattern(1, 0, 1_500)
    second.pump()
    second.relay.streams[1].accept()
    second.pump()
    second.gateway.send(again, 3_000)
    second.pump()
    assert second.relay.heard(again).data == pattern(1, 0, 4_500)


def test_an_empty_replay_is_no_frame() -> None:
    pair = Pair()
    stream = pair.gateway.open()
    before = pair.gateway.ring.head
    stream.replay(b"")
    assert pair.gateway.ring.head == before


def test_bytes_under_way_to_a_stream_that_was_turned_down_are_ignored() -> None:
    pair = Pair()
    ours = pair.gateway.open()
    pair.relay.on_opened = refuse
    pair.write(pair.gateway)
    pair.deliver(pair.gateway)
    pair.gateway.send(ours, 100)
    ours.fin()
    ours.reset(Code.CANCELLED)
    pair.pump()
    assert pair.gateway.heard(ours).events == []
    check_released(pair)


@pytest.mark.parametrize("first", ["gateway", "relay"])
def test_half_close_leaves_the_other_direction_open(first: str) -> None:
    pair = Pair()
    streams: dict[Side, Stream] = dict(zip(pair.sides, pair.open(), strict=True))
    near = pair.gateway if first == "gateway" else pair.relay
    far = pair.other(near)
    near.send(streams[near], 700)
    streams[near].fin()
    pair.pump()
    assert far.heard(streams[far]).events[-1:] == [("fin",)]
    assert not streams[near].closed
    assert not streams[far].closed
    for _ in range(10):
        far.send(streams[far], 30_000)
        pair.pump()
    streams[far].fin()
    pair.pump()
    assert near.heard(streams[near]).data == pattern(1, 0, streams[far].bytes_out)
    assert len(near.heard(streams[near]).data) == 300_000
    assert near.heard(streams[near]).events[-1] == ("fin",)
    assert streams[near].closed
    assert streams[far].closed
    check_released(pair)


def test_both_fins_may_cross() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    ours.fin()
    theirs.fin()
    pair.pump()
    assert pair.gateway.heard(ours).events == [("accept",), ("fin",)]
    assert pair.relay.heard(theirs).events == [("fin",)]
    check_released(pair)


def test_fin_before_accept_waits_for_nobody() -> None:
    pair = Pair()
    ours = pair.gateway.open()
    pair.gateway.send(ours, 10)
    ours.fin()
    pair.pump()
    theirs = pair.relay.streams[1]
    assert pair.relay.heard(theirs).events == [("fin",)]
    theirs.accept()
    pair.relay.send(theirs, 20)
    theirs.fin()
    pair.pump()
    assert pair.gateway.heard(ours).data == pattern(1, 0, 20)
    check_released(pair)


@pytest.mark.parametrize("first", ["gateway", "relay"])
def test_a_reset_arrives_behind_the_bytes_before_it(first: str) -> None:
    pair = Pair()
    streams: dict[Side, Stream] = dict(zip(pair.sides, pair.open(), strict=True))
    near = pair.gateway if first == "gateway" else pair.relay
    far = pair.other(near)
    far.send(streams[far], 5_000)
    near.send(streams[near], 5_000)
    streams[near].reset(Code.PEER_RESET)
    pair.pump()
    assert far.heard(streams[far]).data == pattern(1, 0, 5_000)
    assert far.heard(streams[far]).events[-1] == ("reset", Code.PEER_RESET)
    assert not near.heard(streams[near]).data, "what was under way to a reset stream is ignored"
    check_released(pair)


def test_a_reset_behind_a_half_close_is_still_a_reset() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    ours.fin()
    ours.reset(Code.IDLE_TIMEOUT)
    pair.pump()
    assert pair.relay.heard(theirs).events == [("fin",), ("reset", Code.IDLE_TIMEOUT)]


def test_resets_may_cross() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    ours.reset(Code.CANCELLED)
    theirs.reset(Code.PEER_RESET)
    pair.pump()
    assert pair.gateway.heard(ours).events == [("accept",)]
    assert pair.relay.heard(theirs).events == []
    check_released(pair)


def test_a_closed_stream_says_nothing_more() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    ours.reset(Code.CANCELLED)
    pair.pump()
    before = [side.ring.head for side in pair.sides]
    for stream in (ours, theirs):
        stream.accept()
        stream.refuse(Code.BUSY)
        stream.redirect("node-b")
        stream.fin()
        stream.reset(Code.CANCELLED)
        stream.consumed(1_000_000)
    assert [side.ring.head for side in pair.sides] == before
    check_released(pair)


def test_a_reader_that_stops_gets_its_window_and_no_more() -> None:
    pair = Pair()
    lazy(pair)
    ours, theirs = pair.open()
    other_ours, other_theirs = pair.open()
    pair.relay.endpoints[2] = other_theirs.endpoint = Eager(other_theirs)
    for _ in range(20):
        pair.gateway.send(ours, 100_000)
        pair.gateway.send(other_ours, 100_000)
        pair.pump()
    assert len(pair.relay.heard(theirs).data) == FIRST_WINDOW_BYTES
    assert len(pair.relay.heard(other_theirs).data) > 20 * FIRST_WINDOW_BYTES
    pair.relay.heard(theirs).take(FIRST_WINDOW_BYTES // 4 - 1)
    pair.pump()
    assert ours.send_credit == 0
    pair.relay.heard(theirs).take(1)
    pair.pump()
    assert ours.send_credit == FIRST_WINDOW_BYTES // 4
    assert pair.gateway.heard(ours).events[-1] == ("credit",)


def test_credit_is_told_only_to_a_sender_that_ran_out() -> None:
    pair = Pair()
    ours, _ = pair.open()
    pair.gateway.send(ours, FIRST_WINDOW_BYTES - 1)
    pair.pump()
    assert ours.send_credit > 1
    assert ("credit",) not in pair.gateway.heard(ours).events


def test_a_direction_that_has_ended_gets_no_more_credit() -> None:
    pair = Pair()
    lazy(pair)
    ours, theirs = pair.open()
    pair.gateway.send(ours, 20_000)
    ours.fin()
    pair.pump()
    before = pair.relay.ring.head
    pair.relay.heard(theirs).take(20_000)
    assert pair.relay.ring.head == before


def test_limits_of_streams_at_both_ends() -> None:
    pair = Pair(max_streams=2)
    streams = [pair.gateway.open(), pair.gateway.open()]
    assert pair.gateway.mux.open(TAGS, Recorder()) is None
    streams[0].reset(Code.CANCELLED)
    assert pair.gateway.mux.open(TAGS, Recorder()) is not None
    pair.pump()
    assert len(pair.relay.mux.streams) == 2


def test_a_relay_without_room_says_busy() -> None:
    pair = Pair(max_streams=2)
    pair.gateway.mux._max_streams = 3
    streams = [pair.gateway.open() for _ in range(3)]
    pair.pump()
    assert pair.gateway.heard(streams[2]).events == [("refuse", Code.BUSY, "streams or memory used up")]
    assert len(pair.relay.mux.streams) == 2
    pair.check_budgets()


def test_without_memory_no_stream_is_opened() -> None:
    pair = Pair(memory_bytes=40_000)
    count = 0
    while pair.gateway.mux.open(TAGS, Recorder()) is not None:
        count += 1
    assert 0 < count * EARLY_BYTES <= pair.gateway.budget.promised_bytes <= 15_000


def test_a_required_tag_of_a_later_version_is_refused() -> None:
    pair = Pair()
    stream = pair.gateway.open(TAGS + b"\x05\x00\x00")
    pair.pump()
    assert pair.gateway.heard(stream).events == [("refuse", Code.UNSUPPORTED, "tag 0x05")]
    assert not pair.relay.openings
    check_released(pair)


def test_the_end_of_a_session_resets_every_stream_once() -> None:
    pair = Pair()
    pairs = [pair.open() for _ in range(5)]
    pairs[0][0].fin()
    pair.pump()
    for side in pair.sides:
        side.mux.reset_all(Code.LINK_LOST)
        side.mux.reset_all(Code.LINK_LOST)
        for endpoint in side.endpoints.values():
            assert endpoint.events.count(("reset", Code.LINK_LOST)) == 1
    check_released(pair)


def test_the_budget_is_whole_again_after_windows_have_grown() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    for _ in range(100):
        pair.now += 0.01
        pair.gateway.send(ours, MIB)
        pair.relay.send(theirs, MIB)
        pair.pump()
    assert min(side.budget.grown_bytes for side in pair.sides) > 500_000
    pair.check_budgets()
    ours.fin()
    theirs.fin()
    pair.pump()
    assert pair.relay.heard(theirs).data == pattern(1, 0, ours.bytes_out)
    check_released(pair)


def test_a_stream_without_an_endpoint_is_our_own_mistake() -> None:
    pair = Pair()
    pair.relay.mux._on_open = lambda stream, opening: None
    stream = pair.gateway.open()
    stream.fin()
    with pytest.raises(LocalProtocolError):
        pair.pump()


def test_statistics_are_a_snapshot() -> None:
    pair = Pair()
    ours, _ = pair.open()
    pair.gateway.send(ours, 1_000)
    pair.settle()
    near, far = (side.mux.statistics() for side in pair.sides)
    assert (near.streams, near.opened, far.streams, far.opened) == (1, 1, 1, 1)
    assert near.bytes_out == far.bytes_in == pair.gateway.ring.sent
    assert near.bytes_out > frames.HEADER_BYTES + 1_000
