import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.kit.backoff import MAX_REQUESTED_S, FullJitter


class Highest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def test_the_upper_end_doubles_up_to_the_cap_and_starts_again_after_a_success() -> None:
    backoff = FullJitter(0.25, 30, rng=Highest())
    assert [backoff.next_s() for _ in range(9)] == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]
    backoff.reset()
    assert backoff.next_s() == 0.25


def test_a_thousand_relays_spread_over_the_whole_span() -> None:
    waits = sorted(FullJitter(30, 30, rng=random.Random(seed)).next_s() for seed in range(1000))
    assert waits[100] == pytest.approx(3, abs=1)
    assert waits[900] == pytest.approx(27, abs=1)


@given(st.floats() | st.integers(0, 400).map(float), st.integers(0, 2**32), st.integers(0, 5000))
def test_a_requested_pause_is_kept_within_reason(at_least_s: float, seed: int, failures: int) -> None:
    backoff = FullJitter(rng=random.Random(seed))
    for _ in range(failures % 50):
        backoff.next_s()
    wait_s = backoff.next_s(at_least_s)
    assert 0 <= wait_s <= MAX_REQUESTED_S + 30
    if 0 <= at_least_s <= MAX_REQUESTED_S:
        assert wait_s >= at_least_s


def test_many_failures_do_not_overflow() -> None:
    backoff = FullJitter(rng=Highest())
    assert [backoff.next_s() for _ in range(5000)][-1] == 30
