"""What the Redis user of the documentation may do, and what not."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import redis
from store_rig import NEEDS_REDIS, SYSTEM, RedisServer, plain, redis_client, wait_until
from test_store_redis_failures import answers, fails_soon

from fxrelay.cluster.ports import SERVERS, TOPICS
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_store import RedisStore
from fxtunnel.errors import StoreError

pytestmark = [*SYSTEM, NEEDS_REDIS]

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "CLUSTER.md"
MakeServer = Callable[..., RedisServer]
FORBIDDEN = (
    *("CONFIG GET requirepass", "CONFIG GET appendfsync", "CONFIG SET dir /tmp", "CONFIG REWRITE", "ACL LIST", "ACL GETUSER default"),
    *("MODULE LIST", "MODULE LOAD x.so", "DEBUG SLEEP 0", "FLUSHALL", "FLUSHDB", "SCRIPT FLUSH", "FUNCTION LIST", "KEYS *", "MONITOR"),
    *("CLIENT LIST", "CLIENT KILL TYPE normal", "CLIENT PAUSE 1", "REPLICAOF NO ONE", "SAVE", "SHUTDOWN", "SLOWLOG GET", "SWAPDB 0 1"),
)


@pytest.mark.parametrize("is_cluster", [False, True], ids=["server", "cluster"])
def test_the_access_list_of_the_documentation_is_enough(make_server: MakeServer, is_cluster: bool) -> None:
    text = DOCUMENTATION.read_text().replace("{fastx-cluster}", "{fx-test}")
    first, for_clusters = re.findall(r"^ {4}ACL SETUSER fxrelay (.+)$", text, re.MULTILINE)
    rules = first.replace(">PASSWORD", ">secret") + (f" {for_clusters}" if is_cluster else "")
    cluster = ("tls-cluster yes", "cluster-enabled yes", "cluster-require-full-coverage no") if is_cluster else ()
    open_to_all = ("enable-module-command yes", "enable-debug-command yes")  # so that only the user's rules stand in the way
    server = make_server(*plain(), *open_to_all, *cluster, f"user relay {rules}")
    client = partial(redis_client, server, username="relay", password="secret", cluster=is_cluster)
    if is_cluster:
        whole = redis_client(server)
        whole.ask(lambda redis: redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383))
        whole.close()
    store, transporter = RedisStore(client()), RedisTransporter(client())
    wait_until(lambda: answers(store))
    assert store.epoch()
    store.put(SERVERS, "n", "x")
    assert store.add("c", 1) == 1
    assert len(list(store.documents(SERVERS))) == 1
    store.delete(SERVERS, "n")
    subscription = transporter.subscribe(TOPICS)
    transporter.publish(SERVERS, "x")
    assert len(subscription.next_batch(20)) == 1
    other = RedisStore(client(namespace="other"))
    with fails_soon("no permissions"):
        other.put(SERVERS, "n", "x")
    plain_client = client(cluster=False)
    for command in FORBIDDEN:
        with fails_soon("no permissions"):
            plain_client.ask(lambda redis, command=command: redis.execute_command(*command.split()))
    with fails_soon("(?i)permission|can't run|not allowed"):
        plain_client.ask(lambda redis: redis.eval("return redis.call('CONFIG', 'GET', 'requirepass')", 0))
    for closed in (store, other, transporter, plain_client):
        closed.close()


@pytest.mark.parametrize(
    ("log", "said", "begin", "doubt"),
    [
        ("yes", "always", "kept-", "^$"),
        ("yes", "everysec", "run-", "has appendfsync everysec"),
        ("yes", "", "run-", "may not be asked .* broker.json"),
        ("no", "always", "run-", 'keeps no append-only file, though broker.json says "appendfsync": "always"'),
        ("no", "", "run-", "keeps no append-only file: when it restarts"),
    ],
)
def test_a_user_who_may_not_ask_is_told_by_the_broker_file(make_server: MakeServer, log: str, said: str, begin: str, doubt: str) -> None:
    (rules, _) = re.findall(r"^ {4}ACL SETUSER fxrelay (.+)$", DOCUMENTATION.read_text().replace("fastx-cluster", "fx-test"), re.MULTILINE)
    server = make_server(f"appendonly {log}", "appendfsync always", f"user relay {rules.replace('>PASSWORD', '>secret')}")
    store = RedisStore(redis_client(server, username="relay", password="secret", appendfsync=said))
    assert store.epoch().startswith(begin)
    assert re.search(doubt, store.doubt)
    store.close()


def test_a_redis_that_does_not_answer_for_a_moment_has_not_forgotten(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server(*plain(), "appendonly yes", "appendfsync always")
    store = RedisStore(redis_client(server))
    kept = store.epoch()
    assert kept.startswith("kept-")

    def hang(*_: object) -> None:
        raise redis.TimeoutError("Timeout reading from socket")

    with monkeypatch.context() as patch:
        patch.setattr(redis.Redis, "config_get", hang)
        with pytest.raises(StoreError, match=r"answer|time"):
            store.epoch()
    assert (store.epoch(), store.doubt) == (kept, "")
    store.close()


def test_a_redis_that_may_be_asked_is_believed(make_server: MakeServer) -> None:
    server = make_server(*plain(), "appendonly yes", "appendfsync everysec")
    store = RedisStore(redis_client(server))
    assert store.epoch().startswith("run-")
    assert "has appendfsync everysec" in store.doubt
    asked = redis_client(server)
    asked.ask(lambda redis: redis.config_set("appendfsync", "always"))
    assert store.epoch().startswith("kept-")
    assert store.doubt == ""
    asked.ask(lambda redis: redis.config_set("appendonly", "no"))
    assert store.epoch().startswith("run-")
    assert "keeps no append-only file: " in store.doubt
    for closed in (store, asked):
        closed.close()
