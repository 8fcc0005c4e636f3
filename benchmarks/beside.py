"""Task: what decisions do to streams: a 64-byte echo through gateway and relay, alone and beside clients whose node has to be chosen."""

import json
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import Final

import psutil

from benchmarks import processes
from benchmarks.loadgen import Client, LoadGenerator, Result
from benchmarks.peer_fx import FxGateway

SERVERS: Final = 1_000
PERIOD_S: Final = 10.0
PER_S: Final = 50
ROUNDS: Final = 5
PHASE_S: Final = 4.0
UNDER_WAY: Final = 256
BUSY: Final = ("plain", "builtin", "js")
"""What comes beside the echo, PER_S connections a second: to a service with one target, for which nothing is decided, and to pools of
SERVERS nodes whose chain is a built-in entry, or a JavaScript function.
"""
PHASES: Final = ("silent", "idle", *BUSY)
"""`idle`: the echo alone, while the nodes publish as they always do. `silent`: they do not."""
_JS: Final = """function (input) {
  const fit = input.servers.filter((s) => s.staticData.group === "group-3" && s.disable.length === 0);
  fit.sort((a, b) => a.sessions - b.sessions);
  return input.local.serverId;
}
"""
_NODES: Final = '[relay]\nid = "nodes"\nstate_dir = "state"\n[cluster]\nstore = "sqlite:{store}"\n'


def beside(folder: Path, rounds: int) -> dict[str, float]:
    """p50 and p99 of the echo in µs: medians over ROUNDS phases of each kind, in turn; and how those beside clients compare with those
    without.

    Whoever is chosen has to be there: the simulated nodes have more sessions than the relay's own, and so each decision that looks at a
    thousand nodes ends at that one.
    """
    (folder / "choose.js").write_text(_JS)
    load = LoadGenerator.build(60)
    doors = {name: processes.free_port() for name in BUSY[1:]}
    with load.service() as service_port:
        peer = FxGateway("fx", "FX Gateway", _environ(folder, doors, service_port))
        nodes = None
        try:
            running = peer.start(service_port)
            (folder / "nodes.toml").write_text(_NODES.format(store=folder / "cluster.db"))
            words = [str(folder / "nodes.toml"), str(SERVERS), str(PERIOD_S), "600", "1000"]
            nodes = processes.start([sys.executable, "-m", "benchmarks.nodes", *words], folder / "nodes.log")
            time.sleep(PERIOD_S * 1.5)
            relay = running.daemons["relay"]
            echoes: dict[str, list[Result]] = {name: [] for name in PHASES}
            visits: dict[str, list[Result]] = {name: [] for name in BUSY}
            cores: dict[str, list[float]] = {name: [] for name in PHASES}
            straight = load.run("echo", service_port, PHASE_S / 2)
            for _ in range(ROUNDS):
                for name in PHASES:
                    with _visiting(load, {"plain": running.port, **doors}.get(name)) as client, _stopped(nodes, name == "silent"):
                        cpu_s, began = _own_cpu_s(relay), time.monotonic()
                        echoes[name].append(load.run("echo", running.port, PHASE_S))
                        cores[name].append((_own_cpu_s(relay) - cpu_s) / (time.monotonic() - began))
                        if client is not None:
                            visits[name].append(client.result())
        finally:
            if nodes is not None:
                processes.stop([nodes])
            peer.stop()
    return _numbers(echoes, visits, cores) | {"echo_straight_p99_us": straight["p99_us"]}


def _numbers(echoes: dict[str, list[Result]], visits: dict[str, list[Result]], cores: dict[str, list[float]]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name in PHASES:
        numbers[f"echo_{name}_p50_us"] = median(one["p50_us"] for one in echoes[name])
        numbers[f"echo_{name}_p99_us"] = median(one["p99_us"] for one in echoes[name])
        numbers[f"echo_{name}_per_s"] = median(one["count"] for one in echoes[name]) / PHASE_S
        numbers[f"echo_{name}_relay_core"] = median(cores[name])
    for name in BUSY:
        numbers[f"echo_{name}_ratio"] = numbers[f"echo_{name}_p99_us"] / numbers["echo_idle_p99_us"]
        numbers[f"echo_{name}_ratio_of_rounds"] = median(
            one["p99_us"] / idle["p99_us"] for one, idle in zip(echoes[name], echoes["idle"], strict=True)
        )
        numbers[f"visits_{name}_per_s"] = sum(one["done"] for one in visits[name]) / sum(one["seconds"] for one in visits[name])
        numbers[f"visits_{name}_failed"] = sum(one["failed"] + one["stuck"] for one in visits[name])
        numbers[f"visits_{name}_p50_us"] = median(one["p50_us"] for one in visits[name])
    return numbers


def _environ(folder: Path, doors: dict[str, int], service_port: int) -> dict[str, str]:
    """Doors to pools of all nodes; the simulated ones publish the service `desk` with another port, so each pool names that."""
    chains = {"builtin": "builtin:fewest-sessions", "js": f"js:{folder}/choose.js"}
    environ = {"FXRELAY__CLUSTER__STORE": f"sqlite:{folder}/cluster.db"}
    everyone = json.dumps(["bench", *(f"node-{number:05}" for number in range(SERVERS))])
    for number, (name, door) in enumerate(doors.items(), 1):
        environ |= {
            f"FXGATEWAY__DOOR__{number}__LISTEN": f"127.0.0.1:{door}",
            f"FXGATEWAY__DOOR__{number}__SERVICE": name,
            f"FXRELAY__SERVICE__{number}__NAME": name,
            f"FXRELAY__SERVICE__{number}__PORT": str(service_port),
            f"FXRELAY__SERVICE__{number}__NODES": everyone,
            f"FXRELAY__SERVICE__{number}__BALANCE": json.dumps([chains[name]]),
        }
    return environ


def _visiting(load: LoadGenerator, door: int | None) -> AbstractContextManager[Client | None]:
    """Clients that come at an even pace, each of whom asks for an answer and goes; nobody without a door."""
    return nullcontext() if door is None else load.running("pace", door, UNDER_WAY, PER_S, PHASE_S)


class _stopped:
    """A process that stands still for as long as the block lasts, if that `is_wanted`."""

    def __init__(self, process: Popen[bytes], is_wanted: bool) -> None:
        self._process = process
        self._is_wanted = is_wanted

    def __enter__(self) -> None:
        if self._is_wanted:
            self._process.send_signal(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        if self._is_wanted:
            self._process.send_signal(signal.SIGCONT)
            time.sleep(0.5)


def _own_cpu_s(pid: int) -> float:
    """CPU seconds of one process, without its children."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
