"""System: two relays, one of them cut off from the store: who needs the store is served by the other one."""

import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.cutter import Cutter
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.files import write_secret
from tests.cluster_store.store_rig import NEEDS_REDIS, RedisServer, broker_content, plain, write_broker
from tests.ports import free_port
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
        key = home / "cookies.key"
        write_secret(key, secrets.token_hex(32).encode())
        for number in (2, 3):
            name, path = f"node-{number}", Cutter()
            path.start(redis.port)
            self.paths[name] = path
            self.nodes.append(LoginNode(f"127.0.0.{number}", self.cluster.port, name))
            directory = home / f"broker-{number}"
            directory.mkdir()
            broker = write_broker(directory, broker_content(redis) | {"port": path.port})
            self.cluster.settings = f'broker = "{broker}"\n{TIMES}'
            self.cluster.node(number, service=f'cookie_key = "{key}"\n{LOGINS}', serve=False)
        self.cluster.wait_until_known(list(self.paths), list(self.paths))
        wait_until(lambda: self.login() == (302, ""), 30, "the first login")

    def login(self, door: str = "site") -> tuple[int, str]:
        """A user's visit: the status of the login, and what it is called if it failed; 0 for a connection that was reset."""
        browser = Browser(self.stack.doors[door], 1, "ann")
        try:
            told = browser.log_in_by_form()
        except ConnectionResetError:
            return 0, "reset"
        if told.status != 302:
            return told.status, told.error
        ended = browser.ask("POST", "/logout").status
        return told.status, "" if ended == 200 else f"logout: {ended}"

    def carrier(self) -> tuple[socket.socket, str]:
        """A connection that stays, and the relay that has it."""
        before = {name: self.streams(name) for name in self.paths}
        client = dial(self.stack.doors["site"])

        def takers() -> list[str]:
            return [name for name in before if self.streams(name) > before[name]]

        wait_until(takers, what="the stream in the gateway's status")
        return client, takers()[0]

    def streams(self, relay: str) -> int:
        """Of this relay, as the gateway counts them."""
        return sum(link["streams"] for link in self.stack.live_relays()[relay]["links"])

    def gateway_says(self, text: str) -> None:
        wait_until(lambda: self.has_said(text), 30, text)

    def has_said(self, text: str) -> bool:
        return text in (self.stack.directory / "gateway.log").read_text()

    def idle_relay(self) -> tuple[socket.socket, str, str]:
        """A connection that stays, the relay with the fewest streams as long as it does, and the other one."""
        wait_until(lambda: not any(map(self.streams, self.paths)), what="no streams")
        first, idle = self.carrier()
        second, other = self.carrier()
        assert {idle, other} == {"node-2", "node-3"}
        first.close()
        return second, idle, other

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
    heard = free_port()
    stack = make_stack("site", extra=f'[[door]]\nlisten = "127.0.0.1:{heard}"\nkind = "http"\nservice = "site"\n')
    stack.doors["heard"] = heard
    stack.start_gateway()
    made = Site(stack, redis, home)
    yield made
    made.close()
    redis.kill()


def test_a_relay_without_its_store_is_asked_last(site: Site) -> None:
    client, idle, other = site.idle_relay()
    with client:
        site.paths[idle].cut_off()
        site.gateway_says(f"relay {idle} is cut off from its store")
        for _ in range(5):
            assert site.login() == (302, "")
    site.stack.relays[other].kill()
    wait_until(lambda: site.login() == (503, "ReservationsUnavailable"), 60, "the relay without a store is better than none")
    site.paths[idle].thaw()
    site.gateway_says(f"relay {idle} has its store again")
    wait_until(lambda: site.login() == (302, ""), 30, "a login at the relay that has its store again")


def test_a_login_that_finds_its_relay_without_the_store_is_served_by_the_other(site: Site) -> None:
    """From the first moment on, as nobody has noticed yet; through a door that hears who comes, so that the login goes with the OPEN."""
    client, idle, _ = site.idle_relay()
    with client:
        site.paths[idle].cut_off()
        log = site.stack.directory / f"{idle}.log"
        assert site.login("heard") == (302, "")
        assert "leaves a client to another relay" in log.read_text()
        while not site.has_said(f"relay {idle} is cut off from its store"):
            assert site.login("heard") == (302, "")
        assert site.login("heard") == (302, "")
