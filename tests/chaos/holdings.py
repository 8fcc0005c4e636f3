"""What a daemon holds inside: the part of resident memory that malloc keeps free, Python's blocks, trio's tasks."""

import itertools
import json
import signal
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.system.stack import wait_until

WITHIN = Path(__file__).parent / "within"


@dataclass(frozen=True, slots=True)
class Held:
    """By one process. `free_bytes` are resident, as far as they were ever written to, and belong to nobody: what waits for slow readers
    is returned to malloc, which seldom returns it to the system, so the longest queue of a day stays to be seen in `rss_bytes`."""

    rss_bytes: int
    free_bytes: int
    blocks: int
    tasks: int
    files: int
    threads: int

    @property
    def used_bytes(self) -> int:
        """Resident, and in use as far as malloc can tell."""
        return self.rss_bytes - self.free_bytes


@dataclass
class Holdings:
    """Start a daemon with `env`, and it can be asked."""

    directory: Path
    _told: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir()

    @property
    def env(self) -> dict[str, str]:
        """Its PYTHONPATH has us, and what the daemon is imported from."""
        return {"FX_CHAOS_HOLDINGS": str(self.directory), "PYTHONPATH": f"{WITHIN}:{Path.cwd()}"}

    def of(self, pid: int) -> Held:
        """What it holds now."""
        path, told = self.directory / str(pid), self._told.get(pid, 0)
        process = psutil.Process(pid)
        process.send_signal(signal.SIGUSR2)
        wait_until(lambda: path.read_bytes().count(b"\n") > told, 20, "a word of what is held")
        lines = path.read_text().splitlines()
        self._told[pid] = len(lines)
        return Held(rss_bytes=process.memory_info().rss, files=process.num_fds(), threads=process.num_threads(), **json.loads(lines[-1]))


def trend_per_s(points: list[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs (Theil and Sen): a single step, or a moment in which much waits, does not make it."""
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(points, 2) if x1 != x0]
    return statistics.median(slopes) if slopes else 0.0
