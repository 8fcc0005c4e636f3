"""Hours in minutes: at 70 % of what the machine can do, nothing may grow (R28)."""

import time

from tests.chaos.figures import Outcome
from tests.chaos.stage import MIB, Fault, Stage, Usage, judge, usage
from tests.system.peers import is_served

STREAMS = 60
SHARE = 0.7
FLAT_FILES = 5
HOUR_S = 3600.0
MEASURABLE_S = 600.0
"""Below this a slope in MiB an hour says nothing: what a warm-up leaves behind is all there is."""


def steady(stage: Stage, outcome: Outcome) -> None:
    """Streams of 1 MiB both ways, one after the other; first flat out, to know what 100 % is."""
    seconds = stage.minutes * 60
    plain = stage.plain(extra="", relay="")
    pids = {"gateway": plain.stack.gateway.pid, "relay": plain.stack.relays["node-a"].pid}
    for _ in range(20):
        assert is_served(plain.echo)
    time.sleep(1)
    before = {name: usage(pid).files for name, pid in pids.items()}
    calibrate_s = min(10.0, max(2.0, seconds / 10))
    flat_out = stage.load(plain.swap, STREAMS, size_bytes=MIB, repeat=True)
    time.sleep(calibrate_s)
    most_bytes_per_s = flat_out.ask()["bytes_heard"] / calibrate_s
    judge(outcome, flat_out.finish(), plain.services, title="flat out: ")
    flat_out.close()
    rate = SHARE * most_bytes_per_s / STREAMS
    load = stage.load(plain.swap, STREAMS, size_bytes=MIB, rate_bytes_per_s=rate, repeat=True)
    samples: dict[str, list[tuple[float, Usage]]] = {name: [] for name in pids}
    began = time.monotonic()
    warm_s = seconds / 4
    while (now := time.monotonic() - began) < seconds:
        stage.show(f"{now:.0f} of {seconds:.0f} s", now / seconds)
        assert is_served(plain.echo), "a new client is not served"
        for name, pid in pids.items():
            samples[name].append((now, usage(pid)))
        time.sleep(min(1.0, seconds / 20))
    outcome.add("minutes", stage.minutes)
    outcome.add("MiB/s each way, 70 % of flat out", SHARE * most_bytes_per_s / MIB)
    judge(outcome, load.finish(), plain.services)
    for name in pids:
        warm = [(at, now) for at, now in samples[name] if at >= warm_s]
        files = [now.files for _, now in warm]
        outcome.add(f"{name}: files, most less least", max(files) - min(files), f"≤ {2 * STREAMS}")
        outcome.add(f"{name}: files an hour after warm-up", slope_per_s([(at, now.files) for at, now in warm]) * HOUR_S)
        outcome.add(f"{name}: threads, most", max(now.threads for _, now in warm), "≤ 24")
        slope = slope_per_s([(at, now.rss_bytes) for at, now in warm]) * HOUR_S / MIB
        outcome.add(f"{name}: MiB an hour after warm-up", slope, "≤ 1" if seconds >= MEASURABLE_S else "")
        outcome.add(f"{name}: MiB that it grew after warm-up", (warm[-1][1].rss_bytes - warm[0][1].rss_bytes) / MIB, "≤ 16")
    time.sleep(2)
    left = {name: usage(pid).files - before[name] for name, pid in pids.items()}
    outcome.add("files more than before the load, when all have left", max(left.values()), f"≤ {FLAT_FILES}")


def slope_per_s(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    count = len(points)
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


STEADY = Fault("steady", "minutes at 70 % load: files, threads and memory flat, no error", steady)
