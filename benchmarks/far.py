"""Task: the measure `rtt`: a tunnel over a long line, against what that line carries at all."""

import time
from typing import Final

from benchmarks import processes
from benchmarks.line import long_line
from benchmarks.measures import GIB, MIB, Bench, Measure, Numbers
from benchmarks.peers import Peer, Running
from benchmarks.processes import BenchmarkError

LOOK_S: Final = 0.5
WAYS: Final = (("d", 1, "down"), ("u", 1, "up"), ("d", 16, "down16"), ("u", 16, "up16"))


def _moved(bench: Bench, running: Running, direction: str, streams: int) -> tuple[float, float, float]:
    """MB/s, CPU s/GiB, and the most that one of the daemons held, in bytes."""
    before_s = processes.cpu_s(running.daemons.values())
    highest = 0
    with bench.load.running("bulk", running.port, direction, streams, bench.sizes.rtt_bytes // streams, 0) as client:
        while running.daemons and client.process.poll() is None:
            time.sleep(LOOK_S)
            highest = max(highest, *(processes.memory(pid).all_bytes for pid in running.daemons.values()))
        moved = client.result()
    if moved["ok"] != streams:
        raise BenchmarkError(f"{streams - moved['ok']:.0f} of {streams} bulk streams did not arrive whole: {moved}")
    cpu_s = processes.cpu_s(running.daemons.values()) - before_s
    return moved["bytes"] / moved["seconds"] / 1e6, cpu_s / (moved["bytes"] / GIB), highest


def _rtt(bench: Bench, peer: Peer) -> Numbers:
    """The line alone comes first: plain connections of the same client to the same service over it."""
    numbers: Numbers = {}
    highest = 0.0
    with long_line(bench.sizes.rtt_ms, bench.sizes.rtt_mbit) as line:
        alone = Running(line.interpose(bench.service_port))
        alone_mb = {word: _moved(bench, alone, direction, streams)[0] for direction, streams, word in WAYS[:1] + WAYS[3:]}
        line_mb = min(alone_mb.values())
        running = peer.start(bench.service_port, line.interpose)
        for direction, streams, word in WAYS:
            mb, cpu, held = _moved(bench, running, direction, streams)
            highest = max(highest, held)
            numbers |= {f"{word}_mb_per_s": mb, f"{word}_cpu_s_per_gib": cpu, f"{word}_share": mb / line_mb}
        peer.stop()
    return {"line_mb_per_s": line_mb, **numbers, "worst_daemon_mib": highest / MIB}


MEASURES: Final = (Measure("rtt", "bulk over a long line", _rtt),)
