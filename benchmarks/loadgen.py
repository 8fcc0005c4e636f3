"""Task: build the load generator and run its modes."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import processes
from benchmarks.processes import BenchmarkError

HERE: Final = Path(__file__).resolve().parent
SERVE_LIMIT_S: Final = 7200

Result = dict[str, float]


def why_not() -> str | None:
    """The reason why the load generator cannot be built here, or None."""
    return None if shutil.which("cc") else "no C compiler: install gcc (Debian: apt-get install gcc libc6-dev)"


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """A built program. Every run ends by itself after `limit_s` at the latest."""

    program: Path
    limit_s: int

    @classmethod
    def build(cls, limit_s: int, name: str = "loadgen") -> "LoadGenerator":
        """Compile NAME.c into benchmarks/build/ if it is not there or older."""
        source, program = HERE / f"{name}.c", HERE / "build" / name
        written = max(source.stat().st_mtime, (HERE / "net.h").stat().st_mtime)
        if not program.exists() or program.stat().st_mtime < written:
            program.parent.mkdir(exist_ok=True)
            command = ["cc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(program), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode:
                raise BenchmarkError(f"{source.name} does not compile:\n{done.stderr}")
        return cls(program, limit_s)

    def _command(self, limit_s: int, *words: object) -> list[str]:
        return [str(self.program), str(limit_s), *(str(word) for word in words)]

    @contextmanager
    def service(self) -> Iterator[int]:
        """The service that all clients talk to, for as long as the block lasts: its port."""
        port = processes.free_port()
        with subprocess.Popen(self._command(SERVE_LIMIT_S, "serve", port), stdout=subprocess.PIPE, start_new_session=True) as server:
            try:
                assert server.stdout is not None
                if server.stdout.readline() != b"ready\n":
                    raise BenchmarkError("the load generator's service did not start")
                yield port
            finally:
                server.kill()

    def run(self, mode: str, port: int, *words: object) -> Result:
        """Run a client to its end.

        Raises:
            BenchmarkError: it failed or ran into its limit.
        """
        with self.running(mode, port, *words) as client:
            return client.result()

    @contextmanager
    def running(self, mode: str, port: int, *words: object) -> Iterator["Client"]:
        """A client that runs while the block does; it is ended when the block ends."""
        command = self._command(self.limit_s, mode, port, *words)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        with process:
            try:
                yield Client(process)
            finally:
                process.kill()


@dataclass(frozen=True, slots=True)
class Client:
    """A load generator's client at work."""

    process: subprocess.Popen[str]

    def next(self) -> Result:
        """Its next line: a crowd says when it stands, then, after `release`, how it ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(5)
            errors = self.process.stderr.read() if self.process.stderr else ""
            raise BenchmarkError(
                errors.strip() or f"the load generator ended with {self.process.returncode} (negative: signal; -14: its time limit)"
            )
        fields: Result = json.loads(line)
        return fields

    def result(self) -> Result:
        """Wait for its end and its one line."""
        fields = self.next()
        self.process.wait(10)
        return fields

    def stop(self) -> Result:
        """Make a bulk client stop now and say what it moved."""
        self.process.terminate()
        return self.result()

    def release(self) -> Result:
        """Let a crowd go home: how many of it had lost their connection before."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        fields = self.next()
        self.process.wait(10)
        return fields
