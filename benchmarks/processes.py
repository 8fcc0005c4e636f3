"""Task: start processes, stop them by pid, find ports, and read what a process and its children used."""

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import psutil

LOWEST_PORT: Final = 20_000
# Above 32768 listening ports collide with the kernel's choice for outgoing connections.
HIGHEST_PORT: Final = 32_000
STOP_AFTER_S: Final = 5.0

_ports: Final = Random()
_pid: Final = re.compile(r"pid=(\d+)")
_buffers: Final = re.compile(r"skmem:\(r(\d+),rb\d+,t\d+,tb\d+,f(\d+),w(\d+)")


class BenchmarkError(Exception):
    """One measurement failed. It is written down as failed; the others go on."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, below 32768."""
    for _ in range(200):
        port = _ports.randint(LOWEST_PORT, HIGHEST_PORT)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BenchmarkError(f"no free port between {LOWEST_PORT} and {HIGHEST_PORT}")


def start(command: Sequence[str], log: Path, *, environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in its own session; its output goes to `log`, its stdin is a pipe that stays open."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )


def tail(log: Path, lines: int = 6) -> str:
    """The last lines of a log, for error messages."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def family(root_pid: int) -> list[psutil.Process]:
    """A process and all its living descendants."""
    try:
        root = psutil.Process(root_pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes and their descendants: SIGTERM, after 5 s SIGKILL. Only pids that were started here."""
    started = list(processes)
    members = [member for process in started for member in family(process.pid)]
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(members, timeout=STOP_AFTER_S)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    for process in started:
        process.wait(STOP_AFTER_S)
        if process.stdin is not None:
            process.stdin.close()


def cpu_s(roots: Iterable[int]) -> float:
    """CPU seconds, user and system, that these processes and their living descendants have used so far."""
    return sum(user_s + system_s for user_s, system_s in _cpu_times(roots))


def kernel_s(roots: Iterable[int]) -> float:
    """The part of `cpu_s` that the kernel took on their behalf."""
    return sum(system_s for _, system_s in _cpu_times(roots))


def _cpu_times(roots: Iterable[int]) -> Iterator[tuple[float, float]]:
    for root in roots:
        for member in family(root):
            with suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                yield times.user, times.system


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes a daemon holds: private pages of its processes, and kernel buffers of its TCP sockets."""

    private_bytes: int
    sockets_bytes: int

    @property
    def all_bytes(self) -> int:
        """Both together: what its budget is compared with."""
        return self.private_bytes + self.sockets_bytes


def memory(root: int) -> Memory:
    """What a process and its descendants hold now. Sockets count 0 where `ss` is absent."""
    private = 0
    pids = set()
    for member in family(root):
        with suppress(psutil.NoSuchProcess):
            private += member.memory_full_info().uss
            pids.add(member.pid)
    return Memory(private, sum(bytes_ for pid, bytes_ in _socket_buffers() if pid in pids))


def _socket_buffers() -> Iterator[tuple[int, int]]:
    # A socket held by several processes (nginx's master and worker share listeners) counts for the first only.
    if shutil.which("ss") is None:
        return
    listing = subprocess.run(["ss", "-tmpnOH", "-a"], capture_output=True, text=True, timeout=30, check=False).stdout
    for line in listing.splitlines():
        owner, held = _pid.search(line), _buffers.search(line)
        if owner and held:
            yield int(owner[1]), sum(_as_signed(int(part)) for part in held.groups())


def _as_signed(number: int) -> int:
    """What a socket has reserved may for a moment be below 0, which `ss` prints as if it were 4 GiB."""
    return number - (1 << 32) if number >= 1 << 31 else number


def tcp_kernel_bytes() -> int:
    """Memory of all TCP sockets on the machine, the load generator's too: a cross-check of the sums by process."""
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            return int(words[words.index("mem") + 1]) * 4096
    return 0


ECHO: Final = b"E" + bytes(15) + b"are you there", b"are you there"
SMALL_GET: Final = b"GET /small HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200 "


def wait_for_echo(
    port: int,
    processes: Sequence[subprocess.Popen[bytes]],
    logs: Sequence[Path],
    *,
    within_s: float = 20.0,
    says: tuple[bytes, bytes] = ECHO,
) -> None:
    """Wait until the service behind `port` answers the first of `says` with what begins with the second.

    Raises:
        BenchmarkError: a process ended, or nothing came back in time; the text holds the end of the logs.
    """
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        ended = [process for process in processes if process.poll() is not None]
        if ended:
            break
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
                probe.sendall(says[0])
                if probe.recv(64).startswith(says[1]):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise BenchmarkError("not reachable through the tunnel:\n" + "\n".join(tail(log) for log in logs))
