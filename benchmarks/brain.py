"""Task: `python -m benchmarks.brain`: what decisions cost, and following a large cluster. Real code, real Redis, simulated nodes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import click
import psutil
import trio

from benchmarks import processes
from benchmarks.loadgen import LoadGenerator
from benchmarks.nodes import server_text
from benchmarks.peer_fx import FxGateway
from fxrelay.balance.chain import decide
from fxrelay.balance.entries import Scripts
from fxrelay.balance.filters import Circumstances, Pool, Sieve
from fxrelay.balance.model import Action, Request
from fxrelay.balance.ways import Ways
from fxrelay.balance.workers import ScriptLimits
from fxrelay.cluster.members import Ages, Members
from fxtunnel.model import GatewayId, RelayId

SERVERS: Final = 1_000
FOLLOWED: Final = 10_000
PERIOD_S: Final = 10.0
MEASURED_S: Final = 30.0
DECISIONS_PER_S: Final = 50
ECHO_S: Final = 10
RESULTS: Final = Path(__file__).resolve().parent / "results"
_JS: Final = """function (input) {
  const fit = input.servers.filter((s) => s.staticData.group === "group-3" && s.disable.length === 0);
  fit.sort((a, b) => a.sessions - b.sessions);
  return fit[0].serverId;
}
"""
_JS_LOCAL: Final = _JS.replace("fit[0].serverId", "input.local.serverId")
_RELAY: Final = """[relay]
id = "follower"
state_dir = "state"
{gateway}
[cluster]
broker = "broker.json"
publish_s = 10
[[service]]
name = "echo"
target = "127.0.0.1:{port}"
[[service]]
name = "desk"
port = 1
nodes = "*"
balance = ["js:choose.js"]
"""

Numbers = dict[str, float]


class _Alone:
    """An environment for entries that ask for nothing."""

    local_id = RelayId("node-00001")

    async def next_number(self, counter: str) -> int:
        return 1


def decisions(folder: Path, rounds: int) -> Numbers:
    """Wall milliseconds of one decision over SERVERS server objects, filters included: builtin, JavaScript, executable."""
    (folder / "choose.js").write_text(_JS)
    script = folder / "choose.sh"
    script.write_text("#!/bin/sh\necho node-00003\n")
    script.chmod(0o700)
    members = Members(Ages())
    now = time.monotonic()
    for number in range(SERVERS):
        members.hear(server_text(number, 1, 1), now)
    around = Circumstances({RelayId(f"node-{number:05}"): 1 for number in range(0, SERVERS, 20)})
    ways = Ways(RelayId("relay"), ("local", "redirect", "direct"), False, (ip_network("10.0.0.0/8"),), "10.0.0.1")
    request = Request(Action.START, "desk", "anna")
    sieve = Sieve(Pool("desk"), request.action, lambda server: ways.reaches(server, GatewayId("gateway")))

    async def run() -> Numbers:
        numbers: Numbers = {}
        scripts = Scripts(ScriptLimits(), folder)
        try:
            for name, spec in (("builtin", "builtin:fewest-sessions"), ("js", "js:choose.js"), ("exec", "exec:choose.sh")):
                chain = scripts.chain([spec], "desk", {})
                seen = []
                for turn in range(rounds + 3):
                    began = time.perf_counter()
                    candidates, dropped = sieve.sift(members.members(now), request.user, around)
                    decision = await decide(chain, request, candidates, dropped, _Alone())
                    if decision.server_id is None:
                        raise processes.BenchmarkError(f"{spec}: {decision.failure}")
                    if turn >= 3:  # the first calls start the process
                        seen.append((time.perf_counter() - began) * 1e3)
                numbers[f"{name}_ms"] = median(seen)
                numbers[f"{name}_p95_ms"] = quantiles(seen, n=20)[-1]
        finally:
            scripts.close()
        return numbers

    return trio.run(run)


def following(folder: Path, rounds: int) -> Numbers:
    """One relay that follows FOLLOWED nodes which publish every PERIOD_S through a real Redis: share of a core, KiB a node."""
    port = processes.free_port()
    broker = {"transporterType": "redis", "host": "127.0.0.1", "port": port, "password": "bench", "namespace": "bench", "tls": False}
    (folder / "broker.json").write_text(json.dumps(broker))
    (folder / "broker.json").chmod(0o600)
    (folder / "choose.js").write_text(_JS)
    (folder / "relay.toml").write_text(_RELAY.format(gateway="", port=port))
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", "bench", "--save", "", "--dir", str(folder)]
    redis = processes.start(["redis-server", *options], folder / "redis.log")
    started = [redis]
    try:
        time.sleep(1)
        relay = processes.start([sys.executable, "-m", "fxrelay.cli", "run", "--config", str(folder / "relay.toml")], folder / "relay.log")
        started.append(relay)
        time.sleep(4)
        before = psutil.Process(relay.pid).memory_info().rss
        command = [sys.executable, "-m", "benchmarks.nodes", str(folder / "relay.toml"), str(FOLLOWED), str(PERIOD_S)]
        nodes = processes.start([*command, str(PERIOD_S * 2 + MEASURED_S + 5)], folder / "nodes.log")
        started.append(nodes)
        time.sleep(PERIOD_S * 2)
        cpu_s, began = processes.cpu_s([relay.pid]), time.monotonic()
        time.sleep(MEASURED_S)
        share = (processes.cpu_s([relay.pid]) - cpu_s) / (time.monotonic() - began)
        after = psutil.Process(relay.pid).memory_info().rss
        status = subprocess.run(
            [sys.executable, "-m", "fxrelay.cli", "status", "--json", "--config", str(folder / "relay.toml")],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        cluster = json.loads(status.stdout)["cluster"]
        return {
            "follow_core_share": share,
            "follow_kib_per_node": (after - before) / FOLLOWED / 1024,
            "follow_nodes_up": cluster["nodes"]["up"],
            "follow_updates_per_s": cluster["updates"]["applied"] / (PERIOD_S * 2 + MEASURED_S),
        }
    finally:
        processes.stop(reversed(started))


def beside(folder: Path, rounds: int) -> Numbers:
    """A 64-byte echo through gateway and relay, alone and beside DECISIONS_PER_S JavaScript decisions over SERVERS servers: µs."""
    (folder / "choose.js").write_text(_JS_LOCAL)
    load = LoadGenerator.build(120)
    with load.service() as service_port:
        door = processes.free_port()
        peer = FxGateway("fx", "FX Gateway", _pool_environ(folder, door, service_port))
        nodes = None
        try:
            running = peer.start(service_port)
            store = f'[relay]\nid = "nodes"\nstate_dir = "state"\n[cluster]\nstore = "sqlite:{folder}/cluster.db"\n'
            (folder / "nodes.toml").write_text(store)
            command = [sys.executable, "-m", "benchmarks.nodes", str(folder / "nodes.toml"), str(SERVERS), str(PERIOD_S)]
            nodes = processes.start([*command, str(PERIOD_S * 20)], folder / "nodes.log")
            time.sleep(PERIOD_S * 1.5)
            alone = median(load.run("echo", running.port, ECHO_S)["p99_us"] for _ in range(3))
            with _visitors(door) as visited:
                busy = median(load.run("echo", running.port, ECHO_S)["p99_us"] for _ in range(3))
            return {
                "echo_p99_us": alone,
                "echo_beside_p99_us": busy,
                "echo_beside_ratio": busy / alone,
                "visits_per_s": visited[0] / (3 * ECHO_S),
                "visits_failed": visited[1],
            }
        finally:
            if nodes is not None:
                processes.stop([nodes])
            peer.stop()


def _pool_environ(folder: Path, door: int, service_port: int) -> dict[str, str]:
    """A second door, to a pool of all nodes whose chain is JavaScript."""
    return {
        "FXGATEWAY__DOOR__1__LISTEN": f"127.0.0.1:{door}",
        "FXGATEWAY__DOOR__1__SERVICE": "desk",
        "FXRELAY__CLUSTER__STORE": f"sqlite:{folder}/cluster.db",
        "FXRELAY__CLUSTER__NETWORKS": '["10.0.0.0/8"]',
        "FXRELAY__SERVICE__1__NAME": "desk",
        "FXRELAY__SERVICE__1__PORT": str(service_port),
        "FXRELAY__SERVICE__1__BALANCE": json.dumps([f"js:{folder}/choose.js"]),
    }


@contextmanager
def _visitors(door: int) -> Iterator[list[int]]:
    """Clients that come at an even pace, get their echo and go, for as long as the block lasts: how many did, and how many failed."""
    counts = [0, 0]
    over = threading.Event()

    def visit() -> None:
        try:
            with socket.create_connection(("127.0.0.1", door), 10) as sock:
                sock.sendall(b"E" + bytes(15) + b"e" * 64)
                counts[0 if sock.recv(64) else 1] += 1
        except OSError:
            counts[1] += 1

    def keep_visiting() -> None:
        with ThreadPoolExecutor(32) as pool:
            while not over.wait(1 / DECISIONS_PER_S):
                pool.submit(visit)

    thread = threading.Thread(target=keep_visiting)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


MEASURES: Final[dict[str, Callable[[Path, int], Numbers]]] = {"decisions": decisions, "following": following, "beside": beside}


@click.command()
@click.option("--rounds", default=30, show_default=True, help="Decisions of each kind.")
@click.option("--only", default=",".join(MEASURES), show_default=True, help="Measures, by comma.")
def main(rounds: int, only: str) -> None:
    """Measure balancing and following. Writes results/brain.json."""
    if "following" in only and shutil.which("redis-server") is None:
        raise click.UsageError("`following` needs redis-server; without it: --only decisions")
    numbers: Numbers = {}
    for name in only.split(","):
        folder = Path(tempfile.mkdtemp(prefix="fxbench-"))
        try:
            click.echo(f"{name} ...", err=True)
            numbers.update(MEASURES[name](folder, rounds))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="minutes"), "load": os.getloadavg()[0], "numbers": numbers}
    RESULTS.mkdir(exist_ok=True)
    if (RESULTS / "brain.json").exists():
        numbers = json.loads((RESULTS / "brain.json").read_text())["numbers"] | numbers
        found["numbers"] = numbers
    (RESULTS / "brain.json").write_text(json.dumps(found, indent=1) + "\n")
    for key, value in numbers.items():
        click.echo(f"{key:24} {value:10.2f}")


if __name__ == "__main__":
    main()
