"""However the bytes arrive, and wherever links break, every byte sequence arrives once and in order."""

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol.credit import WindowBudget
from fxtunnel.protocol.stream import Stream
from tests.protocol.mux_pair import MIB, Pair, pattern


def random_sizes(seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield rng.choice((1, 2, 7, 8, 9, 16, 100, 1_500, 16_384))


def bytewise() -> Iterator[int]:
    while True:
        yield 1


def hold_a_conversation(pair: Pair, pump: Callable[[], None], rounds: int, amount: int) -> None:
    """Six streams: four transfer both ways and end each in its own way, one is refused, one redirected."""
    streams: list[Stream] = []
    for number in range(1, 7):
        pair.relay.on_opened = {5: refuse, 6: redirect}.get(number, accept)
        streams.append(pair.gateway.open())
        pair.gateway.send(streams[-1], 1_000)
        pump()
    for _ in range(rounds):
        for ours in streams[:4]:
            pair.gateway.send(ours, amount)
            pair.relay.send(pair.relay.streams[ours.id], amount // 2)
            pair.now += 0.001
        pump()
    first, second, third, fourth = streams[:4]
    first.fin()
    pump()
    pair.relay.send(pair.relay.streams[1], amount)
    pair.relay.streams[1].fin()
    pair.relay.streams[2].fin()
    second.fin()
    third.reset(Code.PEER_RESET)
    pair.relay.streams[4].reset(Code.IDLE_TIMEOUT)
    pump()
    check_conversation(pair, first, second, third, fourth)


def check_conversation(pair: Pair, first: Stream, second: Stream, third: Stream, fourth: Stream) -> None:
    gateway, relay = pair.sides
    for ours in (first, second):
        theirs = relay.streams[ours.id]
        assert relay.heard(theirs).data == pattern(ours.id, 0, ours.bytes_out)
        assert gateway.heard(ours).data == pattern(ours.id, 0, theirs.bytes_out)
        assert gateway.heard(ours).events[0] == ("accept",)
        assert gateway.heard(ours).events[-1] == relay.heard(theirs).events[-1] == ("fin",)
    assert relay.heard(third).events[-1] == ("reset", Code.PEER_RESET)
    assert relay.heard(third).data == pattern(3, 0, third.bytes_out)
    assert gateway.heard(fourth).events[-1] == ("reset", Code.IDLE_TIMEOUT)
    assert gateway.heard(fourth).data == pattern(4, 0, relay.streams[4].bytes_out)
    assert gateway.endpoints[5].events == [("refuse", Code.NO_SERVICE, "not here")]
    assert gateway.endpoints[6].events == [("redirect", "node-b")]
    for side in pair.sides:
        assert not side.mux.streams
        assert (side.budget.promised_bytes, side.budget.grown_bytes) == (0, 0)
        assert side.mux.parser.received == pair.other(side).ring.head


def accept(stream: Stream) -> None:
    stream.accept()


def refuse(stream: Stream) -> None:
    stream.refuse(Code.NO_SERVICE, "not here")


def redirect(stream: Stream) -> None:
    stream.redirect("node-b")


def test_whole() -> None:
    pair = Pair()
    hold_a_conversation(pair, pair.pump, rounds=20, amount=200_000)
    assert pair.gateway.mux.bytes_in > 3_000_000


def test_one_byte_at_a_time() -> None:
    pair = Pair()
    sizes = bytewise()
    hold_a_conversation(pair, lambda: pair.pump(sizes), rounds=3, amount=2_000)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_cuts(seed: int) -> None:
    pair = Pair()
    sizes = random_sizes(seed)
    hold_a_conversation(pair, lambda: pair.pump(sizes), rounds=10, amount=50_000)


@pytest.mark.parametrize("resume", [True, False])
def test_a_small_ring_that_wraps_all_the_time(resume: bool) -> None:
    pair = Pair(ring_bytes=150_001, resume=resume)
    hold_a_conversation(pair, pair.settle if resume else pair.pump, rounds=100, amount=30_000)
    assert pair.gateway.ring.head > 10 * pair.gateway.ring.size_bytes


def break_the_link_often(pair: Pair, rng: random.Random, chance: float) -> Callable[[], None]:
    """Pump in small writes and arrivals; any of them may be the last on its link."""

    def pump() -> None:
        for _ in range(100_000):
            for side in pair.sides:
                if rng.random() < 0.3:
                    pair.begin_write(side, rng.randrange(1, 60_000), rng.randrange(0, 60_000))
                else:
                    pair.write(side, rng.randrange(1, 60_000))
                pair.deliver(side, rng.randrange(1, 60_000))
            if rng.random() < chance:
                pair.cut()
            if all(side.mux.parser.received == pair.other(side).ring.head for side in pair.sides):
                return
        raise AssertionError("the pair does not come to rest")

    return pump


@pytest.mark.parametrize("seed", range(8))
def test_links_that_break_at_random_bytes(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(ring_bytes=200_003)
    hold_a_conversation(pair, break_the_link_often(pair, rng, 0.3), rounds=15, amount=60_000)
    assert pair.cuts > 20


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.6), st.integers(1, 20_000))
def test_links_that_break_more_or_less_often(seed: int, chance: float, amount: int) -> None:
    pair = Pair(ring_bytes=150_001)
    hold_a_conversation(pair, break_the_link_often(pair, random.Random(seed), chance), rounds=4, amount=amount)


def test_a_link_that_breaks_behind_every_single_byte() -> None:
    """OPEN with early bytes, ACCEPT, DATA both ways, CREDIT, FIN and RESET: each cut at each of its bytes, both ways."""
    pair = Pair()
    pair.relay.on_opened = accept
    ours, other = pair.gateway.open(), pair.gateway.open()
    pair.gateway.send(ours, 20)
    script: list[Callable[[], object]] = [
        lambda: pair.relay.send(pair.relay.streams[1], 9_000),
        ours.fin,
        lambda: pair.relay.streams[1].fin(),
        lambda: other.reset(Code.CANCELLED),
    ]
    while True:
        for side in pair.sides:
            pair.write(side)
            if pair.wires[side].flying:
                pair.deliver(side, 1)
        for side in pair.sides:
            side.ring.rewind(pair.other(side).mux.parser.received)
            pair.wires[side].flying.clear()
        if all(side.mux.parser.received == pair.other(side).ring.head for side in pair.sides):
            if not script:
                break
            script.pop(0)()
    assert pair.relay.heard(ours).data == pattern(1, 0, 20)
    assert pair.gateway.heard(ours).data == pattern(1, 0, 9_000)
    assert pair.gateway.heard(ours).events == [("accept",), ("fin",)]
    assert pair.relay.heard(ours).events == [("fin",)]
    assert pair.relay.heard(other).events == [("reset", Code.CANCELLED)]
    pair.check_budgets()


def test_a_session_goes_on_without_a_link_and_delivers_later() -> None:
    pair = Pair()
    ours, theirs = pair.open()
    pair.write(pair.gateway)
    pair.gateway.send(ours, 1_000)
    pair.write(pair.gateway)
    theirs.fin()
    another = pair.gateway.open()
    pair.cut()
    pair.pump()
    assert pair.relay.heard(theirs).data == pattern(1, 0, 1_000)
    assert pair.gateway.heard(ours).events[-1] == ("fin",)
    assert another.id in pair.relay.streams


def test_a_peer_cannot_resume_at_bytes_it_has_acknowledged_already() -> None:
    pair = Pair()
    ours, _ = pair.open()
    pair.gateway.send(ours, 10_000)
    pair.settle()
    acked = pair.gateway.ring.acked
    for wrong in (acked - 1, pair.gateway.ring.head + 1):
        with pytest.raises(RemoteProtocolError):
            pair.gateway.ring.rewind(wrong)
    pair.gateway.ring.rewind(acked)


def test_the_ring_may_grow_while_links_break() -> None:
    rng = random.Random(3)
    pair = Pair(ring_bytes=60_000)
    ours, theirs = pair.open()
    total = 0
    for step in range(60):
        total += pair.gateway.send(ours, 30_000)
        pair.begin_write(pair.gateway, 20_000, rng.randrange(20_000))
        pair.deliver(pair.gateway, rng.randrange(20_000))
        pair.gateway.ring.grow(60_000 + step * 3_001)
        if rng.random() < 0.2:
            pair.cut()
        else:
            pair.write(pair.gateway)
            pair.deliver(pair.gateway)
            pair.write(pair.relay)
            pair.deliver(pair.relay)
            pair.relay.mux.tick(pair.now)
    pair.settle()
    assert pair.gateway.ring.size_bytes > 60_000
    assert total > 500_000
    assert pair.relay.heard(theirs).data == pattern(1, 0, total)


def fill_and_grow(pair: Pair) -> int:
    """As much as fits is written, again and again, to a peer that answers PINGs late and acknowledges nothing. Returns the size."""
    mux = pair.gateway.mux
    mux.heartbeats.min_rtt_s = 0.05
    for _ in range(10):
        pair.gateway.ring.append(bytes(pair.gateway.ring.free_bytes))
        mux.grow_ring(16 * MIB)
    return pair.gateway.ring.size_bytes


def test_rings_grow_from_one_budget_and_give_it_back_when_their_session_ends() -> None:
    budget = WindowBudget(256 * MIB)
    pairs = [Pair() for _ in range(20)]
    for pair in pairs:
        pair.gateway.mux._budget = budget
    sizes = [fill_and_grow(pair) for pair in pairs]
    assert sizes[0] == 16 * MIB, "one that is alone gets what it may have"
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == MIB, "when nothing is left they stay as they are"
    assert sum(sizes) - 20 * MIB == budget.rings_bytes <= 32 * MIB
    for pair in pairs:
        pair.gateway.mux.dispose()
        pair.gateway.mux.dispose()
    assert budget.rings_bytes == 0


def test_a_ring_that_cannot_grow_as_far_takes_no_more_than_it_grows_by() -> None:
    pair = Pair(ring_bytes=300_000)
    pair.gateway.mux.heartbeats.min_rtt_s = 0.05
    pair.gateway.ring.append(bytes(100))
    pair.gateway.mux.grow_ring(500_000)  # with bytes that wait to be sent, only a multiple would do
    assert (pair.gateway.ring.size_bytes, pair.gateway.budget.rings_bytes) == (300_000, 0)
    pair.write(pair.gateway)
    pair.gateway.mux.grow_ring(500_000)
    assert (pair.gateway.ring.size_bytes, pair.gateway.budget.rings_bytes) == (500_000, 200_000)


def test_an_idle_ring_gives_back_what_it_had_grown_by() -> None:
    pair = Pair(ring_bytes=60_000)
    ours, theirs = pair.open()
    gateway = pair.gateway
    gateway.mux.heartbeats.min_rtt_s = 0.05
    for _ in range(3):
        gateway.mux.grow_ring(16 * MIB)
        gateway.send(ours, 300_000)
        gateway.mux.shrink_ring()
        assert gateway.ring.size_bytes > 60_000, "what waits to be sent stays where it is"
        pair.pump()
    assert gateway.ring.head - gateway.ring.acked > 60_000
    gateway.mux.shrink_ring()
    assert (gateway.ring.size_bytes, gateway.budget.rings_bytes) == (480_000, 420_000), "what is kept for a replay does not fit"
    pair.settle()
    gateway.send(ours, 5_000)
    pair.write(gateway)
    gateway.mux.shrink_ring()
    gateway.mux.shrink_ring()
    assert (gateway.ring.size_bytes, gateway.budget.rings_bytes) == (60_000, 0)
    pair.cut()  # what was kept is sent again
    for _ in range(40):
        gateway.send(ours, 20_000)
        pair.settle()
    assert pair.relay.heard(theirs).data == pattern(ours.id, 0, ours.bytes_out)
    gateway.mux.dispose()
    assert gateway.budget.rings_bytes == 0
