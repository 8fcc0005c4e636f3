"""System: three relay processes and a real store, killed again and again: no server is shared, none stays reserved."""

from pathlib import Path

import pytest

from tests.cluster_store.store_rig import NEEDS_REDIS
from tests.reservations.reservation_chaos import DURABLE, FORGETFUL, Chaos

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("chaos")]


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        pytest.param(None, 8.0, id="sqlite"),
        pytest.param(DURABLE, 5.0, id="redis", marks=NEEDS_REDIS),
        pytest.param(FORGETFUL, 6.0, id="redis without AOF", marks=NEEDS_REDIS),
    ],
)
def test_relays_and_stores_are_killed_while_users_come_and_go(tmp_path: Path, options: tuple[str, ...] | None, seconds: float) -> None:
    chaos = Chaos(tmp_path, options, clients=12, seed=0)
    try:
        chaos.run(seconds)
        chaos.stop()
        outcome = chaos.verdict()
    finally:
        chaos.close()
    assert not outcome.problems, (outcome, chaos.errors())
    # Enough to tell from nothing, on a machine whose disk is slow as well.
    assert outcome.counts["in"] > 3, (outcome.counts, chaos.errors())
    assert outcome.counts["no reserved"] > 3
