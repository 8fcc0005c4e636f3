"""System: who has a reserved node while his relay alone is cut off from the store, for longer than a lease (`on_lost_lease`)."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.cutter import Cutter
from fxtunnel.kit.certificates import new_authority
from tests.cluster_store.store_rig import NEEDS_REDIS, RedisServer, broker_content, plain, write_broker
from tests.system.cluster import NAME_BYTES, Cluster
from tests.system.peers import how_it_ends, read_exactly
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster"), NEEDS_REDIS]

LEASE_S = 2
TIMES = f"publish_s = 0.5\nstale_s = 20\ndown_s = 40\nresync_s = 1\nlease_s = {LEASE_S}"
NODE = "node-4"
ANN, BOB = "127.0.1.1", "127.0.1.2"


class Rig:
    """One reserved node, and two relays that lead to it. Each reaches the Redis by a way of its own."""

    def __init__(self, stack: Stack, redis: RedisServer, home: Path, on_lost_lease: str) -> None:
        self.stack = stack
        self.cluster = Cluster(stack, "")
        self.paths: dict[str, Cutter] = {}
        for number in (2, 3, 4):
            path = self.paths[f"node-{number}"] = Cutter()
            path.start(redis.port)
            directory = home / f"broker-{number}"
            directory.mkdir()
            broker = write_broker(directory, broker_content(redis) | {"port": path.port})
            self.cluster.settings = f'broker = "{broker}"\non_lost_lease = "{on_lost_lease}"\n{TIMES}'
            self.cluster.node(number, gateway=number != 4, service=f'reservations = true\nnodes = ["{NODE}"]')
        self.cluster.wait_until_known(list(self.paths), ["node-2", "node-3"])
        self.come(ANN).close()
        wait_until(lambda: not self.has_node(), what="nobody has the node")

    def come(self, address: str) -> socket.socket:
        """The user's connection, as soon as he gets the node."""
        found: list[socket.socket] = []

        def is_in() -> bool:
            client = socket.socket()
            client.settimeout(10)
            client.bind((address, 0))
            try:
                client.connect(("127.0.0.1", self.stack.doors["desk"]))
                name = read_exactly(client, NAME_BYTES).decode().strip()
            except (ConnectionResetError, AssertionError, EOFError):
                client.close()
                return False
            assert name == NODE
            found.append(client)
            return True

        wait_until(is_in, 40, f"the node for {address}")
        return found[0]

    def holders(self) -> list[str]:
        """The relays that have let somebody in."""
        return [name for name in ("node-2", "node-3") if self.cluster.status(name)["reservations"]["held"]]

    def has_node(self, relay: str = "node-2") -> str:
        """Whose the node is, as this relay reads it in the store; empty if nobody's."""
        return "".join(line["user"] for line in self.cluster.reservations(relay) if line["serverId"] == NODE)

    def told(self, relay: str, word: str) -> bool:
        """Whether the relay's log tells this of a login."""
        lines = (self.stack.directory / f"{relay}.log").read_text().splitlines()
        return any(event.get("reservation") == word for event in map(json.loads, lines))

    def cut_off(self, relay: str) -> None:
        """For longer than a lease, as the store counts it."""
        self.paths[relay].cut_off()
        (other,) = {"node-2", "node-3"} - {relay}
        wait_until(lambda: not self.has_node(other), 30, "the lease is over")

    def close(self) -> None:
        for path in self.paths.values():
            path.close()
        self.cluster.close()


def echoes(client: socket.socket, words: bytes) -> bool:
    client.sendall(words)
    return read_exactly(client, len(words)) == words


@pytest.fixture
def make_rig(make_stack: Callable[..., Stack], home: Path) -> Iterator[Callable[[str], Rig]]:
    redis = RedisServer(home / "redis", new_authority("test authority"), *plain())
    redis.start()
    made: list[Rig] = []

    def make(on_lost_lease: str) -> Rig:
        stack = make_stack("desk")
        stack.start_gateway()
        made.append(Rig(stack, redis, home, on_lost_lease))
        return made[-1]

    yield make
    for rig in made:
        rig.close()
    redis.kill()


def test_who_is_kept_stays_while_another_gets_the_node_and_goes_on_if_nobody_did(make_rig: Callable[[str], Rig]) -> None:
    rig = make_rig("keep")
    with rig.come(ANN) as ann:
        (holder,) = rig.holders()
        (other,) = {"node-2", "node-3"} - {holder}
        rig.cut_off(holder)
        assert echoes(ann, b"my lease is over")
        rig.paths[holder].thaw()
        wait_until(lambda: rig.has_node(other) == ANN, 30, "hers again, as nobody came")
        assert echoes(ann, b"as if nothing had been")
        assert not rig.told(holder, "lost")

        rig.cut_off(holder)
        with rig.come(BOB) as bob:
            assert rig.holders() == sorted([holder, other])
            assert rig.has_node(other) == BOB
            deadline = time.monotonic() + 2 * LEASE_S
            while time.monotonic() < deadline:  # both are there, and the store stays away from hers
                assert echoes(ann, b"still here")
                assert echoes(bob, b"here as well")
                time.sleep(0.05)
            assert not rig.told(holder, "lost")
            rig.paths[holder].thaw()
            assert how_it_ends(ann, 30)[0] == "reset"  # one user on one node again, and it is his
            wait_until(lambda: rig.told(holder, "lost"), what="her relay tells of it")
            assert rig.holders() == [other]
            assert echoes(bob, b"alone")
        wait_until(lambda: not rig.has_node(other), 30, "nobody has the node")


def test_who_is_not_kept_ends_and_another_gets_the_node(make_rig: Callable[[str], Rig]) -> None:
    rig = make_rig("end")
    with rig.come(ANN) as ann:
        (holder,) = rig.holders()
        rig.paths[holder].cut_off()
        with rig.come(BOB) as bob:
            assert how_it_ends(ann, 30)[0] == "reset"  # while the store is away
            wait_until(lambda: rig.told(holder, "lost"), what="her relay tells of it")
            assert echoes(bob, b"alone")
