"""System: exclusive nodes: one user at a time, by every path, while relays and stores come and go."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.cluster import NAME_BYTES, Cluster, MakeCluster
from tests.system.peers import read_exactly
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
        client = socket.create_connection(("127.0.0.1", port), timeout_s, source_address=(self.address, 0))
        try:
            return client, read_exactly(client, NAME_BYTES).decode().strip()
        except (ConnectionResetError, AssertionError, EOFError):
            client.close()
            return client, ""

    def where(self) -> str:
        """Where a short visit leads."""
        client, name = self.login()
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
    wait_until(lambda: dan.where() != "", 10, "a node free again")
