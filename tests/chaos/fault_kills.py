"""Relays, gateway and store are killed in turn, under load."""

import json
import random
import time
from collections import Counter
from pathlib import Path

from fxgateway.doors.client import UNANSWERED
from tests.chaos.figures import Outcome
from tests.chaos.load import End
from tests.chaos.pool_stage import NODES, Pools
from tests.chaos.stage import LIVELY, LIVELY_RELAY, MIB, Fault, Load, Stage, judge

VICTIMS = ("gateway", NODES[0], "store", NODES[1])
RATE = MIB / 4
SIZE_BYTES = 3 * MIB // 8
"""A second and a half: streams end between two kills, and some are in mid-transfer at each."""
SETTLED_S = 0.3
"""For a RST to be counted."""


def kills(stage: Stage, outcome: Outcome) -> None:
    """Each is started again at once, as systemd would. What a death costs is counted, and what of it need not have been."""
    log = AccessLines(stage.directory / "access.log")
    pools = Pools(stage, f'{LIVELY}[log]\naccess = "{log.path}"\n', LIVELY_RELAY)
    count = stage.pick(3, 200)
    load = pools.load(30, RATE, SIZE_BYTES)
    load.wait_running()
    chance = random.Random(1)
    ready_s: dict[str, list[float]] = {}
    reset: Counter[str] = Counter()
    carried = unanswered = needless = 0
    for number in range(count):
        victim = VICTIMS[number % len(VICTIMS)]
        kind = "relay" if victim in NODES else victim
        stage.show(f"kill {number + 1} of {count}: {victim}", number / count)
        time.sleep(chance.uniform(*stage.pick((0.1, 0.6), (1.2, 2.6))))
        before = ends_of(load)
        log.skip()
        its_own = pools.stop_and_count(victim) if kind == "relay" else 0
        ready_s.setdefault(kind, []).append(pools.kill(victim))
        time.sleep(SETTLED_S)
        cost = ends_of(load) - before
        reset[kind] += cost[End.RESET]
        carried += its_own
        if kind != "gateway":  # while that is away, nobody can come in
            # A RST before the first byte is "turned away" to the client, whether the victim had accepted its stream or only been asked.
            with_victim = log.lost_with(victim)
            unanswered += with_victim.count(f"gateway: {UNANSWERED}")
            lost = cost[End.RESET] + cost[End.TURNED_AWAY] + cost[End.REFUSED]
            needless += max(0, cost[End.RESET] - its_own) + max(0, lost - len(with_victim))
    tally = load.finish()
    outcome.add("kills", count)
    for kind, seconds in ready_s.items():
        outcome.add(f"s until ready after a {kind}, median", sorted(seconds)[len(seconds) // 2])
        outcome.add(f"s until ready after a {kind}, longest", max(seconds), f"≤ {stage.pick(15, 5)}")
    judge(outcome, tally, pools.services, lost="≥ 0")
    right, lost = (tally["ends"].get(end, 0) for end in (End.RIGHT, End.RESET))
    outcome.add("streams right for each that was reset", right / max(1, lost), stage.pick("", "≥ 1"))
    outcome.add("reset with their gateway", reset["gateway"])
    outcome.add("reset with their relay", reset["relay"])
    outcome.add("streams that killed relays carried", carried)
    outcome.add("turned away, since the killed relay had been asked and may have served them", unanswered)
    outcome.add("reset when the store died", reset["store"], "= 0")
    outcome.add("reset or turned away at a death that was not their relay's", needless, "= 0")
    outcome.add("MiB compared", tally["bytes_right"] / MIB)


class AccessLines:
    """The gateway's access log, read on from where it was read last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0

    def skip(self) -> None:
        """Leave out what is there."""
        self._read_bytes = self.path.stat().st_size

    def lost_with(self, relay: str) -> list[str]:
        """How clients of `desk` have ended that this relay had, or had been asked for, those left out that ended well."""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            lines = [json.loads(line) for line in file]
            self._read_bytes = file.tell()
        return [line["end"] for line in lines if (line["relay"], line["service"]) == (relay, "desk") and line["end"] != "closed"]


def ends_of(load: Load) -> Counter[str]:
    """How streams have ended so far."""
    return Counter(load.ask()["ends"])


KILLS = Fault(
    "kills",
    "gateway, relays and store killed in turn under load: ready in 5 s; right bytes or RST, never a clean end; others lose nothing",
    kills,
)
