"""System: exclusive nodes: one user at a time, by every path, while relays and stores come and go."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxtunnel.kit.certificates import new_authority
from tests.cluster_store.store_rig import NEEDS_REDIS, PASSWORD, RedisServer, broker_content, write_broker
from tests.system.cluster import NAME_BYTES, Cluster, MakeCluster
from tests.system.peers import how_it_ends, read_exactly
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]

FAST = "publish_s = 0.5\nstale_s = 5\ndown_s = 10\nresync_s = 1\nlease_s = 2"
RESERVED = "reservations = true"


@pytest.fixture
def make_cluster(make_stack: Callable[..., Stack], home: Path) -> Iterator[MakeCluster]:
    """`make_cluster(settings="")`: a gateway that runs, and no node yet. The store is one SQLite file."""
    made: list[Cluster] = []

    def make(settings: str = "") -> Cluster:
        stack = make_stack("desk")
        stack.start_gateway()
        made.append(Cluster(stack, f'store = "sqlite:{home / "cluster.db"}"\n{FAST}\n{settings}'))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


class User:
    """A client with an address of its own."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.address = f"127.0.1.{number}"

    def login(self, timeout_s: float = 10) -> tuple[socket.socket, str]:
        """Its connection and the node that serves it; an empty name if it was turned away."""
        port = self.cluster.stack.doors[self.cluster.service]
        client = socket.socket()
        client.settimeout(timeout_s)
        client.bind((self.address, 0))
        try:
            client.connect(("127.0.0.1", port))
            return client, read_exactly(client, NAME_BYTES).decode().strip()
        except (ConnectionResetError, AssertionError, EOFError):
            client.close()
            return client, ""
        except BaseException:
            client.close()
            raise

    def where(self, timeout_s: float = 20) -> str:
        """Where a short visit leads."""
        client, name = self.login(timeout_s)
        client.close()
        return name


def wait_until_settled(cluster: Cluster, user: User) -> None:
    """A store that is new gives nothing out for one lease."""
    wait_until(lambda: user.where() != "", 20, "the first login")


def test_every_user_has_a_node_alone_by_every_path(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2, service=RESERVED), cluster.node(3, service=RESERVED), cluster.node(4, gateway=False, service=RESERVED)]
    cluster.wait_until_known(names, names[:2])
    ann, bob, cid, dan = (User(cluster, number) for number in range(1, 5))
    wait_until_settled(cluster, ann)
    with contextlib.ExitStack() as stack:
        served = {}
        for user in (ann, bob, cid):
            client, name = user.login()
            stack.enter_context(client)
            served[user.address] = name
        assert sorted(served.values()) == names
        assert dan.where() == ""
        for user in (ann, bob, cid):  # a second login comes to the node that is theirs
            assert user.where() == served[user.address]
        listed = {line["serverId"]: line["user"] for line in cluster.reservations("node-2")}
        assert listed == {name: address for address, name in served.items()}
        explained = cluster.stack.relay_cli("node-2", "pick", "desk", "--explain", "--user", dan.address, check=False)
        assert explained.stdout.count(": reserved") == 3
    wait_until(lambda: dan.where() != "", 20, "a node free again")


def reserved_for(cluster: Cluster, node: str) -> dict[str, str]:
    return {line["serverId"]: line["user"] for line in cluster.reservations(node) if line["user"]}


def test_a_node_lingers_with_its_user_and_can_be_released(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2, service=f"{RESERVED}\nlinger_s = 3")]
    cluster.wait_until_known(names, names)
    ann, bob = User(cluster, 1), User(cluster, 2)
    wait_until_settled(cluster, bob)
    client, _ = bob.login()
    assert ann.where() == ""
    client.close()
    assert bob.where() == "node-2"
    began = time.monotonic()
    wait_until(lambda: ann.where() == "node-2", 20, "the end of the lingering")
    assert time.monotonic() - began > 2.5
    client, name = ann.login()
    assert name == "node-2"
    assert bob.where() == ""
    said = cluster.stack.relay_cli("node-2", "release", "node-2").stdout
    assert f"reserved for {ann.address}" in said
    assert how_it_ends(client, 10)[0] == "reset"
    client.close()
    wait_until(lambda: bob.where() == "node-2", 20, "the next user")

    def told() -> set[str]:
        lines = (cluster.stack.directory / "node-2.log").read_text().splitlines()
        return {event["reservation"] for event in map(json.loads, lines) if "reservation" in event}

    wait_until(lambda: {"entered", "committed", "released", "lost"} <= told(), what="all of it in the log")
    refused = cluster.stack.relay_cli("node-2", "release", "nobody", check=False)
    assert refused.returncode == 1
    assert "node-2" in refused.stderr


def test_who_waits_gets_the_node_when_it_is_free_in_order(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2, service=f"{RESERVED}\nqueue = {{max = 2, wait_s = 30}}")]
    cluster.wait_until_known(names, names)
    ann, bob, cid, dan = (User(cluster, number) for number in range(1, 5))
    wait_until_settled(cluster, ann)
    client, _ = ann.login()
    order: list[str] = []

    def come(user: User) -> None:
        visitor, name = user.login(30)
        order.append(user.address if name else "nobody")
        visitor.close()

    waiting = []
    for number, user in enumerate((bob, cid), 1):
        waiting.append(threading.Thread(target=come, args=(user,)))
        waiting[-1].start()
        wait_until(lambda: cluster.status("node-2")["reservations"]["waiting"] == {"desk": number}, 10, "the line")  # noqa: B023 - over before the next one
    assert dan.where() == ""  # the line is full
    time.sleep(7.0)  # longer than a gateway waits for an answer, together with what came before
    client.close()
    for thread in waiting:
        thread.join(30)
    assert order == [bob.address, cid.address]


def test_a_node_says_itself_that_it_is_for_one_user(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    login = 'action = "user/login"'
    names = [
        cluster.node(2, service=f'{login}\nnodes = ["node-3"]'),
        cluster.node(3, gateway=False, service=login, extra="\n[node]\nenable_reservations = true"),
    ]
    cluster.wait_until_known(names, names[:1])
    ann, bob = User(cluster, 1), User(cluster, 2)
    wait_until_settled(cluster, ann)
    client, name = ann.login()
    assert name == "node-3"
    assert bob.where() == ""
    client.close()
    wait_until(lambda: bob.where() == "node-3", 20, "the next user")


def test_sessions_keep_a_node_for_their_user_through_a_restart_of_its_relay(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.settings = cluster.settings.replace("down_s = 10", "down_s = 90").replace("lease_s = 2", "lease_s = 8")
    sessions = {name: cluster.stack.directory / f"{name}.json" for name in ("node-2", "node-3")}
    for number, path in zip((2, 3), sessions.values(), strict=True):
        path.write_text("[]")
        script = path.with_suffix(".sh")
        script.write_text(f"#!/bin/sh\ncat {path}\n")
        script.chmod(0o700)
        cluster.node(number, service=f"{RESERVED}\nhold_while_sessions = true", extra=f'[node]\nsessions = "exec:{script}"')
    cluster.wait_until_known(list(sessions), list(sessions))
    ann, bob, carol = User(cluster, 1), User(cluster, 2), User(cluster, 3)
    wait_until(lambda: ann.where() != "", 40, "the first login")
    cluster.wait_until_empty(list(sessions))
    client, hers = ann.login()
    sessions[hers].write_text(f'[{{"owner": "{ann.address}"}}]')  # at the last moment: no update has it yet
    client.close()
    (other,) = sessions.keys() - {hers}
    wait_until(lambda: any(row["logins"] == 0 for row in cluster.reservations(other)), 20, "only her session keeps the node")
    cluster.stack.relays[hers].kill()
    cluster.stack.start_relay(hers)
    cluster.wait_until_known(list(sessions), list(sessions))
    kept, his = bob.login()
    with kept:
        assert his == other
        time.sleep(9)  # more than a lease
        assert carol.where() == ""
        assert ann.where() == hers
        sessions[hers].write_text("[]")
        wait_until(lambda: carol.where() == hers, 40, "a node without sessions is free")


def test_a_killed_relay_frees_its_node(make_cluster: MakeCluster) -> None:
    """The reservation ends with the lease of the relay that held it; the user of another relay gets the node."""
    cluster = make_cluster()
    pool = f'{RESERVED}\nnodes = ["node-4"]'
    names = [cluster.node(2, service=pool), cluster.node(3, service=pool), cluster.node(4, gateway=False, service=pool)]
    cluster.wait_until_known(names, names[:2])
    ann, bob = User(cluster, 1), User(cluster, 2)
    wait_until_settled(cluster, ann)
    client, name = ann.login()
    assert name == "node-4"
    holder = next(relay for relay in names[:2] if cluster.status(relay)["reservations"]["held"])
    cluster.stack.relays[holder].kill()
    client.close()
    # The gateway may ask the dead relay first, and give it its ten seconds.
    wait_until(lambda: bob.where(40) == "node-4", 60, "the next user")


@NEEDS_REDIS
@pytest.mark.parametrize("durable", [True, False], ids=["AOF", "no AOF"])
def test_a_redis_that_is_killed_gives_nobody_a_node_that_is_held(make_stack: Callable[..., Stack], home: Path, durable: bool) -> None:
    options = ("appendonly yes", "appendfsync always") if durable else ("appendonly no",)
    server = RedisServer(home / "redis", new_authority("test"), f"requirepass {json.dumps(PASSWORD)}", 'save ""', *options)
    server.start()
    stack = make_stack("desk")
    stack.start_gateway()
    broker = write_broker(home, broker_content(server))
    cluster = Cluster(stack, f'broker = "{broker}"\n{FAST}')
    try:
        names = [cluster.node(2, service=RESERVED), cluster.node(3, gateway=False, service=RESERVED)]
        cluster.wait_until_known(names, names[:1])
        ann, bob = User(cluster, 1), User(cluster, 2)
        wait_until_settled(cluster, ann)
        client, held = ann.login()
        before = cluster.reservations("node-2")[0]
        doubts = [problem for problem in cluster.status("node-2")["cluster"]["problems"] if "append-only file" in problem]
        assert bool(doubts) is not durable
        told = (stack.directory / "node-2.log").read_text()
        assert told.count("keeps no append-only file") == len(doubts)
        server.kill()
        assert bob.where() == ""
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"
        wait_until(lambda: "store does not answer" in (stack.directory / "node-2.log").read_text(), what="the outage in the log")
        server.start()
        # Ann is there all the time; whatever the store remembers, nobody else gets the node.
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert bob.where() != held
        wait_until(lambda: bob.where() != "", 20, "the node that nobody has")
        wait_until(lambda: reserved_for(cluster, "node-2").get(held) == ann.address, what="her node in the store")
        after = next(line for line in cluster.reservations("node-2") if line["serverId"] == held)
        assert (after["storeEpoch"] == before["storeEpoch"]) is durable
        if durable:
            assert "reservation re-asserted" not in (stack.directory / "node-2.log").read_text()
        else:
            wait_until(lambda: "reservation re-asserted" in (stack.directory / "node-2.log").read_text(), what="that in the log")
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"
        client.close()
        wait_until(lambda: held not in reserved_for(cluster, "node-2"), 15, "the logout")
    finally:
        server.kill()
        cluster.close()
