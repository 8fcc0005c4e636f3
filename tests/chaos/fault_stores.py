"""The nodes' store cannot be reached, or its disk is full: relays go on with what they knew, say so, and catch up."""

import time
from collections.abc import Callable, Sequence

from examples.cutter import Cutter
from tests.chaos.figures import Outcome
from tests.chaos.pool_stage import NODES, Nodes, a_redis
from tests.chaos.stage import MIB, Fault, Stage, Unplayable, judge
from tests.cluster_store.store_rig import broker_content, write_broker
from tests.system.peers import is_served
from tests.system.small_disk import SmallDisk, can_mount
from tests.system.stack import wait_until

STREAMS = 30
VISITS_PER_S = 5
TELLS_S = 10
CATCHES_UP_S = 5


def partition(stage: Stage, outcome: Outcome) -> None:
    """Both relays are cut off from a Redis that works, then one of them is."""
    redis = a_redis(stage)
    ways = {name: Cutter() for name in NODES}
    stores = {}
    for name, way in ways.items():
        way.start(redis.port)
        stage.later(way.close)
        stores[name] = f'broker = "{write_broker(redis.directory, broker_content(redis) | {"port": way.port}, f"{name}.json")}"'
    outage = Outage(stage, outcome, Nodes(stage, stores))
    for what, cut_off, share in (("both", NODES, 0.0), ("one of two", NODES[:1], 0.5)):
        outage.play(
            f"{what} cut off",
            cut_off,
            share,
            lambda cut_off=cut_off: [ways[name].cut_off() for name in cut_off],
            lambda cut_off=cut_off: [ways[name].thaw() for name in cut_off],
        )
    outage.finish()


def disk(stage: Stage, outcome: Outcome) -> None:
    """The nodes share a SQLite file, and its file system has no room left."""
    if not can_mount():
        raise Unplayable("no private mount namespaces here (unshare -Urm)")
    small = SmallDisk(stage.directory / "disk")
    stage.later(small.close)
    stores = dict.fromkeys(NODES, f'store = "sqlite:{small.directory}/cluster.db"')
    outage = Outage(stage, outcome, Nodes(stage, stores, relay_prefix=small.prefix))
    outage.play("disk full", NODES, 0.0, small.fill, small.free)
    outage.finish()


class Outage:
    """Load on a pool, and visitors, while the store is away longer than nodes are believed without news."""

    def __init__(self, stage: Stage, outcome: Outcome, nodes: Nodes) -> None:
        self._stage = stage
        self._outcome = outcome
        self._nodes = nodes
        self._load = nodes.load(STREAMS, MIB / 4)
        self._load.wait_running()

    def play(self, what: str, victims: Sequence[str], share: float, begin: Callable[[], object], end: Callable[[], object]) -> None:
        """From `begin` to `end`, and until it is as if nothing had been."""
        nodes, outcome, lasts_s = self._nodes, self._outcome, self._stage.pick(3.0, 20.0)
        self._stage.show(f"{what} for {lasts_s:g} s", share)
        began = time.monotonic()
        begin()
        wait_until(lambda: all(self._down_s(name) > 0 for name in victims), 30, "the outage in status")
        outcome.add(f"{what}: s until status says so", time.monotonic() - began, f"≤ {TELLS_S}")
        visits = served = 0
        while time.monotonic() - began < lasts_s:
            visits += 1
            served += is_served(nodes.echo)
            time.sleep(1 / VISITS_PER_S)
        outcome.add(f"{what}: new clients served of {visits}", served, f"= {visits}")
        metrics = [f"fxrelay_store_up {int(name not in victims)}" in nodes.cluster.metrics(name) for name in NODES]
        assert all(metrics), f"{what}: metrics do not say whose store is away: {metrics}"
        end()
        began = time.monotonic()
        wait_until(lambda: not any(self._down_s(name) for name in NODES) and nodes.is_ready(), 60, "caught up")
        outcome.add(f"{what}: s until caught up", time.monotonic() - began, f"≤ {CATCHES_UP_S}")
        nodes.cluster.wait_until_known(NODES, NODES)

    def finish(self) -> None:
        """Nothing may have been lost."""
        judge(self._outcome, self._load.finish(), self._nodes.services)

    def _down_s(self, name: str) -> float:
        return self._nodes.cluster.status(name)["cluster"]["store_down_s"]


PARTITION = Fault("partition", "relays cut off from their store, all or one: nothing lost, new clients served, caught up in 5 s", partition)
DISK = Fault("disk", "the disk of the nodes' SQLite file full: nothing lost, new clients served, caught up in 5 s", disk)
