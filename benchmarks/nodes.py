"""Task: simulated compute nodes: their server objects, written to a real store by the product's own adapters.

`python -m benchmarks.nodes RELAY_TOML COUNT PERIOD_S SECONDS [SESSIONS]` publishes COUNT nodes every PERIOD_S seconds through the cluster
of a relay.toml; each of them has SESSIONS sessions or more.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Final

WRITERS: Final = 4


def server_text(number: int, seq: int, measured_ms: int, sessions: int = 0, **fields: Any) -> str:
    """A server object of about 700 bytes, as a node publishes it. It has `sessions` sessions, or up to 39 more."""
    rng = Random(number * 1_000_003 + seq)
    return json.dumps(
        {
            "hostname": f"node{number:05}.cluster.example.com",
            "address": f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}",
            "sessions": sessions + rng.randrange(40),
            "uniqueUserSessions": rng.randrange(20),
            "logins": rng.randrange(40),
            "uniqueUserLogins": rng.randrange(20),
            "loadavg": [rng.randrange(3200) / 100, 4.5, 4.25],
            "cpu": rng.randrange(1000) / 10,
            "freemem": rng.randrange(1 << 38),
            "availmem": rng.randrange(1 << 38),
            "totalmem": 1 << 38,
            "uptime": 1_234_567,
            "staticData": {"group": f"group-{number % 7}", "gpu": number % 4 == 0, "cores": 64, "site": "north"},
            "metadata": {"rack": f"r{number % 40}"},
            "metrics": {"licences": rng.randrange(100), "scratch_free": rng.randrange(1 << 40)},
            "disable": [],
            "weight": 100,
            "services": [{"name": "desk", "proto": "tcp", "port": 5901}, {"name": "ssh", "proto": "tcp", "port": 22}],
            "serverId": f"node-{number:05}",
            "seq": seq,
            "measuredAt": measured_ms,
            "agent": {"version": "0.2.0", "instanceId": f"i{number:031}", "startedAt": 1, "tunnels": []},
            **fields,
        },
        separators=(",", ":"),
    )


def publish(relay_toml: Path, count: int, period_s: float, seconds: float, sessions: int = 0) -> int:
    """Publish at an even pace; returns how many updates went out. After a SIGSTOP nothing is made up for."""
    from fxrelay.cluster.opening import open_cluster
    from fxrelay.cluster.ports import SERVERS
    from fxrelay.settings import load

    settings = load(relay_toml, os.environ)
    store, transporter = open_cluster(settings.cluster, settings.relay.state_dir)
    pace_s = period_s / count
    began = time.monotonic()
    sent = next_turn = 0

    def one(number: int, seq: int) -> None:
        text = server_text(number, seq, int(time.time() * 1000), sessions)
        store.put(SERVERS, f"node-{number:05}", text)
        transporter.publish(SERVERS, text)

    with ThreadPoolExecutor(WRITERS) as pool:
        while (now := time.monotonic() - began) < seconds:
            due = int(now / pace_s)
            batch = range(max(next_turn, due - count // 4), due)
            list(pool.map(lambda turn: one(turn % count, turn // count + 1), batch))
            sent, next_turn = sent + len(batch), due
            time.sleep(0.01)
    transporter.close()
    store.close()
    return sent


if __name__ == "__main__":
    print(publish(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), *map(int, sys.argv[5:])))
