"""The same store behind Sentinels and in a Redis Cluster of one node."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from store_rig import NEEDS_REDIS, PASSWORD, SYSTEM, RedisServer, plain, redis_client, wait_until

from fxrelay.cluster.ports import SERVERS, TOPICS
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_store import RedisStore
from fxtunnel.errors import FxError, StoreError
from tests.ports import free_port

pytestmark = [*SYSTEM, NEEDS_REDIS]

MakeServer = Callable[..., RedisServer]
REPLICATION = ("tls-replication yes", f'masterauth "{PASSWORD.replace(chr(34), chr(92) + chr(34))}"', "repl-diskless-sync-delay 0")


def check_everything(make_client: Callable[[], RedisClient]) -> None:
    """The main path of both ports."""
    store, transporter = RedisStore(make_client()), RedisTransporter(make_client())
    subscription = transporter.subscribe(TOPICS)
    clock = store.put(SERVERS, "n", "x")
    assert store.now_ms() >= clock
    found = store.get(SERVERS, "n")
    assert found is not None
    assert list(store.documents(SERVERS)) == [found]
    before = store.add("c", 2)
    assert store.add("c", 3) == before + 3
    assert store.epoch() == store.epoch()
    transporter.publish(SERVERS, "said")
    assert [message.text for message in subscription.next_batch(20)] == ["said"]
    store.delete(SERVERS, "n")
    assert list(store.documents(SERVERS)) == []
    transporter.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.now_ms()


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except FxError:
        return False
    return True


def test_a_redis_behind_sentinels_and_its_failover(make_server: MakeServer) -> None:
    master = make_server(*plain(), *REPLICATION)
    replica = make_server(*plain(), *REPLICATION, f"replicaof 127.0.0.1 {master.port}")
    sentinel = make_server(
        "tls-replication yes",
        'requirepass "watcher"',
        f"sentinel monitor store 127.0.0.1 {master.port} 1",
        f'sentinel auth-pass store "{PASSWORD.replace(chr(34), chr(92) + chr(34))}"',
        "sentinel down-after-milliseconds store 4000",
        "sentinel failover-timeout store 3000",
        flags=("--sentinel",),
    )

    def client() -> RedisClient:
        return redis_client(
            sentinel,
            host="",
            sentinels=[{"host": "127.0.0.1", "port": free_port()}, {"host": "127.0.0.1", "port": sentinel.port}],
            sentinelName="store",
            sentinelPassword="watcher",
        )

    watched = RedisStore(client())
    wait_until(lambda: works(watched.now_ms))
    check_everything(client)
    epoch = watched.epoch()
    watched.put(SERVERS, "n", "x")
    direct = RedisStore(redis_client(replica))
    wait_until(lambda: direct.get(SERVERS, "n") is not None)
    watcher = redis_client(sentinel, password="watcher")
    wait_until(lambda: len(watcher.ask(lambda redis: redis.sentinel_slaves("store"))) == 1)
    master.kill()
    wait_until(lambda: works(lambda: watched.put(SERVERS, "n", "after the failover")), 60)
    found = direct.get(SERVERS, "n")
    assert found is not None
    assert found.text == "after the failover"
    assert watched.epoch() != epoch
    check_everything(client)
    for closed in (watched, direct, watcher):
        closed.close()


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="redis-cli is not installed")
def test_a_redis_cluster_of_one_node(make_server: MakeServer) -> None:
    server = make_server(*plain(), "tls-cluster yes", "cluster-enabled yes", "cluster-require-full-coverage no")
    lonely = RedisStore(redis_client(server))
    with pytest.raises(StoreError):
        lonely.put(SERVERS, "n", "x")
    lonely.close()
    command = ("--no-auth-warning", "-a", PASSWORD, "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
    subprocess.run(
        ["redis-cli", "--tls", "--cacert", server.directory / "ca.pem", "-p", str(server.port), *command],
        check=True,
        stdout=subprocess.DEVNULL,
    )

    def client() -> RedisClient:
        return redis_client(server, cluster=True)

    store = RedisStore(client())
    wait_until(lambda: works(lambda: store.put(SERVERS, "first", "x")))
    store.delete(SERVERS, "first")
    check_everything(client)
    server.signal(signal.SIGSTOP)
    for fresh in (store, RedisStore(client())):
        began = time.monotonic()
        with pytest.raises(StoreError):
            fresh.now_ms()
        assert time.monotonic() - began < 15
    fresh.close()
    server.signal(signal.SIGCONT)
    server.kill()
    with pytest.raises(StoreError):
        store.now_ms()
    server.start()
    wait_until(lambda: works(lambda: store.put(SERVERS, "n", "x")))
    store.close()
