"""When a link's heartbeats are due: often where something passes, just often enough where nothing does, and always in time."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.protocol.heartbeats import BULK_BYTES, IDLE_BYTES, Heartbeats, next_beat

DEAD_S = 10.0
BEAT_S = 3.0


@dataclass
class End:
    """One end of a link, as its session keeps it."""

    heartbeat_s: float = BEAT_S
    dead_after_s: float = DEAD_S
    yield_s: float = 0.0
    heard_at: float = 0.0
    asks_at: float = 0.0
    pings: int = 0

    def asks(self, now: float, *, is_idle: bool) -> bool:
        """Its timer: whether it pings now."""
        is_due, wait_s = next_beat(now - self.heard_at, self.heartbeat_s, self.dead_after_s, self.yield_s, is_idle=is_idle)
        self.asks_at = now + wait_s
        self.pings += is_due
        return is_due


def live(ends: tuple[End, End], until_s: float, rtt_s: float) -> None:
    """Both over a path that answers."""
    now = 0.0
    while now < until_s:
        end = min(ends, key=lambda end: end.asks_at)
        now = max(now, end.asks_at)
        assert now - end.heard_at < end.dead_after_s
        if end.asks(now, is_idle=True):
            (other,) = (one for one in ends if one is not end)
            other.heard_at, end.heard_at = now + rtt_s / 2, now + rtt_s


def test_one_ping_does_for_both_ends_of_an_idle_link() -> None:
    relay, gateway = End(), End(yield_s=1.0)
    live((relay, gateway), 600.0, 0.05)
    assert gateway.pings == 0
    assert relay.pings == pytest.approx(600 / (DEAD_S / 2 + 0.05), abs=2)


def test_an_end_whose_peer_never_pings_does_so_itself() -> None:
    relay, gateway = End(heartbeat_s=1e9, dead_after_s=4e9), End(yield_s=1.0)
    live((relay, gateway), 600.0, 0.05)
    assert relay.pings == 0
    assert gateway.pings > 600 / DEAD_S


def test_a_link_that_carries_something_is_measured_every_heartbeat() -> None:
    assert next_beat(0.01, BEAT_S, DEAD_S, 1.0, is_idle=False) == (True, BEAT_S)


@given(
    beat_s=st.floats(0.1, 7.5),
    ratio=st.floats(2, 50),
    yields=st.floats(0, 1 / 3),
    heard_at=st.floats(0, 10),
    is_idle=st.booleans(),
)
def test_a_path_that_dies_is_found_in_time_and_was_asked_before(
    beat_s: float, ratio: float, yields: float, heard_at: float, is_idle: bool
) -> None:
    """The last bytes arrive at any moment, whatever the timer had been set to before."""
    end = End(beat_s, beat_s * ratio, beat_s * yields)
    while end.asks_at < heard_at:
        now = end.heard_at = end.asks_at
        end.asks(now, is_idle=is_idle)
    end.heard_at, end.pings, asked = heard_at, 0, 0
    while (now := end.asks_at) - heard_at < end.dead_after_s * (1 - 1e-9):
        asked += 1
        assert asked < 1_000
        if end.asks(now, is_idle=is_idle):  # there is time for its answer
            assert end.pings > 1 or now - heard_at < end.dead_after_s * 0.7
    assert now - heard_at <= end.dead_after_s * (1 + 1e-9) + (0 if asked else end.heartbeat_s)
    assert end.pings


def test_a_link_is_idle_only_when_it_was_so_for_a_whole_heartbeat() -> None:
    beats = Heartbeats()
    beats.began(0)
    beats.began(32)
    assert beats.is_idle(32 + IDLE_BYTES - 1)
    assert not beats.is_idle(32 + IDLE_BYTES)
    beats.began(BULK_BYTES + 32)
    assert not beats.is_idle(BULK_BYTES + 64)
    assert beats.is_bulk(BULK_BYTES + 64)
    beats.began(BULK_BYTES + 64)
    assert beats.is_idle(BULK_BYTES + 96)
    assert not beats.is_bulk(BULK_BYTES + 96)
