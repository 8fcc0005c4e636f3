"""Task: `python -m benchmarks.brain`: what decisions cost, and following a large cluster. Real code, real Redis, simulated nodes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import click
import psutil
import trio

from benchmarks import processes
from benchmarks.beside import beside
from benchmarks.broker import redis
from benchmarks.nodes import server_text
from fxrelay.balance.chain import decide
from fxrelay.balance.entries import Scripts
from fxrelay.balance.filters import CandidateFilter, FilterContext, Pool
from fxrelay.balance.model import Action, Request
from fxrelay.balance.path_rules import PathRules
from fxrelay.balance.workers import ScriptLimits
from fxrelay.cluster.members import Ages, Members
from fxtunnel.model import GatewayId, RelayId

SERVERS: Final = 1_000
FOLLOWED: Final = 10_000
PERIOD_S: Final = 10.0
MEASURED_S: Final = 30.0
RESULTS: Final = Path(__file__).resolve().parent / "results"
_JS: Final = """function (input) {
  const fit = input.servers.filter((s) => s.staticData.group === "group-3" && s.disable.length === 0);
  fit.sort((a, b) => a.sessions - b.sessions);
  return fit[0].serverId;
}
"""
_RELAY: Final = """[relay]
id = "follower"
state_dir = "state"
[cluster]
broker = "broker.json"
publish_s = 10
[[service]]
name = "echo"
target = "127.0.0.1:1"
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
    around = FilterContext({RelayId(f"node-{number:05}"): 1 for number in range(0, SERVERS, 20)})
    path_rules = PathRules(RelayId("relay"), ("local", "redirect", "direct"), False, (ip_network("10.0.0.0/8"),), "10.0.0.1")
    request = Request(Action.START, "desk", "anna")
    candidate_filter = CandidateFilter(Pool("desk"), request.action, lambda server: path_rules.reaches(server, GatewayId("gateway")))

    async def run() -> Numbers:
        numbers: Numbers = {}
        scripts = Scripts(ScriptLimits(), folder / "relay.toml")
        try:
            for name, spec in (("builtin", "builtin:fewest-sessions"), ("js", "js:choose.js"), ("exec", "exec:choose.sh")):
                chain = scripts.chain([spec], "desk", {})
                seen = []
                for turn in range(rounds + 3):
                    began = time.perf_counter()
                    candidates, dropped = candidate_filter.apply(members.members(now), request.user, around)
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
    (folder / "choose.js").write_text(_JS)
    (folder / "relay.toml").write_text(_RELAY)
    with redis(folder):
        return _followed(folder)


def _followed(folder: Path) -> Numbers:
    started: list[subprocess.Popen[bytes]] = []
    try:
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


MEASURES: Final[dict[str, Callable[[Path, int], Numbers]]] = {"decisions": decisions, "following": following, "beside": beside}


@click.command()
@click.option("--rounds", default=30, show_default=True, help="Decisions of each kind.")
@click.option("--only", default=",".join(MEASURES), show_default=True, help="Measures, by comma.")
def main(rounds: int, only: str) -> None:
    """Measure balancing and following. Writes results/brain.json."""
    if only != "decisions" and shutil.which("redis-server") is None:
        raise click.UsageError("`following` and `beside` need redis-server; without it: --only decisions")
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
