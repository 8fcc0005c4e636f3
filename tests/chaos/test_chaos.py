"""System: the short form of `python -m tests.chaos`."""

import pytest

from tests.chaos.every import SHORT
from tests.chaos.stage import Fault, Scale, Unplayable, play

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("chaos")]


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.name)
def test_what_a_fault_costs(fault: Fault) -> None:
    try:
        outcome = play(fault, Scale.SHORT, lambda text, done: None, minutes=0.1)
    except Unplayable as exc:
        pytest.skip(str(exc))
    assert outcome.is_good, outcome.broken
    assert outcome.figures
