"""Relays and a store that are killed while clients log in and out; and what the recorded history says.

python -m tests.reservations.reservation_chaos --seconds 180 --store redis
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxrelay.balance.reservations import Granted, OwnerRelogin
from fxrelay.reserving.ledger import Ledger
from fxtunnel.kit.certificates import new_authority
from fxtunnel.model import RelayId
from tests.cluster_store.store_rig import PASSWORD, RedisServer, broker_content, write_broker
from tests.reservations.lock_history import falling_tokens, is_linearizable, overlaps, read_history
from tests.reservations.reservation_worker import open_both
from tests.system import forks

RELAYS = ("r1", "r2", "r3")
SERVERS = tuple(f"s{number}" for number in range(8))
LEASE_S = 2.0
ANSWER_S = 15.0


@dataclass
class Outcome:
    """What came of it. All lists are empty if all is well."""

    counts: Counter[str] = field(default_factory=Counter)
    overlaps: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    not_linearizable: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [*self.overlaps, *self.tokens, *self.not_linearizable, *self.leaked, *self.unanswered]


class Chaos:
    def __init__(self, directory: Path, redis_options: tuple[str, ...] | None, clients: int, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        self.rng = random.Random(seed)
        self.server: RedisServer | None = None
        where: dict[str, Any] = {"sqlite": str(directory / "cluster.db")}
        if redis_options is not None:
            options = (f"requirepass {json.dumps(PASSWORD)}", *redis_options)
            self.server = RedisServer(directory / "redis", new_authority("chaos"), *options)
            self.server.start()
            where = {"broker": str(write_broker(directory, broker_content(self.server)))}
        self.config = {
            **where,
            "lease_s": LEASE_S,
            "clients": clients,
            "servers": SERVERS,
            "log": str(directory / "history.jsonl"),
            "pause_s": 0.4,
            "stay_s": 0.5,
        }
        self.processes: dict[str, forks.Fork] = {}
        self.kills: list[tuple[str, float]] = []
        self.store_kills = 0

    def start(self, relay: str) -> None:
        config = self.directory / f"{relay}.json"
        config.write_text(json.dumps({**self.config, "relay": relay}))
        with (self.directory / f"{relay}.err").open("ab") as errors:
            arguments = ["tests.reservations.reservation_worker", str(config)]
            self.processes[relay] = forks.start(arguments, os.environ, errors.fileno(), errors.fileno())

    def kill(self, relay: str) -> None:
        process = self.processes.pop(relay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.kills.append((relay, time.monotonic()))

    def run(self, seconds: float) -> None:
        """Kill something every second or so; begins when somebody was let in."""
        for relay in RELAYS:
            self.start(relay)
        ends = time.monotonic() + 60
        while not any(line["event"] == "in" for line in self.history()):
            assert time.monotonic() < ends, self.errors()
            time.sleep(0.1)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(self.rng.uniform(0.3, 2.5))
            if self.server is not None and self.rng.random() < 0.4:
                self.server.kill()
                self.store_kills += 1
                time.sleep(self.rng.choice([0.0, 0.3, LEASE_S * 1.5]))
                self.server.start()
            else:
                relay = self.rng.choice(RELAYS)
                self.kill(relay)
                time.sleep(self.rng.choice([0.0, 0.5]))
                self.start(relay)
            dead = [relay for relay, process in self.processes.items() if process.poll() is not None]
            assert not dead, self.errors()

    def stop(self) -> None:
        for relay in list(self.processes):
            self.kill(relay)

    def close(self) -> None:
        self.stop()
        if self.server is not None:
            self.server.kill()

    def errors(self) -> str:
        return "".join((self.directory / f"{relay}.err").read_text()[-3_000:] for relay in RELAYS)

    def history(self) -> list[dict[str, Any]]:
        path = self.directory / "history.jsonl"
        if not path.exists():
            return []
        # A process that is killed may leave half a line.
        lines = path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines if line.endswith(b"}")]

    def verdict(self) -> Outcome:
        """After `stop`: waits until every lease must be over, and looks at everything."""
        end = time.monotonic()
        lines = self.history()
        outcome = Outcome(Counter(f"{line['event']} {line.get('reason', '')}".strip() for line in lines))
        outcome.counts["kills of relays"] = len(self.kills)
        stays, operations = read_history(lines, self.kills, end, 2 * LEASE_S + 8)
        for server in SERVERS:
            outcome.overlaps += overlaps(stays[server])
            outcome.tokens += falling_tokens(stays[server])
            if not is_linearizable(operations[server]):
                outcome.not_linearizable.append(f"{server} is no lock")
        outcome.unanswered = self._unanswered(lines)
        outcome.slowest_s = max((line["t"] - line["call"] for line in lines if line["event"] in ("in", "no")), default=0.0)
        outcome.leaked = self._leaked()
        return outcome

    def _unanswered(self, lines: list[dict[str, Any]]) -> list[str]:
        asked: dict[str, dict[str, Any]] = {}
        found = []
        for line in sorted([*lines, *({"event": "kill", "relay": relay, "t": at} for relay, at in self.kills)], key=lambda line: line["t"]):
            if line["event"] == "ask":
                asked[line["user"]] = line
            elif line["event"] in ("in", "no"):
                ask = asked.pop(line["user"])
                if line["t"] - ask["t"] > ANSWER_S:
                    found.append(f"{line['user']} waited {line['t'] - ask['t']:.1f} s")
            elif line["event"] == "kill":
                asked = {user: ask for user, ask in asked.items() if ask["relay"] != line["relay"]}
        return found + [f"{user} never had an answer" for user in asked]

    def _leaked(self) -> list[str]:
        store, transporter = open_both(self.config)
        try:
            ledger = Ledger(store, RelayId("auditor"), LEASE_S)
            deadline = time.monotonic() + 4 * LEASE_S
            left = list(SERVERS)
            while left and time.monotonic() < deadline:
                ledger.look()
                for server in list(left):
                    ask = ledger.updates.take(server, f"audit-{server}", "auditor", "", OwnerRelogin.PREFER)
                    if isinstance(ledger.do(ask)[0], Granted):
                        left.remove(server)
                time.sleep(0.2)
            return [f"{server} stays reserved" for server in left]
        finally:
            transporter.close()
            store.close()


DURABLE = ("appendonly yes", "appendfsync always", 'save ""')
FORGETFUL = ("appendonly no", 'save ""')


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--store", choices=["sqlite", "redis", "redis-without-aof"], default="redis")
    parser.add_argument("--clients", type=int, default=17, help="at each of three relays")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="fx-chaos-"))
    redis_options = {"sqlite": None, "redis": DURABLE, "redis-without-aof": FORGETFUL}[options.store]
    chaos = Chaos(directory, redis_options, options.clients, options.seed)
    try:
        chaos.run(options.seconds)
        chaos.stop()
        outcome = chaos.verdict()
    finally:
        chaos.close()
    sys.stdout.write(f"seed {options.seed}, history in {directory}\n{dict(outcome.counts)}\n")
    sys.stdout.write("\n".join(outcome.problems) + "\n" if outcome.problems else "no double reservation, nothing leaked, all answered\n")
    sys.exit(bool(outcome.problems))


if __name__ == "__main__":
    main()
