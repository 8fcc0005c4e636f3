"""What heartbeats tell: which round trips count, and what is bulk, to the byte."""

import pytest

from fxtunnel.protocol.heartbeats import BULK_BYTES, CALM_BYTES, MAX_S, SAMPLES, Heartbeats


def heard(*round_trips_s: float) -> Heartbeats:
    heartbeats = Heartbeats()
    for rtt_s in round_trips_s:
        heartbeats.began(0)
        heartbeats.answered(rtt_s, 0)
    return heartbeats


@pytest.mark.parametrize(("rtt_s", "known_s"), [(-0.001, 0.0), (0.0, 1e-6), (0.5, 0.5), (59.9, 59.9), (60.0, 0.0)])
def test_only_an_answer_to_a_ping_of_ours_counts(rtt_s: float, known_s: float) -> None:
    assert MAX_S == 60.0
    assert heard(rtt_s).min_rtt_s == known_s


def test_nothing_is_known_before_the_first_answer() -> None:
    heartbeats = Heartbeats()
    assert heartbeats.min_rtt_s == 0.0
    heartbeats.answered(0.2, 100 * CALM_BYTES)
    assert heartbeats.min_rtt_s == 0.2, "the first one counts even among bulk"


def test_the_shortest_is_forgotten_after_sixteen_more() -> None:
    assert heard(0.1, *[0.2] * (SAMPLES - 1)).min_rtt_s == 0.1
    assert heard(0.1, *[0.2] * SAMPLES).min_rtt_s == 0.2


@pytest.mark.parametrize(("passed_bytes", "forgotten"), [(CALM_BYTES - 1, True), (CALM_BYTES, False)])
def test_a_round_trip_among_bulk_is_no_longer_path(passed_bytes: int, forgotten: bool) -> None:
    heartbeats, total = heard(0.1), 0
    for _ in range(SAMPLES):
        heartbeats.began(total)
        total += passed_bytes
        heartbeats.answered(0.2, total)
    assert heartbeats.min_rtt_s == (0.2 if forgotten else 0.1)
    heartbeats.answered(0.05, total + BULK_BYTES)
    assert heartbeats.min_rtt_s == 0.05, "a shorter one always counts"


def test_bulk_is_what_passes_from_one_heartbeat_to_the_next() -> None:
    heartbeats = Heartbeats()
    assert not heartbeats.is_bulk(BULK_BYTES - 1)
    assert heartbeats.is_bulk(BULK_BYTES)
    heartbeats.began(BULK_BYTES)
    assert heartbeats.is_bulk(BULK_BYTES), "it did before the last PING"
    heartbeats.began(2 * BULK_BYTES - 1)
    assert not heartbeats.is_bulk(2 * BULK_BYTES), "neither before the PING nor since"
    assert heartbeats.is_bulk(3 * BULK_BYTES - 1)
