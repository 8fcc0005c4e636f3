"""Task: `python -m benchmarks.reservations`: what a commit costs on SQLite and Redis, and how many logins three relays make on one Redis.

A login is a take (entry and commit in one) and a release: two atomic updates of the store. Redis writes to disk before it answers.
Everything is measured in turn, several times over; what is kept is the median of the turns, and the disk's own time beside it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import click
import trio

from benchmarks import processes
from benchmarks.http_logins import http_logins
from benchmarks.reserving import relay as whole_relay
from fxrelay.balance.reservations import Granted, OwnerRelogin
from fxrelay.cluster.broker import load_broker
from fxrelay.cluster.ports import Store
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.reserving.ledger import Ledger
from fxtunnel.model import RelayId

LEASE_S: Final = 1.0
RELAYS: Final = 3
THREADS: Final = 6
SERVERS: Final = 300
SECONDS: Final = 3.0
RESULTS: Final = Path(__file__).resolve().parent / "results"

Numbers = dict[str, float]


def ready_ledger(store: Store, name: str) -> Ledger:
    """A ledger whose store has settled."""
    ledger = Ledger(store, RelayId(name), LEASE_S)
    while (found := ledger.look()).settles_in_ms(found.seen_ms):
        time.sleep(0.1)
    return ledger


def one_after_the_other(store: Store, rounds: int) -> tuple[float, float]:
    """Milliseconds of a take: median and 95th percentile."""
    ledger = ready_ledger(store, "bench")
    seen = []
    for turn in range(rounds):
        began = time.perf_counter()
        outcome, _ = ledger.do(ledger.updates.take(f"server-{turn % 50}", f"login-{turn}", "ann", "192.0.2.1", OwnerRelogin.PREFER))
        seen.append((time.perf_counter() - began) * 1e3)
        if not isinstance(outcome, Granted):
            raise processes.BenchmarkError(f"not granted: {outcome}")
        ledger.do(ledger.updates.release(f"server-{turn % 50}", f"login-{turn}", "ann", 0))
    return median(seen), quantiles(seen, n=20)[-1]


def logins(store: Store, name: str, seconds: float) -> int:
    """Logins that one relay makes in that time, with as many threads as it has."""
    ledger = ready_ledger(store, name)
    ends = time.perf_counter() + seconds

    def work(thread: int) -> int:
        count = made = 0
        while time.perf_counter() < ends:
            server = f"server-{(count * THREADS + thread) % SERVERS}"
            login = f"{name}-{thread}-{count}"
            outcome, _ = ledger.do(ledger.updates.take(server, login, login, "192.0.2.1", OwnerRelogin.PREFER))
            if isinstance(outcome, Granted):
                ledger.do(ledger.updates.release(server, login, login, 0))
                made += 1
            count += 1
            if count % 100 == 0:
                ledger.look()
        return made

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


def synced(folder: Path, rounds: int) -> float:
    """Milliseconds to append a kilobyte to a file and have it on the disk, median: what a store can do at best."""
    seen = []
    with (folder / "synced").open("ab", buffering=0) as file:
        for _ in range(rounds):
            began = time.perf_counter()
            file.write(b"x" * 1_024)
            os.fdatasync(file.fileno())
            seen.append((time.perf_counter() - began) * 1e3)
    return median(seen)


def on_sqlite(folder: Path, rounds: int) -> Numbers:
    """Commits on a file."""
    store = SqliteStore(folder / "cluster.db")
    try:
        p50, p95 = one_after_the_other(store, rounds)
    finally:
        store.close()
    return {"disk_sync_p50_ms": synced(folder, rounds), "sqlite_commit_p50_ms": p50, "sqlite_commit_p95_ms": p95}


def on_redis(folder: Path, rounds: int) -> Numbers:
    """Commits on a local Redis, and logins of three processes at once."""
    with redis_server(folder, "always") as redis:
        store = RedisStore(RedisClient(load_broker(redis.broker)))
        p50, p95 = one_after_the_other(store, rounds)
        store.close()
        ledgers = together(redis, "ledger")
        relays = together(redis, "relay")
    with redis_server(folder, "everysec") as redis:
        store = RedisStore(RedisClient(load_broker(redis.broker)))
        without_sync, _ = one_after_the_other(store, rounds)
        store.close()
    return {
        "redis_commit_p50_ms": p50,
        "redis_commit_p95_ms": p95,
        "redis_commit_without_sync_p50_ms": without_sync,
        "redis_logins_per_s": ledgers.per_s,
        "redis_ledger_cpu_ms_per_login": ledgers.cpu_ms,
        "redis_cpu_ms_per_login_of_ledgers": ledgers.redis_cpu_ms,
        "redis_whole_relays_logins_per_s": relays.per_s,
        "redis_whole_relay_cpu_ms_per_login": relays.cpu_ms,
        "redis_whole_relay_clients_cpu_ms_per_login": relays.clients_cpu_ms,
        "redis_cpu_ms_per_login_of_whole_relays": relays.redis_cpu_ms,
    }


def on_http_sqlite(folder: Path, rounds: int) -> Numbers:
    """A login through gateway and relay."""
    return {f"{name.removesuffix('_p50_ms')}_sqlite_p50_ms": value for name, value in http_logins(folder, None, rounds // 5).items()}


def on_http_redis(folder: Path, rounds: int) -> Numbers:
    """The same, with the store on Redis."""
    with redis_server(folder, "always") as redis:
        found = http_logins(folder, redis.broker, rounds // 5)
    return {f"{name.removesuffix('_p50_ms')}_redis_p50_ms": value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Redis:
    """A Redis that is there, and the broker.json that leads to it."""

    broker: Path
    pid: int


@contextmanager
def redis_server(folder: Path, sync: str) -> Iterator[Redis]:
    """A Redis that syncs its file as `sync` says (appendfsync)."""
    port = processes.free_port()
    content = {"transporterType": "redis", "host": "127.0.0.1", "port": port, "password": "bench", "namespace": "bench", "tls": False}
    broker = folder / f"broker-{sync}.json"
    broker.write_text(json.dumps(content))
    broker.chmod(0o600)
    home = folder / f"redis-{sync}"
    home.mkdir()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", "bench", "--save", "", "--dir", str(home)]
    redis = processes.start(["redis-server", *options, "--appendonly", "yes", "--appendfsync", sync], folder / "redis.log")
    try:
        time.sleep(1)
        yield Redis(broker, redis.pid)
    finally:
        processes.stop([redis])


@dataclass(frozen=True, slots=True)
class Together:
    """Three processes at once. Milliseconds of processor time for each login: of the process that makes it, its clients' share of that, and
    Redis' own.
    """

    per_s: float
    cpu_ms: float
    clients_cpu_ms: float
    redis_cpu_ms: float


def together(redis: Redis, kind: str) -> Together:
    """Logins of three processes at once."""
    command = [sys.executable, "-m", "benchmarks.reservations", "--be", kind, "--broker", str(redis.broker), "--seconds", str(SECONDS)]
    redis_s = processes.cpu_s([redis.pid])
    relays = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(RELAYS)]
    told = [json.loads(relay.communicate(timeout=60)[0]) for relay in relays]
    redis_s = processes.cpu_s([redis.pid]) - redis_s
    made = sum(count for count, _, _ in told)
    return Together(
        made / SECONDS,
        median(cpu_ms for _, cpu_ms, _ in told),
        median(clients_ms for _, _, clients_ms in told),
        1e3 * redis_s / max(1, made),
    )


MEASURES: Final[dict[str, Callable[[Path, int], Numbers]]] = {
    "sqlite": on_sqlite,
    "redis": on_redis,
    "http-sqlite": on_http_sqlite,
    "http-redis": on_http_redis,
}


@click.command()
@click.option("--rounds", default=300, show_default=True, help="Commits one after the other; a fifth as many logins by HTTP.")
@click.option("--turns", default=5, show_default=True, help="How often everything is measured.")
@click.option("--only", default=",".join(MEASURES), show_default=True, help="What to measure, by comma.")
@click.option("--be", type=click.Choice(["ledger", "relay"]), hidden=True, help="Be one of three.")
@click.option("--broker", type=click.Path(path_type=Path), hidden=True)
@click.option("--seconds", default=SECONDS, hidden=True)
def main(rounds: int, turns: int, only: str, be: str | None, broker: Path | None, seconds: float) -> None:
    """Measure reservations. Writes results/reservations.json."""
    if be is not None and broker is not None:
        click.echo(json.dumps(one_of_three(be, broker, seconds)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        for name in only.split(","):
            folder = Path(tempfile.mkdtemp(prefix="fxbench-"))
            try:
                for key, value in MEASURES[name](folder, rounds).items():
                    found.setdefault(key, []).append(value)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        keep(found)  # after each turn: a run that is ended early leaves what it has
    for key, values in found.items():
        click.echo(f"{key:36} {median(values):10.2f}   {min(values):.2f} to {max(values):.2f}")


def keep(found: dict[str, list[float]]) -> None:
    """Write down the medians and all turns; what other runs have left about other measures stays."""
    path = RESULTS / "reservations.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    turns = {**before.get("turns", {}), **{key: [round(value, 3) for value in values] for key, values in found.items()}}
    numbers = {key: round(median(values), 3) for key, values in turns.items()}
    kept: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="minutes"), "load": round(os.getloadavg()[0], 2)}
    path.write_text(json.dumps({**kept, "numbers": numbers, "turns": turns}, indent=1) + "\n")


def one_of_three(kind: str, broker: Path, seconds: float) -> tuple[int, float, float]:
    """Logins made, and milliseconds of processor time for each; of these the clients' own."""
    name = f"relay-{os.getpid()}"
    if kind == "relay":
        return trio.run(whole_relay, broker, name, seconds)
    store = RedisStore(RedisClient(load_broker(broker)))
    cpu_s = time.process_time()
    count = logins(store, name, seconds)
    cpu_s = time.process_time() - cpu_s
    store.close()
    return count, 1e3 * cpu_s / max(1, count), 0.0


if __name__ == "__main__":
    main()
