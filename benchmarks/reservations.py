"""Task: `python -m benchmarks.reservations`: what a commit costs on SQLite and Redis, and how many logins three relays make on one Redis.

A login is a take (entry and commit in one) and a release: two atomic updates of the store. Redis writes to disk before it answers.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import click

from benchmarks import processes
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
        outcome, _ = ledger.take(f"server-{turn % 50}", f"login-{turn}", "ann", "192.0.2.1", OwnerRelogin.PREFER)
        seen.append((time.perf_counter() - began) * 1e3)
        if not isinstance(outcome, Granted):
            raise processes.BenchmarkError(f"not granted: {outcome}")
        ledger.release(f"server-{turn % 50}", f"login-{turn}", 0)
    return median(seen), quantiles(seen, n=20)[-1]


def logins(store: Store, name: str, seconds: float) -> int:
    """Logins that one relay makes in that time, with as many threads as it has."""
    ledger = ready_ledger(store, name)
    ends = time.perf_counter() + seconds

    def work(thread: int) -> int:
        count = 0
        while time.perf_counter() < ends:
            server = f"server-{(count * THREADS + thread) % SERVERS}"
            login = f"{name}-{thread}-{count}"
            outcome, _ = ledger.take(server, login, login, "192.0.2.1", OwnerRelogin.PREFER)
            if isinstance(outcome, Granted):
                ledger.release(server, login, 0)
            count += 1
            if count % 100 == 0:
                ledger.look()
        return count

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


def on_sqlite(folder: Path, rounds: int) -> Numbers:
    """Commits on a file."""
    store = SqliteStore(folder / "cluster.db")
    try:
        p50, p95 = one_after_the_other(store, rounds)
    finally:
        store.close()
    return {"sqlite_commit_p50_ms": p50, "sqlite_commit_p95_ms": p95}


def on_redis(folder: Path, rounds: int) -> Numbers:
    """Commits on a local Redis, and logins of three processes at once."""
    port = processes.free_port()
    broker = {"transporterType": "redis", "host": "127.0.0.1", "port": port, "password": "bench", "namespace": "bench", "tls": False}
    (folder / "broker.json").write_text(json.dumps(broker))
    (folder / "broker.json").chmod(0o600)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", "bench", "--save", "", "--dir", str(folder)]
    redis = processes.start(["redis-server", *options, "--appendonly", "yes", "--appendfsync", "always"], folder / "redis.log")
    try:
        time.sleep(1)
        store = RedisStore(RedisClient(load_broker(folder / "broker.json")))
        p50, p95 = one_after_the_other(store, rounds)
        store.close()
        seconds = 5.0
        command = [sys.executable, "-m", "benchmarks.reservations", "--relay", str(folder / "broker.json"), "--seconds", str(seconds)]
        relays = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(RELAYS)]
        total = sum(int(relay.communicate(timeout=60)[0]) for relay in relays)
    finally:
        processes.stop([redis])
    return {"redis_commit_p50_ms": p50, "redis_commit_p95_ms": p95, "redis_logins_per_s": total / seconds}


MEASURES: Final[dict[str, Callable[[Path, int], Numbers]]] = {"sqlite": on_sqlite, "redis": on_redis}


@click.command()
@click.option("--rounds", default=500, show_default=True, help="Commits one after the other.")
@click.option("--only", default=",".join(MEASURES), show_default=True, help="Stores, by comma.")
@click.option("--relay", type=click.Path(path_type=Path), hidden=True, help="Be one of the relays, with this broker.json.")
@click.option("--seconds", default=5.0, hidden=True)
def main(rounds: int, only: str, relay: Path | None, seconds: float) -> None:
    """Measure reservations. Writes results/reservations.json."""
    if relay is not None:
        store = RedisStore(RedisClient(load_broker(relay)))
        click.echo(logins(store, f"relay-{os.getpid()}", seconds))
        store.close()
        return
    numbers: Numbers = {}
    for name in only.split(","):
        folder = Path(tempfile.mkdtemp(prefix="fxbench-"))
        try:
            numbers.update(MEASURES[name](folder, rounds))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="minutes"), "load": os.getloadavg()[0], "numbers": numbers}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reservations.json").write_text(json.dumps(found, indent=1) + "\n")
    for key, value in numbers.items():
        click.echo(f"{key:24} {value:10.2f}")


if __name__ == "__main__":
    main()
