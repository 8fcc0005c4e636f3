"""Hours in minutes: at 70 % of what the machine can do, nothing may grow (R28)."""

import time

from tests.chaos.figures import Outcome
from tests.chaos.holdings import Held, Holdings, trend_per_s
from tests.chaos.stage import MIB, Fault, Stage, judge
from tests.system.peers import is_served

STREAMS = 60
SHARE = 0.7
FLAT_FILES = 5
HOUR_S = 3600.0
MEASURABLE_S = 600.0
"""Below this a trend in MiB an hour says nothing: what a warm-up leaves behind is all there is."""
MOST_SAMPLES = 600
"""Of which trends are taken."""
BLOCKS_AN_HOUR = 20_000
"""A stream that leaves one object behind makes 100,000 on a machine with two cores. Some thousands come from Python's own caches while
they fill: free lists of tuples, and what sqlite3 knows of its last cursors."""


def steady(stage: Stage, outcome: Outcome) -> None:
    """Streams of 1 MiB both ways, one after the other; first flat out, to know what 100 % is.

    The first half is the warm-up. Of memory, what is in use must not grow. What malloc keeps free may grow a little, whenever more waits
    for slow readers than ever before.
    """
    seconds = stage.minutes * 60
    holdings = Holdings(stage.directory / "holdings")
    plain = stage.plain(extra="", relay="", env=holdings.env)
    pids = {"gateway": plain.stack.gateway.pid, "relay": plain.stack.relays["node-a"].pid}
    for _ in range(20):
        assert is_served(plain.echo)
    time.sleep(1)
    before = {name: holdings.of(pid).files for name, pid in pids.items()}
    calibrate_s = min(10.0, max(2.0, seconds / 10))
    flat_out = stage.load(plain.swap, STREAMS, size_bytes=MIB, repeat=True)
    time.sleep(calibrate_s)
    most_bytes_per_s = flat_out.ask()["bytes_heard"] / calibrate_s
    judge(outcome, flat_out.finish(), plain.services, title="flat out: ")
    flat_out.close()
    rate = SHARE * most_bytes_per_s / STREAMS
    load = stage.load(plain.swap, STREAMS, size_bytes=MIB, rate_bytes_per_s=rate, repeat=True)
    samples: dict[str, list[tuple[float, Held]]] = {name: [] for name in pids}
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        stage.show(f"{now:.0f} of {seconds:.0f} s", now / seconds)
        assert is_served(plain.echo), "a new client is not served"
        for name, pid in pids.items():
            samples[name].append((now, holdings.of(pid)))
        time.sleep(max(min(1.0, seconds / 20), seconds / 2 / MOST_SAMPLES))
    outcome.add("minutes", stage.minutes)
    outcome.add("MiB/s each way, 70 % of flat out", SHARE * most_bytes_per_s / MIB)
    judge(outcome, load.finish(), plain.services)
    for name in pids:
        _judge_samples(
            outcome, name, [(at, held) for at, held in samples[name] if at >= seconds / 2], is_measurable=seconds >= MEASURABLE_S
        )
    time.sleep(2)
    left = {name: holdings.of(pid).files - before[name] for name, pid in pids.items()}
    outcome.add("files more than before the load, when all have left", max(left.values()), f"≤ {FLAT_FILES}")


def _judge_samples(outcome: Outcome, name: str, warm: list[tuple[float, Held]], *, is_measurable: bool) -> None:
    """Figures of one daemon after the warm-up."""

    def an_hour(what: str) -> float:
        return trend_per_s([(at, getattr(held, what)) for at, held in warm]) * HOUR_S

    def bound(most: int) -> str:
        return f"≤ {most}" if is_measurable else ""

    first, last = warm[0][1], warm[-1][1]
    for what, most in (("files", 2 * STREAMS), ("tasks", 8)):
        counts = [getattr(held, what) for _, held in warm]
        outcome.add(f"{name}: {what}, most less least", max(counts) - min(counts), f"≤ {most}")
    outcome.add(f"{name}: files an hour after warm-up", an_hour("files"))
    outcome.add(f"{name}: threads, most", max(held.threads for _, held in warm), "≤ 24")
    outcome.add(f"{name}: MiB in use, an hour after warm-up", an_hour("used_bytes") / MIB, bound(1))
    outcome.add(f"{name}: Python's blocks, an hour after warm-up", an_hour("blocks"), bound(BLOCKS_AN_HOUR))
    outcome.add(f"{name}: MiB resident, an hour after warm-up", an_hour("rss_bytes") / MIB)
    outcome.add(f"{name}: MiB that it grew after warm-up", (last.rss_bytes - first.rss_bytes) / MIB, "≤ 16")
    outcome.add(f"{name}: MiB of these that malloc keeps free", (last.free_bytes - first.free_bytes) / MIB)


STEADY = Fault("steady", "minutes at 70 % load: files, tasks, threads and memory flat, no error", steady)
