"""System: relays whose store is full, or on the other side of a partition. They go on with what they knew, say so, and catch up."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.cutter import Cutter
from fxtunnel.kit.certificates import new_authority
from tests.cluster_store.store_rig import NEEDS_REDIS, RedisServer, broker_content, plain, redis_client, write_broker
from tests.system.cluster import Cluster
from tests.system.small_disk import SmallDisk, can_mount
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]

CATCHES_UP_S = 8.0
"""What asking takes included. See `slowness`."""
STALE_S = 5
TIMES = f"publish_s = 0.5\nstale_s = {STALE_S}\ndown_s = {2 * STALE_S}\nresync_s = 1"
NODES = {"node-2", "node-3"}


class Faults:
    """Two nodes, and what is done to their store."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def start(self) -> None:
        names = [self.cluster.node(2), self.cluster.node(3, gateway=False)]
        self.cluster.wait_until_known(names, names[:1])
        assert self.who_serves() == NODES

    def who_serves(self) -> set[str]:
        # More than a node can seem to have too many: what decisions go on with may count some that have left.
        clients, served = self.cluster.held(24)
        for client in clients:
            client.close()
        return set(served)

    def outage(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        cluster = self.cluster
        # What is heard last is what decisions go on with: it should not be clients that have just left.
        cluster.wait_until_empty(["node-2"])
        begin()
        wait_until(lambda: self.down_s() > 0, 20, "the outage in status")
        time.sleep(STALE_S + 1)
        assert self.down_s() > 0
        assert self.who_serves() == NODES
        assert "fxrelay_store_up 0" in cluster.metrics("node-2")
        end()
        began = time.monotonic()
        wait_until(lambda: self.down_s() == 0 and cluster.status("node-2")["cluster"]["nodes"]["up"] == 2, 60, "caught up")
        assert time.monotonic() - began < CATCHES_UP_S * slowness()
        assert "fxrelay_store_up 1" in cluster.metrics("node-2")
        assert self.who_serves() == NODES

    def down_s(self) -> float:
        return self.cluster.status("node-2")["cluster"]["store_down_s"]


@pytest.fixture
def redis_faults(make_stack: Callable[..., Stack], home: Path) -> Iterator[tuple[Faults, RedisServer, Cutter]]:
    """On a Redis that is reached through something that can fall silent."""
    redis = RedisServer(home / "redis", new_authority("test authority"), *plain())
    redis.start()
    path = Cutter()
    path.start(redis.port)
    broker = write_broker(redis.directory, broker_content(redis) | {"port": path.port})
    stack = make_stack("desk")
    stack.start_gateway()
    cluster = Cluster(stack, f'broker = "{broker}"\n{TIMES}')
    faults = Faults(cluster)
    faults.start()
    yield faults, redis, path
    cluster.close()
    path.close()
    redis.signal(signal.SIGCONT)
    redis.kill()


@NEEDS_REDIS
def test_a_redis_that_is_full_or_cannot_be_reached(redis_faults: tuple[Faults, RedisServer, Cutter]) -> None:
    faults, redis, path = redis_faults

    def set_memory(limit: str) -> None:
        client = redis_client(redis)
        client.ask(lambda connection: connection.config_set("maxmemory-policy", "noeviction"))
        client.ask(lambda connection: connection.config_set("maxmemory", limit))
        client.close()

    faults.outage(lambda: set_memory("1"), lambda: set_memory("0"))

    faults.outage(path.cut_off, path.thaw)


@pytest.mark.skipif(not can_mount(), reason="no private mount namespaces here (unshare -Urm)")
def test_a_file_on_a_disk_that_is_full(make_stack: Callable[..., Stack], home: Path) -> None:
    disk = SmallDisk(home / "disk")
    try:
        stack = make_stack("desk")
        stack.start_gateway()
        stack.relay_prefix = disk.prefix
        cluster = Cluster(stack, f'store = "sqlite:{disk.directory}/cluster.db"\n{TIMES}')
        faults = Faults(cluster)
        try:
            faults.start()
            time.sleep(2)
            faults.outage(disk.fill, disk.free)
        finally:
            cluster.close()
    finally:
        disk.close()
