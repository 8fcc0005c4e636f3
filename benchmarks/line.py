"""Task: a long line between two ends of a tunnel, or between a client and a service: `delayline.c`."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import processes
from benchmarks.loadgen import LoadGenerator
from benchmarks.processes import BenchmarkError

LIMIT_S: Final = 600


@dataclass(slots=True)
class Line:
    """`rtt_ms` there and back, `mbit_per_s` each way. Interpose it as often as needed: each call is a line of its own."""

    program: Path
    rtt_ms: float
    mbit_per_s: float
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def interpose(self, target_port: int) -> int:
        """Put a line in front of `target_port`; gives the port to dial instead."""
        port = processes.free_port()
        words = LIMIT_S, port, target_port, self.rtt_ms / 2, self.mbit_per_s
        line = subprocess.Popen([str(self.program), *(str(word) for word in words)], stdout=subprocess.PIPE, start_new_session=True)
        self._running.append(line)
        assert line.stdout is not None
        if line.stdout.readline() != b"ready\n":
            raise BenchmarkError("the delay line did not start")
        return port

    def close(self) -> None:
        """End them all."""
        for line in self._running:
            line.kill()
            line.wait(5)
            if line.stdout is not None:
                line.stdout.close()
        self._running = []


@contextmanager
def long_line(rtt_ms: float, mbit_per_s: float) -> Iterator[Line]:
    """A line for as long as the block lasts."""
    line = Line(LoadGenerator.build(LIMIT_S, "delayline").program, rtt_ms, mbit_per_s)
    try:
        yield line
    finally:
        line.close()
