"""Task: the measures: what is done to one running peer, and the numbers that come of it."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import psutil

from benchmarks import processes
from benchmarks.loadgen import LoadGenerator
from benchmarks.peers import Peer, Running
from benchmarks.processes import BenchmarkError
from benchmarks.tap import Tap

GIB: Final = 1 << 30
MIB: Final = 1 << 20
KIB: Final = 1 << 10
SETTLE_S: Final = 0.5
SPARE_BYTES: Final = GIB  # a peer without a budget is stopped before it takes the machine down

Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. `FULL` is what results are quoted from."""

    bulk_bytes: int
    bulk_streams: int
    conn_wide: int
    conn_s: float
    echo_s: float
    beside_s: float
    idle_clients: int
    crowd_clients: int
    stalled_clients: int
    stalled_bytes: int
    active_streams: int
    active_s: float
    fill_s: float
    cut_streams: int
    cut_bytes: int
    rtt_ms: float
    rtt_mbit: float
    rtt_bytes: int
    web_s: float
    web_wide: int
    web_bytes: int
    slow_clients: int


FULL: Final = Sizes(
    bulk_bytes=2 * GIB,
    bulk_streams=16,
    conn_wide=32,
    conn_s=5,
    echo_s=2,
    beside_s=4,
    idle_clients=5000,
    crowd_clients=10_000,
    stalled_clients=1000,
    stalled_bytes=100 * MIB,
    active_streams=99,
    active_s=4,
    fill_s=25,
    cut_streams=20,
    cut_bytes=16 * MIB,
    rtt_ms=50,
    rtt_mbit=1000,
    rtt_bytes=512 * MIB,
    web_s=4,
    web_wide=16,
    web_bytes=GIB,
    slow_clients=1000,
)
QUICK: Final = Sizes(
    bulk_bytes=256 * MIB,
    bulk_streams=16,
    conn_wide=32,
    conn_s=1,
    echo_s=0.5,
    beside_s=1,
    idle_clients=500,
    crowd_clients=1000,
    stalled_clients=100,
    stalled_bytes=100 * MIB,
    active_streams=99,
    active_s=1.5,
    fill_s=8,
    cut_streams=20,
    cut_bytes=4 * MIB,
    rtt_ms=50,
    rtt_mbit=200,
    rtt_bytes=64 * MIB,
    web_s=1,
    web_wide=16,
    web_bytes=256 * MIB,
    slow_clients=100,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measure gets besides the peer. `web` speaks HTTP, with a service of its own."""

    load: LoadGenerator
    service_port: int
    sizes: Sizes
    web: LoadGenerator
    web_port: int


def _moved(load: LoadGenerator, running: Running, direction: str, streams: int, stream_bytes: int) -> Numbers:
    before_s = processes.cpu_s(running.daemons.values())
    moved = load.run("bulk", running.port, direction, streams, stream_bytes, 0)
    cpu_s = processes.cpu_s(running.daemons.values()) - before_s
    if moved["ok"] != streams:
        raise BenchmarkError(f"{streams - moved['ok']:.0f} of {streams} bulk streams did not arrive whole: {moved}")
    numbers = {"mb_per_s": moved["bytes"] / moved["seconds"] / 1e6}
    return {"cpu_s_per_gib": cpu_s / (moved["bytes"] / GIB), **numbers} if running.daemons else numbers


def _bulk(bench: Bench, running: Running) -> Numbers:
    numbers: Numbers = {}
    for direction, word in (("d", "down"), ("u", "up")):
        moved = _moved(bench.load, running, direction, 1, bench.sizes.bulk_bytes)
        numbers.update({f"{word}_{key}": value for key, value in moved.items()})
    return numbers


def _bulk16(bench: Bench, running: Running) -> Numbers:
    streams = bench.sizes.bulk_streams
    return _moved(bench.load, running, "d", streams, bench.sizes.bulk_bytes // streams)


def _conn(bench: Bench, running: Running) -> Numbers:
    daemons = running.daemons.values()
    before_s, kernel_before_s = processes.cpu_s(daemons), processes.kernel_s(daemons)
    done = bench.load.run("conn", running.port, bench.sizes.conn_wide, bench.sizes.conn_s)
    cpu_s, kernel_s = processes.cpu_s(daemons) - before_s, processes.kernel_s(daemons) - kernel_before_s
    if not done["done"]:
        raise BenchmarkError("not one connection was answered")
    return {
        "conn_per_s": done["done"] / done["seconds"],
        **({"cpu_ms_per_conn": cpu_s / done["done"] * 1e3, "kernel_ms_per_conn": kernel_s / done["done"] * 1e3} if daemons else {}),
        "failed": done["failed"] + done["stuck"],
        "p50_us": done["p50_us"],
        "p99_us": done["p99_us"],
    }


def _echo(bench: Bench, running: Running) -> Numbers:
    alone = bench.load.run("echo", running.port, bench.sizes.echo_s)
    with bench.load.running("bulk", running.port, "d", 1, 1 << 50, 0) as bulk:
        time.sleep(SETTLE_S)
        beside = bench.load.run("echo", running.port, bench.sizes.beside_s)
        moved = bulk.stop()
    return {
        "idle_p50_us": alone["p50_us"],
        "idle_p99_us": alone["p99_us"],
        "beside_p50_us": beside["p50_us"],
        "beside_p99_us": beside["p99_us"],
        "beside_mb_per_s": moved["bytes"] / moved["seconds"] / 1e6,
    }


def _held(running: Running) -> dict[str, processes.Memory]:
    return {name: processes.memory(pid) for name, pid in running.daemons.items()}


def _idle(bench: Bench, running: Running) -> Numbers:
    return _holding(bench, running, bench.sizes.idle_clients)


def _crowd(bench: Bench, running: Running) -> Numbers:
    return _holding(bench, running, bench.sizes.crowd_clients)


def _holding(bench: Bench, running: Running, clients: int) -> Numbers:
    alone = bench.load.run("echo", running.port, bench.sizes.echo_s)
    before = _held(running)
    with bench.load.running("idle", running.port, clients) as crowd:
        stands = crowd.next()
        if stands["failed"]:
            raise BenchmarkError(f"{stands['failed']:.0f} of {clients} idle clients were not served")
        time.sleep(SETTLE_S)
        after = _held(running)
        beside = bench.load.run("echo", running.port, bench.sizes.echo_s)
        before_s = processes.cpu_s(running.daemons.values())
        time.sleep(2 * SETTLE_S)
        cpu_s = processes.cpu_s(running.daemons.values()) - before_s
        lost = crowd.release()["lost"]
    grown = [after[name].private_bytes - before[name].private_bytes for name in before]
    sockets = [after[name].sockets_bytes - before[name].sockets_bytes for name in before]
    return {
        "user_kib_per_client": sum(grown) / clients / KIB,
        "socket_kib_per_client": sum(sockets) / clients / KIB,
        "alone_p50_us": alone["p50_us"],
        "beside_p50_us": beside["p50_us"],
        "p50_ratio": beside["p50_us"] / alone["p50_us"],
        "idle_cpu_percent": cpu_s / (2 * SETTLE_S) * 100,
        "lost": lost,
    }


def _goodput(bench: Bench, running: Running) -> tuple[Numbers, dict[str, processes.Memory]]:
    """What the active streams get, and the memory of the daemons halfway."""
    streams, seconds = bench.sizes.active_streams, bench.sizes.active_s
    with bench.load.running("bulk", running.port, "d", streams, 1 << 50, seconds) as bulk:
        time.sleep(seconds / 2)
        held = _held(running)
        moved = bulk.result()
    goodput = {"mb_per_s": moved["bytes"] / moved["seconds"] / 1e6, "lost": streams - moved["open"], "least_mb": moved["least_bytes"] / 1e6}
    return goodput, held


def _stalled(bench: Bench, running: Running) -> Numbers:
    """Memory is the highest sum seen in each daemon, from the first stalled client to the end of the active streams beside them."""
    alone, _ = _goodput(bench, running)
    kernel_before = processes.tcp_kernel_bytes()
    highest = _held(running)
    start = dict(highest)
    with bench.load.running("stall", running.port, bench.sizes.stalled_clients, bench.sizes.stalled_bytes) as crowd:
        stands = crowd.next()
        highest = _fill(running, highest, bench.sizes.fill_s)
        kernel = processes.tcp_kernel_bytes() - kernel_before
        beside, halfway = _goodput(bench, running)
        highest = _higher(_higher(highest, halfway), _held(running))
        lost = crowd.release()["lost"]
    numbers = {
        "goodput_alone_mb_per_s": alone["mb_per_s"],
        "goodput_beside_mb_per_s": beside["mb_per_s"],
        "goodput_ratio": beside["mb_per_s"] / alone["mb_per_s"],
        "active_lost": beside["lost"],
        "active_least_mb": beside["least_mb"],
        "stalled_refused": stands["failed"],
        "stalled_lost": lost,
        "machine_tcp_mib": kernel / MIB,
        "worst_daemon_mib": max(held.all_bytes for held in highest.values()) / MIB,
    }
    for name, held in highest.items():
        numbers[f"{name} private_mib"] = held.private_bytes / MIB
        numbers[f"{name} sockets_mib"] = held.sockets_bytes / MIB
        numbers[f"{name} before_mib"] = start[name].all_bytes / MIB
    return numbers


def _higher(a: Mapping[str, processes.Memory], b: Mapping[str, processes.Memory]) -> dict[str, processes.Memory]:
    return {name: max(a[name], b[name], key=lambda held: held.all_bytes) for name in a}


def _fill(running: Running, highest: Mapping[str, processes.Memory], within_s: float) -> dict[str, processes.Memory]:
    """Watch memory until it has not risen by 1 % for 2 s, at most `within_s`: the highest."""
    deadline_s = time.monotonic() + within_s
    risen_s = time.monotonic()
    result = dict(highest)
    while time.monotonic() < min(deadline_s, risen_s + 2):
        time.sleep(SETTLE_S)
        if psutil.virtual_memory().available < SPARE_BYTES:
            raise BenchmarkError("stopped: the peer's buffers have filled the machine's memory")
        now = _higher(result, _held(running))
        if any(now[name].all_bytes > result[name].all_bytes * 1.01 for name in now):
            risen_s = time.monotonic()
        result = now
    return result


def _on_started_peer(take: Callable[[Bench, Running], Numbers]) -> Callable[[Bench, Peer], Numbers]:
    def run(bench: Bench, peer: Peer) -> Numbers:
        return take(bench, peer.start(bench.service_port))

    return run


def _cut(bench: Bench, peer: Peer) -> Numbers:
    streams, stream_bytes = bench.sizes.cut_streams, bench.sizes.cut_bytes
    # The first cut comes before any stream can be whole, however unfairly a peer shares its tunnel.
    with Tap([stream_bytes // 2, streams * stream_bytes // 2]) as tap:
        running = peer.start(bench.service_port, tap.interpose)
        tap.arm()
        moved = bench.load.run("bulk", running.port, "d", streams, stream_bytes, 0)
        cuts = tap.cuts
        peer.stop()
    ended = {word: moved[word] for word in ("reset", "short", "corrupt")}
    return {"cuts": cuts, "streams": streams, "survived": moved["ok"], "seconds": moved["seconds"], **ended}


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure: it starts the peer itself; whoever calls `run` stops it."""

    name: str
    title: str
    run: Callable[[Bench, Peer], Numbers]

    def peers(self, peers: Iterable[Peer]) -> list[Peer]:
        """Those that take part in it."""
        return [peer for peer in peers if self.name in peer.measures]


MEASURES: Final = (
    Measure("bulk", "one bulk stream, down and up", _on_started_peer(_bulk)),
    Measure("bulk16", "16 bulk streams", _on_started_peer(_bulk16)),
    Measure("conn", "connect, small request, close", _on_started_peer(_conn)),
    Measure("echo", "64-byte echo, alone and beside bulk", _on_started_peer(_echo)),
    Measure("idle", "idle clients", _on_started_peer(_idle)),
    Measure("crowd", "more idle clients", _on_started_peer(_crowd)),
    Measure("stalled", "clients that never read", _on_started_peer(_stalled)),
    Measure("cut", "streams over a cut tunnel", _cut),
)
