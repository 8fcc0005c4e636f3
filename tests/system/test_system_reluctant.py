"""System: two relays, one of them cut off from the store: who needs the store is served by the other one."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.cutter import Cutter
from fxtunnel.kit.certificates import new_authority
from tests.cluster_store.store_rig import NEEDS_REDIS, RedisServer, broker_content, plain, write_broker
from tests.system.cluster import Cluster
from tests.system.login_nodes import Browser, LoginNode
from tests.system.peers import dial
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster"), NEEDS_REDIS]

TIMES = "publish_s = 0.5\nstale_s = 6\ndown_s = 12\nresync_s = 1\nlease_s = 2"
LOGINS = (
    'protocol = "http"\nreservations = true\n'
    '[service.login]\npreset = "form"\nsuccess_status = [302]\nsuccess_cookie = "session"\nretry = "replay"\n'
)


class Site:
    """Two relays with an application with logins. Each reaches the Redis by a way of its own."""

    def __init__(self, stack: Stack, redis: RedisServer, home: Path) -> None:
        self.stack = stack
        self.cluster = Cluster(stack, "", service="site")
        self.paths: dict[str, Cutter] = {}
        self.nodes: list[LoginNode] = []
        for number in (2, 3):
            name, path = f"node-{number}", Cutter()
            path.start(redis.port)
            self.paths[name] = path
            self.nodes.append(LoginNode(f"127.0.0.{number}", self.cluster.port, name))
            directory = home / f"broker-{number}"
            directory.mkdir()
            broker = write_broker(directory, broker_content(redis) | {"port": path.port})
            self.cluster.settings = f'broker = "{broker}"\n{TIMES}'
            self.cluster.node(number, service=LOGINS, serve=False)
        self.cluster.wait_until_known(list(self.paths), list(self.paths))
        wait_until(lambda: self.login() == (302, ""), 30, "the first login")

    def login(self) -> tuple[int, str]:
        """A user's visit: the status of the login, and what it is called if it failed."""
        browser = Browser(self.stack.doors["site"], 1, "ann")
        told = browser.log_in_by_form()
        if told.status != 302:
            return told.status, told.error
        assert browser.ask("POST", "/logout").status == 200
        return told.status, ""

    def carrier(self) -> tuple[socket.socket, str]:
        """A connection that stays, and the relay that has it."""

        def streams() -> dict[str, int]:
            return {name: sum(link["streams"] for link in relay["links"]) for name, relay in self.stack.live_relays().items()}

        before = streams()
        client = dial(self.stack.doors["site"])
        wait_until(lambda: streams() != before, what="the stream in the gateway's status")
        after = streams()
        return client, next(name for name in after if after[name] > before[name])

    def gateway_says(self, text: str) -> None:
        log = self.stack.directory / "gateway.log"
        wait_until(lambda: text in log.read_text(), 30, text)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        for path in self.paths.values():
            path.close()
        self.cluster.close()


@pytest.fixture
def site(make_stack: Callable[..., Stack], home: Path) -> Iterator[Site]:
    redis = RedisServer(home / "redis", new_authority("test authority"), *plain())
    redis.start()
    stack = make_stack("site")
    stack.start_gateway()
    made = Site(stack, redis, home)
    yield made
    made.close()
    redis.kill()


def test_a_relay_without_its_store_is_asked_last(site: Site) -> None:
    first, idle = site.carrier()
    second, other = site.carrier()
    assert {idle, other} == {"node-2", "node-3"}
    first.close()
    with second:  # from now on `idle` has the fewest streams
        site.paths[idle].cut_off()
        site.gateway_says(f"relay {idle} is cut off from its store")
        for _ in range(5):
            assert site.login() == (302, "")
    site.stack.relays[other].kill()
    wait_until(lambda: site.login() == (503, "ReservationsUnavailable"), 60, "the relay without a store is better than none")
    site.paths[idle].thaw()
    site.gateway_says(f"relay {idle} has its store again")
    wait_until(lambda: site.login() == (302, ""), 30, "a login at the relay that has its store again")
