"""The replay ring against a plain model: one growing byte string and three counters."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.frames import HEADER_BYTES, MAX_DATA_BYTES
from fxtunnel.protocol.replay import SLACK_BYTES, ReplayRing


class RingMachine(RuleBasedStateMachine):
    """`written` is the whole sequence since the start; a blocked write is what OpenSSL wants to see again."""

    @initialize(size=st.integers(24, 90), keep=st.booleans())
    def begin(self, size: int, keep: bool) -> None:
        self.ring = ReplayRing(size, keep=keep)
        self.keep = keep
        self.size = size
        self.written = b""
        self.sent = 0
        self.acked = 0
        self.peer_received = 0
        """The highest the peer has told us."""
        self.blocked = b""

    def fresh(self, length: int) -> bytes:
        at = len(self.written)
        return bytes((at + i) * 7 % 251 for i in range(length))

    @property
    def free(self) -> int:
        return self.size - (len(self.written) - self.acked)

    @rule(length=st.integers(1, 100))
    def append(self, length: int) -> None:
        frame = self.fresh(length)
        if length > self.free:
            with pytest.raises(LocalProtocolError):
                self.ring.append(frame)
            return
        self.ring.append(frame)
        self.written += frame

    @precondition(lambda self: self.free > HEADER_BYTES)
    @rule(data=st.data(), stream_id=st.integers(1, frames.MAX_STREAM_ID))
    def read_into_the_slot(self, data: st.DataObject, stream_id: int) -> None:
        room = self.free - HEADER_BYTES
        limit = data.draw(st.integers(1, room))
        length = data.draw(st.integers(1, limit))
        payload = self.fresh(limit)
        slot = self.ring.slot(limit)
        assert len(slot) == limit
        slot[:] = payload
        self.ring.commit_data(stream_id, length)
        self.written += frames.encode(frames.DATA, stream_id, payload[:length])

    @rule(limit=st.integers(1, 120))
    def try_to_write(self, limit: int) -> None:
        view = bytes(self.ring.unsent(max(limit, len(self.blocked))))
        assert self.written[self.sent :].startswith(view)
        assert bool(view) == (self.sent < len(self.written))
        assert len(view) >= len(self.blocked)
        self.blocked = view

    @precondition(lambda self: self.blocked)
    @rule()
    def write_is_done(self) -> None:
        again = self.ring.unsent(len(self.blocked))
        assert bytes(again) == self.blocked
        self.ring.advance(len(self.blocked))
        self.sent += len(self.blocked)
        self.blocked = b""
        self.acked = self.sent if not self.keep else max(self.acked, min(self.peer_received, self.sent))

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        """Old ACKs, and ACKs of bytes of the blocked write, which TLS has partly passed on already."""
        received = data.draw(st.integers(0, len(self.written)))
        self.ring.acknowledge(received)
        self.peer_received = max(self.peer_received, received)
        if self.keep:
            self.acked = max(self.acked, min(self.peer_received, self.sent))

    @rule(beyond=st.integers(1, 2**64))
    def acknowledge_what_was_never_written(self, beyond: int) -> None:
        with pytest.raises(RemoteProtocolError):
            self.ring.acknowledge(len(self.written) + beyond)

    @rule(data=st.data())
    def link_is_lost(self, data: st.DataObject) -> None:
        """The peer may have any byte it has not acknowledged yet, in the middle of a frame too."""
        received = data.draw(st.integers(max(self.acked, self.peer_received), len(self.written)))
        self.ring.rewind(received)
        self.sent = self.acked = self.peer_received = received
        self.blocked = b""

    @rule(data=st.data())
    def illegal_resume(self, data: st.DataObject) -> None:
        low = max(self.acked, self.peer_received)
        outside = st.integers(len(self.written) + 1, 2**64)
        received = data.draw(outside | st.integers(0, low - 1) if low else outside)
        with pytest.raises(RemoteProtocolError):
            self.ring.rewind(received)

    @rule(more=st.integers(-20, 90))
    def grow(self, more: int) -> None:
        self.ring.grow(self.size + more)
        grown = self.ring.size_bytes
        assert self.size <= grown <= max(self.size, self.size + more)
        if self.sent == len(self.written):
            assert grown == max(self.size, self.size + more)
        self.size = grown

    @invariant()
    def counters_agree(self) -> None:
        if not hasattr(self, "ring"):
            return
        ring = self.ring
        assert (ring.head, ring.sent, ring.acked) == (len(self.written), self.sent, self.acked)
        assert (ring.free_bytes, ring.unsent_bytes) == (self.free, len(self.written) - self.sent)
        assert 0 <= ring.free_bytes <= ring.size_bytes == self.size

    def teardown(self) -> None:
        """From what is acknowledged on, every byte is still there."""
        if not hasattr(self, "ring"):
            return
        start = max(self.acked, self.peer_received)
        self.ring.rewind(start)
        seen = b""
        while view := bytes(self.ring.unsent(1_000)):
            seen += view
            self.ring.advance(len(view))
        assert seen == self.written[start:]


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("start", [0, 1, 7, 99_991, 99_999])
def test_the_longest_frame_fits_wherever_it_begins(start: int) -> None:
    """Only the slack behind the ring lets `recv_into` write it in one piece."""
    ring = ReplayRing(MAX_DATA_BYTES + HEADER_BYTES)
    ring.append(b"x" * start)
    ring.advance(start)
    ring.acknowledge(start)
    payload = bytes(range(251)) * 1_045
    payload = payload[:MAX_DATA_BYTES]
    ring.slot(MAX_DATA_BYTES)[:] = payload
    ring.commit_data(5, MAX_DATA_BYTES)
    assert ring.free_bytes == 0
    seen = b""
    while ring.unsent_bytes:
        view = ring.unsent(100_000)
        seen += bytes(view)
        ring.advance(len(view))
    assert seen == frames.encode(frames.DATA, 5, payload)


def test_a_slot_is_whole_at_the_last_byte_of_the_ring() -> None:
    ring = ReplayRing(SLACK_BYTES + 100)
    ring.append(b"x" * (ring.size_bytes - 1))
    ring.advance(ring.size_bytes - 1)
    ring.acknowledge(ring.size_bytes - 1)
    assert len(ring.slot(MAX_DATA_BYTES)) == MAX_DATA_BYTES


def test_an_ack_during_a_blocked_write_does_not_free_its_bytes() -> None:
    ring = ReplayRing(100)
    ring.append(b"a" * 60)
    blocked = bytes(ring.unsent(100))
    ring.acknowledge(40)
    assert (ring.acked, ring.free_bytes) == (0, 40)
    assert bytes(ring.unsent(100)) == blocked
    ring.advance(60)
    assert (ring.acked, ring.free_bytes) == (40, 80)


def test_without_resumption_what_is_sent_is_free() -> None:
    ring = ReplayRing(50, keep=False)
    for _ in range(20):
        ring.append(b"b" * 30)
        while ring.unsent_bytes:
            ring.advance(len(ring.unsent(100)))
        assert ring.free_bytes == 50


@given(st.integers(30, 60), st.integers(0, 200), st.integers(1, 30), st.integers(1, 200))
def test_growing_never_shortens_a_blocked_write(size: int, shift: int, waiting: int, more: int) -> None:
    """OpenSSL fails a repeated write that is shorter than the first try."""
    ring = ReplayRing(size)
    for sent in range(1, shift + 1):
        ring.append(b"x")
        ring.advance(1)
        ring.acknowledge(sent)
    ring.append(b"y" * waiting)
    before = len(ring.unsent(1_000))
    ring.grow(size + more)
    assert len(ring.unsent(1_000)) >= before


def test_a_ring_that_is_given_back_may_be_given_back_again() -> None:
    ring = ReplayRing(1 << 16)
    assert len(ring._buffer) == (1 << 16) + SLACK_BYTES
    ring.append(b"frame")
    for _ in range(2):
        ring.dispose()
        assert len(ring._buffer) == 0
    assert ring.unsent_bytes == 5
