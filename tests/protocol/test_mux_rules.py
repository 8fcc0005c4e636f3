"""What a peer may not do, and what belongs to the session rather than to a stream."""

from collections.abc import Callable

import pytest

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import FIRST_WINDOW_BYTES
from fxtunnel.protocol.frames import EARLY_BYTES, MAX_CREDIT
from fxtunnel.protocol.heartbeats import CALM_BYTES
from fxtunnel.protocol.mux import ACK_EVERY_BYTES, ASK_EVERY_BYTES, MAX_OVERFLOW_BYTES, RING_RESERVE_BYTES
from tests.protocol.mux_pair import TAGS, Pair, Recorder, Side
from tests.protocol.recording import CollectingSink, Frame

WINDOW = b"\x00\x01\x00\x00"


def arrive(side: Side, *raw: bytes, now: float = 1_000.0) -> None:
    side.mux.receive(memoryview(b"".join(raw)), now)


def breaks(side: Side, code: Code, *raw: bytes) -> None:
    """The last of these frames, and not one before it, is a broken rule."""
    arrive(side, *raw[:-1])
    with pytest.raises(RemoteProtocolError) as caught:
        arrive(side, raw[-1])
    assert caught.value.code is code


def answers(side: Side) -> list[Frame]:
    """What `side` has queued since the last call."""
    sink = CollectingSink()
    while side.ring.unsent_bytes:
        view = side.ring.unsent(1 << 20)
        sink.feed(bytes(view))
        side.ring.advance(len(view))
    return sink.frames


def data(stream_id: int, length: int) -> bytes:
    return frames.encode(frames.DATA, stream_id, b"x" * length)


def opening(stream_id: int, window: int = 65_536) -> bytes:
    return frames.encode_open(stream_id, window, TAGS)


def u32(kind: int, stream_id: int, value: int) -> bytes:
    return frames.encode(kind, stream_id, value.to_bytes(4, "big"))


@pytest.fixture
def gateway() -> Side:
    """With stream 1 waiting for its answer."""
    side = Pair().gateway
    side.open()
    answers(side)
    return side


@pytest.fixture
def relay() -> Side:
    """With stream 1 open."""
    side = Pair().relay
    arrive(side, opening(1))
    side.streams[1].accept()
    answers(side)
    return side


STREAM_FRAMES: dict[str, Callable[[int], bytes]] = {
    "DATA": lambda stream: data(stream, 1),
    "ACCEPT": lambda stream: frames.encode_accept(stream, 65_536),
    "REFUSE": lambda stream: frames.encode_refuse(stream, Code.BUSY),
    "REDIRECT": lambda stream: frames.encode(frames.REDIRECT, stream, b"node-b"),
    "CREDIT": lambda stream: frames.encode_credit(stream, 1),
    "FIN": frames.encode_fin,
    "RESET": lambda stream: frames.encode_reset(stream, Code.CANCELLED),
}


@pytest.mark.parametrize("name", STREAM_FRAMES)
@pytest.mark.parametrize("stream_id", [2, 99, frames.MAX_STREAM_ID])
def test_a_frame_for_a_stream_never_opened_is_an_error(gateway: Side, relay: Side, name: str, stream_id: int) -> None:
    for side in (gateway, relay):
        breaks(side, Code.PROTOCOL_ERROR, STREAM_FRAMES[name](stream_id))


@pytest.mark.parametrize("name", STREAM_FRAMES)
def test_a_frame_for_a_closed_stream_is_ignored(gateway: Side, relay: Side, name: str) -> None:
    for side in (gateway, relay):
        side.streams[1].reset(Code.CANCELLED)
        answers(side)
        events = list(side.endpoints[1].events)
        arrive(side, STREAM_FRAMES[name](1), STREAM_FRAMES[name](1))
        assert answers(side) == []
        assert side.endpoints[1].events == events
        assert not side.endpoints[1].data


def test_a_stream_that_closes_inside_a_data_frame_hears_no_more_of_it(relay: Side) -> None:
    raw = data(1, 1_000)
    arrive(relay, raw[:100])
    relay.streams[1].reset(Code.CANCELLED)
    arrive(relay, raw[100:], opening(2))
    assert len(relay.endpoints[1].data) == 92
    assert 2 in relay.streams


@pytest.mark.parametrize("stream_id", [1, 3, frames.MAX_STREAM_ID])
def test_streams_are_opened_in_order(relay: Side, stream_id: int) -> None:
    breaks(relay, Code.PROTOCOL_ERROR, opening(stream_id))


def test_an_id_is_used_up_by_a_refusal(relay: Side) -> None:
    arrive(relay, frames.encode_open(2, 65_536, TAGS + b"\x05\x00\x00"))
    breaks(relay, Code.PROTOCOL_ERROR, opening(2))


def test_a_relay_does_not_open(gateway: Side) -> None:
    breaks(gateway, Code.PROTOCOL_ERROR, opening(2))


@pytest.mark.parametrize("name", ["ACCEPT", "REFUSE", "REDIRECT"])
def test_a_gateway_does_not_answer(relay: Side, name: str) -> None:
    breaks(relay, Code.PROTOCOL_ERROR, STREAM_FRAMES[name](1))


@pytest.mark.parametrize("name", ["ACCEPT", "REFUSE", "REDIRECT"])
def test_a_stream_is_answered_once(gateway: Side, name: str) -> None:
    breaks(gateway, Code.PROTOCOL_ERROR, STREAM_FRAMES["ACCEPT"](1), STREAM_FRAMES[name](1))


@pytest.mark.parametrize("before", ["DATA", "FIN"])
def test_a_stream_is_answered_before_it_is_used(gateway: Side, before: str) -> None:
    """Otherwise a client could hear two relays on one connection."""
    breaks(gateway, Code.PROTOCOL_ERROR, STREAM_FRAMES[before](1))


def test_data_behind_fin_is_an_error(relay: Side) -> None:
    breaks(relay, Code.PROTOCOL_ERROR, frames.encode_fin(1), data(1, 1))


def test_a_second_fin_is_an_error(relay: Side) -> None:
    breaks(relay, Code.PROTOCOL_ERROR, frames.encode_fin(1), frames.encode_fin(1))


def test_data_up_to_the_window_and_not_a_byte_more(relay: Side) -> None:
    relay.make_endpoint = Recorder
    arrive(relay, opening(2))
    relay.streams[2].accept()
    breaks(relay, Code.FLOW_CONTROL, data(2, FIRST_WINDOW_BYTES), data(2, 1))


def test_an_oversized_frame_is_refused_at_its_header(relay: Side) -> None:
    relay.make_endpoint = Recorder
    arrive(relay, opening(2))
    breaks(relay, Code.FLOW_CONTROL, data(2, FIRST_WINDOW_BYTES - 10), data(2, 11)[: frames.HEADER_BYTES])
    assert len(relay.endpoints[2].data) == FIRST_WINDOW_BYTES - 10


@pytest.mark.parametrize("window", [0, MAX_CREDIT + 1, 2**32 - 1])
def test_an_opening_has_a_sensible_window(relay: Side, window: int) -> None:
    breaks(relay, Code.FLOW_CONTROL, opening(2, window))
    assert list(relay.mux.streams) == [1]


@pytest.mark.parametrize("window", [0, EARLY_BYTES - 1, MAX_CREDIT + 1, 2**32 - 1])
def test_an_answer_has_a_sensible_window(gateway: Side, window: int) -> None:
    breaks(gateway, Code.FLOW_CONTROL, frames.encode_accept(1, window))


@pytest.mark.parametrize("window", [EARLY_BYTES, MAX_CREDIT])
def test_an_answer_grants_what_it_says_less_the_early_bytes(gateway: Side, window: int) -> None:
    gateway.send(gateway.streams[1], 1_000)
    arrive(gateway, frames.encode_accept(1, window))
    assert gateway.streams[1].send_credit == window - 1_000


def test_credit_before_the_answer_is_an_error(gateway: Side) -> None:
    """The bytes that may go before ACCEPT are kept for a replay: credit for more of them would let a relay fill the gateway's memory."""
    breaks(gateway, Code.PROTOCOL_ERROR, frames.encode_credit(1, 1))


def test_early_bytes_taken_before_the_answer_are_credited_behind_it() -> None:
    side = Pair().relay
    side.budget.promised_bytes = side.budget._first_bytes - EARLY_BYTES  # so the early bytes are the whole window
    arrive(side, opening(1), data(1, EARLY_BYTES))
    assert answers(side) == []
    side.streams[1].accept()
    assert [kind for kind, _, _ in answers(side)] == [frames.ACCEPT, frames.CREDIT]


@pytest.mark.parametrize("amount", [0, MAX_CREDIT, 2**32 - 1])
def test_credit_does_not_overflow(relay: Side, amount: int) -> None:
    breaks(relay, Code.FLOW_CONTROL, u32(frames.CREDIT, 1, amount))


def test_credit_may_reach_the_limit(relay: Side) -> None:
    arrive(relay, u32(frames.CREDIT, 1, MAX_CREDIT - 65_536))
    assert relay.streams[1].send_credit == MAX_CREDIT
    breaks(relay, Code.FLOW_CONTROL, u32(frames.CREDIT, 1, 1))


def test_an_ack_of_bytes_never_written_is_an_error(gateway: Side) -> None:
    breaks(
        gateway, Code.PROTOCOL_ERROR, frames.encode_u64(frames.ACK, gateway.ring.head), frames.encode_u64(frames.ACK, gateway.ring.head + 1)
    )


def test_frames_of_later_versions_are_skipped(relay: Side) -> None:
    arrive(relay, frames.encode(0x80, 0, b"x" * 1_024), frames.encode(0xEF, 1), frames.encode(0x90, 77, b"y"), data(1, 3))
    assert relay.endpoints[1].data == b"xxx"


def test_codes_of_later_versions_are_understood_enough(relay: Side) -> None:
    arrive(relay, frames.encode(frames.RESET, 1, b"\x7f\xff"), frames.encode(frames.GOAWAY, 0, b"\x7f\xffbye"))
    assert relay.endpoints[1].events == [("reset", Code.INTERNAL_ERROR)]
    assert relay.mux.goaway == (Code.INTERNAL_ERROR, "bye")


def test_goaway_is_noted_with_its_reason() -> None:
    pair = Pair()
    assert pair.relay.mux.goaway is None
    pair.gateway.mux.queue(frames.encode_goaway(Code.FENCED, "another instance"))
    pair.pump()
    assert pair.relay.mux.goaway == (Code.FENCED, "another instance")


def test_a_ping_is_answered_with_an_ack_and_its_pong(relay: Side) -> None:
    arrive(relay, frames.encode_u64(frames.PING, 2**64 - 1))
    received = relay.mux.parser.received
    expected = [(frames.ACK, 0, received.to_bytes(8, "big")), (frames.PONG, 0, b"\xff" * 8)]
    assert answers(relay) == expected


def test_who_asks_is_told_at_once_what_has_arrived_and_measures_nothing() -> None:
    pair = Pair()
    ours, _ = pair.open()
    pair.gateway.send(ours, ASK_EVERY_BYTES // 2)
    pair.pump()
    mux, ring = pair.gateway.mux, pair.gateway.mux.ring
    mux.ask()
    assert ring.unsent_bytes == 0, "so little is not worth it"
    pair.gateway.send(ours, ASK_EVERY_BYTES // 2)
    mux.ask()
    mux.ask()
    asked_at = ring.head
    pair.now += 0.25
    pair.pump()
    assert ring.acked == ring.head == asked_at
    assert answers(pair.relay) == []
    assert mux.min_rtt_s == 0.0


def test_the_round_trip_is_the_shortest_of_the_last_sixteen() -> None:
    pair = Pair()

    def ping(rtt_s: float, passed_bytes: int = 0) -> float:
        pair.gateway.mux.tick(pair.now)
        pair.gateway.mux.bytes_in += passed_bytes
        pair.write(pair.gateway)
        pair.deliver(pair.gateway)
        pair.now += rtt_s
        pair.write(pair.relay)
        pair.deliver(pair.relay)
        return pair.gateway.mux.min_rtt_s

    assert ping(0.030) == pytest.approx(0.030, abs=2e-6)
    assert ping(0.010) == pytest.approx(0.010, abs=2e-6)
    for _ in range(15):
        assert ping(0.020) == pytest.approx(0.010, abs=2e-6)
    assert ping(0.020) == pytest.approx(0.020, abs=2e-6)
    for _ in range(20):  # as long as bulk goes on: a queue of our own making is no longer path
        assert ping(0.200, CALM_BYTES) == pytest.approx(0.020, abs=2e-6)
    assert ping(0.015, CALM_BYTES) == pytest.approx(0.015, abs=2e-6)
    assert ping(0.0) > 0


@pytest.mark.parametrize("opaque", [0, 2**64 - 1, int(1_000.1e6), int(939e6)])
def test_a_pong_nobody_asked_for_does_not_count(relay: Side, opaque: int) -> None:
    arrive(relay, frames.encode_u64(frames.PONG, opaque))
    assert relay.mux.min_rtt_s == 0.0


def ack_values(side: Side) -> list[int]:
    return [int.from_bytes(payload, "big") for kind, _, payload in answers(side) if kind == frames.ACK]


def test_a_receiver_acknowledges_every_128_kib(relay: Side) -> None:
    acknowledged = relay.mux.parser.received
    arrive(relay, frames.encode_u64(frames.PING, 0))
    acknowledged = ack_values(relay)[-1]
    for _ in range(400):
        arrive(relay, data(1, 1_500))
        received = relay.mux.parser.received
        for ack in ack_values(relay):
            assert ack == received
            acknowledged = ack
        assert received - acknowledged < ACK_EVERY_BYTES


def test_a_tick_acknowledges_what_is_new_and_pings(relay: Side) -> None:
    arrive(relay, data(1, 10))
    relay.mux.tick(1_001.5)
    kinds = [kind for kind, _, _ in answers(relay)]
    assert kinds == [frames.ACK, frames.PING]
    relay.mux.tick(1_003.0)
    assert answers(relay) == [(frames.PING, 0, int(1_003.0e6).to_bytes(8, "big"))]


def test_without_resumption_nothing_is_acknowledged() -> None:
    pair = Pair(resume=False)
    ours, _ = pair.open()
    for _ in range(20):
        pair.gateway.send(ours, 100_000)
        pair.write(pair.gateway)
        pair.deliver(pair.gateway)
    pair.relay.mux.tick(pair.now)
    assert ack_values(pair.relay) == []
    assert pair.gateway.ring.free_bytes == pair.gateway.ring.size_bytes


def test_data_leaves_room_for_control_frames() -> None:
    pair = Pair(ring_bytes=64_000)
    for _ in range(3):
        ours = pair.gateway.open()
        arrive(pair.gateway, frames.encode_accept(ours.id, 65_536))
        pair.gateway.send(ours, 65_536)
    assert pair.gateway.mux.data_room <= frames.HEADER_BYTES
    assert RING_RESERVE_BYTES - 200 < pair.gateway.ring.free_bytes <= RING_RESERVE_BYTES + frames.HEADER_BYTES
    assert pair.gateway.woken


def test_control_frames_wait_in_order_for_room(relay: Side) -> None:
    """Nothing is acknowledged while the ring fills; then everything comes in the order it was queued."""
    values = range(200_000)
    for value in values:
        relay.mux.queue(frames.encode_u64(frames.PONG, value))
    assert relay.mux.data_room == 0
    seen: list[int] = []
    while relay.ring.unsent_bytes:
        seen += [int.from_bytes(payload, "big") for _, _, payload in whole_pongs(relay)]
    assert seen == list(values)
    assert relay.mux.data_room > 0


def test_a_control_frame_does_not_overtake_those_that_wait() -> None:
    side = Pair(ring_bytes=160).relay
    for value in range(15):
        side.mux.queue(frames.encode_u64(frames.PONG, value))
    first = whole_pongs_without_refill(side)
    side.mux.queue(frames.encode_u64(frames.PONG, 15))
    side.mux.refill()
    seen = [int.from_bytes(payload, "big") for _, _, payload in first + whole_pongs(side) + whole_pongs(side)]
    assert seen == list(range(16))


def whole_pongs(side: Side) -> list[Frame]:
    """Send and acknowledge whole frames, so that waiting ones may follow."""
    sent = whole_pongs_without_refill(side)
    side.mux.refill()
    return sent


def whole_pongs_without_refill(side: Side) -> list[Frame]:
    length = side.ring.unsent_bytes - side.ring.unsent_bytes % 16
    raw = b""
    while len(raw) < length:
        view = bytes(side.ring.unsent(length - len(raw)))
        raw += view
        side.ring.advance(len(view))
    side.ring.acknowledge(side.ring.sent)
    sink = CollectingSink()
    sink.feed(raw)
    return sink.frames


def test_a_peer_that_makes_us_answer_for_ever_is_cut_off_in_bounded_memory(relay: Side) -> None:
    pings = frames.encode_u64(frames.PING, 1) * 10_000
    for _ in range(60):
        arrive(relay, pings)
        assert len(relay.mux.overflow) <= MAX_OVERFLOW_BYTES + 16
    assert relay.mux.overrun


def test_everything_queued_wakes_the_link(gateway: Side) -> None:
    for act in (
        lambda: gateway.mux.tick(1.0),
        lambda: gateway.open(),
        lambda: gateway.streams[1].fin(),
        lambda: gateway.streams[1].reset(Code.CANCELLED),
    ):
        before = gateway.woken
        act()
        assert gateway.woken > before
