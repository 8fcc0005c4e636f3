"""A state machine of two muxes: any order of opening, sending, ending, taking, writing, arriving and breaking."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fxtunnel.codes import Code
from fxtunnel.protocol.frames import EARLY_BYTES
from fxtunnel.protocol.mux import RING_RESERVE_BYTES
from fxtunnel.protocol.stream import Stream
from tests.protocol.mux_pair import MIB, Pair, Recorder, Side, pattern

SIDES = st.sampled_from([0, 1])
AMOUNTS = st.sampled_from([1, 7, 100, 4_096, 5_000, 40_000])
ENDINGS = ("fin", "reset", "refuse", "redirect")


class PairMachine(RuleBasedStateMachine):
    """The model: what each end has sent (its byte counters) and that the other end hears just that."""

    @initialize(
        ring=st.sampled_from([RING_RESERVE_BYTES + 3_000, 33_333, 100_000, MIB]), memory=st.sampled_from([60_000, 400_000, 256 * MIB])
    )
    def begin(self, ring: int, memory: int) -> None:
        self.pair = Pair(ring_bytes=ring, memory_bytes=memory, max_streams=6)
        for side in self.pair.sides:
            side.make_endpoint = Recorder
        self.resets: set[tuple[Side, int]] = set()
        self.turned_down: set[int] = set()

    def side(self, index: int) -> Side:
        return self.pair.sides[index]

    def pick(self, data: st.DataObject, side: Side) -> Stream | None:
        live = sorted(side.mux.streams)
        return side.streams[data.draw(st.sampled_from(live))] if live else None

    @rule()
    def open(self) -> None:
        side = self.pair.gateway
        endpoint = Recorder()
        stream = side.mux.open(b"\x01\x00\x03ssh", endpoint)
        if stream is None:
            return
        endpoint.stream = stream
        side.endpoints[stream.id] = endpoint
        side.streams[stream.id] = stream

    @rule(data=st.data(), answer=st.sampled_from(["accept", "accept", "accept", "refuse", "redirect"]))
    def answer(self, data: st.DataObject, answer: str) -> None:
        side = self.pair.relay
        stream = self.pick(data, side)
        if stream is None or stream.accepted or stream.closed:
            return
        if answer == "accept":
            stream.accept()
            return
        self.turned_down.add(stream.id)
        if answer == "refuse":
            stream.refuse(Code.BUSY, "busy")
        else:
            stream.redirect("node-b")

    @rule(data=st.data(), index=SIDES, amount=AMOUNTS)
    def send(self, data: st.DataObject, index: int, amount: int) -> None:
        side = self.side(index)
        stream = self.pick(data, side)
        if stream is None or stream.fin_sent or (side is self.pair.relay and not stream.accepted):
            return
        side.send(stream, amount)

    @rule(data=st.data(), index=SIDES)
    def fin(self, data: st.DataObject, index: int) -> None:
        side = self.side(index)
        stream = self.pick(data, side)
        if stream is not None and (side is self.pair.gateway or stream.accepted):
            stream.fin()

    @rule(data=st.data(), index=SIDES)
    def reset(self, data: st.DataObject, index: int) -> None:
        side = self.side(index)
        stream = self.pick(data, side)
        if stream is not None:
            self.resets.add((side, stream.id))
            stream.reset(Code.PEER_RESET)

    @rule(data=st.data(), index=SIDES, share=st.sampled_from([0.1, 0.5, 1.0]))
    def take(self, data: st.DataObject, index: int, share: float) -> None:
        side = self.side(index)
        waiting = sorted(stream_id for stream_id, endpoint in side.endpoints.items() if endpoint.waiting)
        if waiting:
            endpoint = side.endpoints[data.draw(st.sampled_from(waiting))]
            endpoint.take(max(1, int(endpoint.waiting * share)))

    @rule(index=SIDES, limit=st.integers(1, 50_000))
    def write(self, index: int, limit: int) -> None:
        self.pair.write(self.side(index), limit)

    @rule(index=SIDES, limit=st.integers(1, 50_000), passed_on=st.integers(0, 50_000))
    def write_and_block(self, index: int, limit: int, passed_on: int) -> None:
        self.pair.begin_write(self.side(index), limit, passed_on)

    @rule(index=SIDES, limit=st.integers(1, 50_000))
    def arrive(self, index: int, limit: int) -> None:
        self.pair.deliver(self.side(index), limit)

    @rule()
    def exchange_everything(self) -> None:
        self.pair.pump()

    @rule()
    def cut(self) -> None:
        self.pair.cut()

    @rule(index=SIDES, after_s=st.floats(0, 2))
    def beat(self, index: int, after_s: float) -> None:
        self.pair.now += after_s
        self.side(index).mux.tick(self.pair.now)

    @rule(index=SIDES, more=st.integers(1, 50_000))
    def grow(self, index: int, more: int) -> None:
        ring = self.side(index).ring
        ring.grow(ring.size_bytes + more)

    @precondition(lambda self: len(self.pair.gateway.mux.streams) < 3)
    @rule()
    def open_and_accept(self) -> None:
        self.open()
        self.pair.pump()
        for stream in list(self.pair.relay.mux.streams.values()):
            stream.accept()

    @invariant()
    def nothing_is_lost_repeated_or_swapped(self) -> None:
        if not hasattr(self, "pair"):
            return
        for side in self.pair.sides:
            for stream_id, endpoint in side.endpoints.items():
                sender = self.pair.other(side).streams.get(stream_id)
                sent = sender.bytes_out if sender is not None else 0
                assert len(endpoint.data) <= sent
                assert endpoint.data == pattern(stream_id, 0, len(endpoint.data))
                endings = [event[0] for event in endpoint.events if event[0] in ENDINGS]
                assert len(endings) <= 2
                assert endings.count("fin") <= 1
                if "fin" in endings:
                    assert len(endpoint.data) == sent, "a FIN before the end of the bytes"

    @invariant()
    def books_are_balanced(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.pair.check_budgets()
        for side in self.pair.sides:
            ring = side.ring
            assert ring.acked <= ring.sent <= ring.head
            assert ring.acked <= self.pair.other(side).mux.parser.received <= ring.head
            assert not side.mux.overrun
            for stream in side.mux.streams.values():
                assert 0 <= stream.window.left_bytes <= stream.window.window_bytes
                assert stream.send_credit >= 0
                assert stream.accepted or len(stream.early or b"") <= EARLY_BYTES

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.pair.settle()
        self.check_credit_agrees()
        self.finish_all()
        for side in self.pair.sides:
            assert not side.mux.streams
            assert side.mux.has_delivered
            for endpoint in side.endpoints.values():
                endpoint.take(endpoint.waiting)
            assert (side.budget.promised_bytes, side.budget.grown_bytes) == (0, 0)
            self.check_endings(side)

    def check_credit_agrees(self) -> None:
        """With nothing under way both ends know of the same streams and the same credit."""
        gateway, relay = self.pair.sides
        assert set(gateway.mux.streams) == set(relay.mux.streams)
        for stream_id, ours in gateway.mux.streams.items():
            theirs = relay.mux.streams[stream_id]
            assert ours.accepted == theirs.accepted
            assert theirs.send_credit == ours.window.left_bytes or theirs.fin_sent
            early_only = 0 if ours.accepted else theirs.window.first_bytes - EARLY_BYTES
            assert ours.send_credit == theirs.window.left_bytes - early_only or ours.fin_sent

    def finish_all(self) -> None:
        for stream in list(self.pair.relay.mux.streams.values()):
            stream.accept()
        self.pair.settle()
        for side in self.pair.sides:
            for stream in list(side.mux.streams.values()):
                stream.fin()
        self.pair.settle()

    def check_endings(self, side: Side) -> None:
        """Whoever heard a clean end, or was reset without resetting or turning down, has every byte."""
        other = self.pair.other(side)
        for stream_id, endpoint in side.endpoints.items():
            if (side, stream_id) in self.resets or stream_id in self.turned_down or stream_id not in other.streams:
                continue
            assert endpoint.data == pattern(stream_id, 0, other.streams[stream_id].bytes_out)
            if (other, stream_id) in self.resets:
                assert ("reset", Code.PEER_RESET) in endpoint.events or self.both_ended(endpoint, side.streams[stream_id])

    @staticmethod
    def both_ended(endpoint: Recorder, stream: Stream) -> bool:
        return stream.fin_sent and stream.fin_received and ("fin",) in endpoint.events


TestPair = PairMachine.TestCase
TestPair.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
