"""Whether the store can be trusted to know who holds what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.settling import Evidence, Mark, beat, decode_mark, encode_mark

NOW = 1_000_000_000
LEASE = 15_000


def evidence(mark: Mark, now_ms: int) -> Evidence:
    return Evidence(mark, now_ms, LEASE)


def test_a_store_that_is_new_or_has_forgotten_gives_nothing_out_for_a_lease() -> None:
    for before in (None, Mark("old", 0, NOW - 1)):
        mark = beat(before, "new", NOW, LEASE)
        assert evidence(mark, NOW).settles_in_ms(NOW) == LEASE
        assert evidence(mark, NOW).settles_in_ms(NOW + LEASE) == 0


def test_beats_go_on_without_anybody_having_to_wait() -> None:
    mark = beat(None, "e", NOW, LEASE)
    for now_ms in range(NOW, NOW + LEASE * 4, LEASE // 5):
        mark = beat(mark, "e", now_ms, LEASE)
    now_ms = NOW + LEASE * 4
    assert evidence(mark, now_ms).settles_in_ms(now_ms) == 0
    assert evidence(mark, now_ms).horizon_ms(now_ms) == now_ms
    assert beat(mark, "e", mark.beat_ms + 100, LEASE) is mark


def test_after_a_gap_those_who_were_alive_before_it_count_as_alive_for_a_lease() -> None:
    mark = Mark("e", 0, NOW)
    back = NOW + LEASE * 10
    mark = beat(mark, "e", back, LEASE)
    assert evidence(mark, back).settles_in_ms(back) == 0
    assert evidence(mark, back).horizon_ms(back) == NOW
    mark = beat(mark, "e", back + LEASE // 5, LEASE)
    assert evidence(mark, back + LEASE // 5).horizon_ms(back + LEASE - 1) == NOW
    assert evidence(mark, back).horizon_ms(back + LEASE) == back + LEASE
    # A second outage before everyone was back: the beginning of the first still counts.
    again = beat(mark, "e", back + LEASE, LEASE)
    assert evidence(again, back + LEASE).horizon_ms(back + LEASE) == NOW


def test_a_clock_that_is_set_back_shortens_nobodys_lease() -> None:
    mark = beat(Mark("e", 0, NOW), "e", NOW - 3_600_000, LEASE)
    now_ms = NOW - 3_600_000
    assert evidence(mark, now_ms).horizon_ms(now_ms) <= now_ms


@pytest.mark.parametrize(
    ("later_ms", "epoch", "expected"), [(5_000, "e", True), (5_001, "e", False), (0, "f", False), (-5_001, "e", False)]
)
def test_evidence_is_good_for_a_third_of_a_lease(later_ms: int, epoch: str, expected: bool) -> None:
    assert evidence(Mark("e", 0, NOW), NOW).is_fresh(NOW + later_ms, epoch) is expected


COUNT = st.integers(0, 1 << 53)


@given(st.builds(Mark, st.text(max_size=50), COUNT, COUNT, COUNT, COUNT))
def test_a_mark_is_read_as_it_was_written(mark: Mark) -> None:
    assert decode_mark(encode_mark(mark)) == mark


@given(st.text(max_size=40))
def test_what_is_no_mark_counts_as_forgotten(text: str) -> None:
    assert decode_mark(text) is None
