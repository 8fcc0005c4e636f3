"""System: relays whose store goes away. They go on with what they knew, say so, and catch up when it is back."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxtunnel.kit.certificates import new_authority
from tests.cluster_store.store_rig import NEEDS_REDIS, RedisServer, broker_content, plain, write_broker
from tests.system.cluster import Cluster
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster"), NEEDS_REDIS]

CATCHES_UP_S = 5.0
"""See `slowness`."""


@pytest.fixture
def redis(home: Path) -> Iterator[RedisServer]:
    server = RedisServer(home / "redis", new_authority("test authority"), *plain())
    server.start()
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


@pytest.fixture
def cluster(make_stack: Callable[..., Stack], redis: RedisServer) -> Iterator[Cluster]:
    """Two nodes with tunnels and one that only reports, on a Redis with TLS and a password."""
    broker = write_broker(redis.directory, broker_content(redis))
    stack = make_stack("desk")
    stack.start_gateway()
    cluster = Cluster(stack, f'broker = "{broker}"\npublish_s = 0.5\nstale_s = 5\ndown_s = 10\nresync_s = 1')
    names = [cluster.node(2), cluster.node(3), cluster.node(4, gateway=False)]
    cluster.wait_until_known(names, names[:2])
    yield cluster
    cluster.close()


def everyone_serves(cluster: Cluster) -> bool:
    clients, served = cluster.held(9)
    for client in clients:
        client.close()
    return set(served) == {"node-2", "node-3", "node-4"}


def down_s(cluster: Cluster) -> float:
    return cluster.status("node-2")["cluster"]["store_down_s"]


def test_a_store_that_is_killed_is_said_to_be_away_long_before_anything_is_to_be_written(
    make_stack: Callable[..., Stack], redis: RedisServer
) -> None:
    stack = make_stack("desk")
    broker = write_broker(redis.directory, broker_content(redis))
    cluster = Cluster(stack, f'broker = "{broker}"\npublish_s = 300\nstale_s = 900\ndown_s = 1800\nresync_s = 300')
    try:
        stack.start_gateway()
        name = cluster.node(2)
        # Its tunnel is told, and it reads the store once more when it listens; then nothing is to be done for minutes.
        cluster.wait_until_known([name], [name])
        wait_until(lambda: cluster.status(name)["cluster"]["live"] and bool(cluster.nodes(name)[name]["server"]["agent"]["tunnels"]), 20)
        assert down_s(cluster) == 0
        redis.kill()
        wait_until(lambda: down_s(cluster) > 0, 30, "the outage in status")
        assert "fxrelay_store_up 0" in cluster.metrics("node-2")
        redis.start()
        wait_until(lambda: down_s(cluster) == 0, 30, "its return")
    finally:
        cluster.close()


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_store_that_goes_away_and_comes_back(cluster: Cluster, redis: RedisServer, fault: str) -> None:
    assert everyone_serves(cluster)
    # What is heard last is what decisions go on with: it should not be the clients that have just left.
    cluster.wait_until_empty(["node-2", "node-3"])
    if fault == "kill":
        redis.kill()
    else:
        redis.signal(signal.SIGSTOP)
    wait_until(lambda: down_s(cluster) > 0, 20, "the outage in status")
    time.sleep(6)  # longer than a server needs to get stale
    assert everyone_serves(cluster)
    assert "fxrelay_store_up 0" in cluster.metrics("node-2")
    if fault == "kill":
        redis.start()
    else:
        redis.signal(signal.SIGCONT)
    began = time.monotonic()
    wait_until(lambda: down_s(cluster) == 0 and cluster.status("node-2")["cluster"]["nodes"]["up"] == 3, 60, "caught up")
    assert time.monotonic() - began < CATCHES_UP_S * slowness()
    wait_until(lambda: len(cluster.nodes("node-2")) == 3, 15, "all of them in the store, which may have forgotten them")
    cluster.stack.relay_cli("node-2", "drain", "node-4")
    wait_until(lambda: "node-4" not in {cluster.who_serves() for _ in range(6)}, 20, "the drain heard")
