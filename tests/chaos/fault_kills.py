"""Relays, gateway and store are killed in turn, under load."""

import random
import time

from tests.chaos.figures import Outcome
from tests.chaos.pool_stage import NODES, Pools
from tests.chaos.stage import LIVELY, LIVELY_RELAY, MIB, Fault, Stage, judge

VICTIMS = ("gateway", NODES[0], "store", NODES[1])


def kills(stage: Stage, outcome: Outcome) -> None:
    """Each is started again at once, as systemd would."""
    pools = Pools(stage, LIVELY, LIVELY_RELAY)
    count = stage.pick(3, 200)
    load = pools.load(30, MIB / 4)
    load.wait_running()
    chance = random.Random(1)
    ready_s: dict[str, list[float]] = {}
    for number in range(count):
        victim = VICTIMS[number % len(VICTIMS)]
        stage.show(f"kill {number + 1} of {count}: {victim}", number / count)
        time.sleep(chance.uniform(0.1, 0.6))
        ready_s.setdefault(victim.partition("-")[0], []).append(pools.kill(victim))
    tally = load.finish()
    outcome.add("kills", count)
    for kind, seconds in ready_s.items():
        name = "relay" if kind == "node" else kind
        outcome.add(f"s until ready after a {name}, median", sorted(seconds)[len(seconds) // 2])
        outcome.add(f"s until ready after a {name}, longest", max(seconds), f"≤ {stage.pick(15, 5)}")
    judge(outcome, tally, pools.services, lost="≥ 0")
    outcome.add("MiB compared", tally["bytes_right"] / MIB)


KILLS = Fault("kills", "gateway, relays and store killed in turn under load: ready in 5 s; right bytes or RST, never a clean end", kills)
