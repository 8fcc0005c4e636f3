"""The short form of `python -m tests.fuzz`: another seed than yesterday would only make failures hard to repeat."""

import pytest

from tests.fuzz.cases import CASES, Tally, run_case

FRAMES = 20_000


def run(seed: int, total: int) -> Tally:
    tally = Tally()
    number = 0
    while tally.frames < total:
        try:
            run_case(seed, number, tally)
        except Exception as exc:
            raise AssertionError(f"repeat with: python -m tests.fuzz --seed {seed} --only {number}") from exc
        number += 1
    return tally


@pytest.mark.parametrize("seed", [1, 2])
def test_only_clear_errors_and_bounded_memory(seed: int) -> None:
    ends = run(seed, FRAMES // 2).ends
    assert {"protocol-error", "flow-control", "frame-size", "survived", "decoded", "unsupported tag"} <= set(ends)


def test_what_make_fuzz_begins_with() -> None:
    run(0, FRAMES // 4)


def test_every_kind_of_case_counts_what_it_sends() -> None:
    for number in range(len(CASES)):
        tally = Tally()
        run_case(0, number, tally)
        assert tally.frames
        assert tally.ends
