"""What streams leave behind in the daemons that carried them, and how a trend is told from a step."""

import pytest

from tests.chaos.holdings import Held, Holdings, trend_per_s
from tests.chaos.stage import MIB, Plain, Scale, Stage
from tests.system.stack import wait_until

STREAMS = 2_000


def carry(stage: Stage, plain: Plain) -> None:
    """So many short streams, 16 at a time, and all of them right."""
    load = stage.load(plain.swap, 16, size_bytes=4096, repeat=True)
    wait_until(lambda: load.ask()["begun"] >= STREAMS, 120, f"{STREAMS} streams")
    ends = load.finish()["ends"]
    load.close()
    assert ends == {"right": sum(ends.values())}


@pytest.mark.system
@pytest.mark.xdist_group("chaos")
def test_streams_leave_nothing_behind() -> None:
    with Stage(Scale.SHORT, lambda text, done: None) as stage:
        holdings = Holdings(stage.directory / "holdings")
        plain = stage.plain(extra="", relay="", env=holdings.env)
        pids = [plain.stack.gateway.pid, plain.stack.relays["node-a"].pid]
        idle_files = [holdings.of(pid).files for pid in pids]

        def after_streams() -> list[Held]:
            carry(stage, plain)
            wait_until(lambda: [holdings.of(pid).files for pid in pids] == idle_files, 20, "all descriptors given back")
            return [holdings.of(pid) for pid in pids]

        for before, after in zip(after_streams(), after_streams(), strict=True):
            assert after.blocks - before.blocks < STREAMS / 4
            assert after.used_bytes - before.used_bytes < MIB
            assert after.tasks == before.tasks
        stage.check_logs()


def test_a_trend_is_no_step_and_no_burst() -> None:
    flat = [(float(at), 100.0) for at in range(100)]
    step = [(at, value + 1000.0 * (at >= 80)) for at, value in flat]
    burst = [(at, value + 1000.0 * (40 <= at < 60)) for at, value in flat]
    leak = [(at, value + 3.0 * at + 1000.0 * (40 <= at < 50)) for at, value in flat]
    stairs = [(at, value + 30.0 * (at // 10)) for at, value in flat]
    assert [trend_per_s(points) for points in (flat, step, burst)] == [0.0] * 3
    assert trend_per_s(leak) == pytest.approx(3.0)
    assert trend_per_s(stairs) == pytest.approx(3.0, rel=0.2)
