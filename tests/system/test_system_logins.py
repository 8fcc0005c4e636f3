"""System: reserved nodes of HTTP services, where the application on the nodes says who has logged in."""

import http.client
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxtunnel.kit.certificates import new_authority
from tests.cluster_store.store_rig import NEEDS_REDIS, PASSWORD, RedisServer, broker_content, write_broker
from tests.system.cluster import Cluster
from tests.system.login_nodes import Browser, LoginNode, public_pem
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]

FAST = "publish_s = 0.5\nstale_s = 6\ndown_s = 12\nresync_s = 1\nlease_s = 2"
FORM = '[service.login]\npreset = "form"\nsuccess_status = [302]\nsuccess_cookie = "session"\nretry = "replay"\n'
FASTX = '[service.login]\npreset = "fastx3"\njwt = {keys = "jwt.pem"}\n'


class Site:
    """A cluster with the application on its nodes; only the first node has a tunnel."""

    def __init__(self, stack: Stack, store: str) -> None:
        self.cluster = Cluster(stack, f"{store}\n{FAST}", service="site")
        self.nodes: dict[str, LoginNode] = {}

    def start(self, count: int, login: str, service: str = "") -> list[str]:
        for number in range(2, 2 + count):
            name = f"node-{number}"
            self.nodes[name] = LoginNode(f"127.0.0.{number}", self.cluster.port, name)
            home = self.cluster.stack.directory / name
            home.mkdir(mode=0o700, exist_ok=True)
            (home / "jwt.pem").write_bytes(public_pem())
            text = f'protocol = "http"\nreservations = true\n{service}\n{login}'
            self.cluster.node(number, gateway=number == 2, service=text, serve=False)
        self.wait_until_known()
        wait_until(lambda: self.is_settled(login), 30, "the first login")
        return list(self.nodes)

    def wait_until_known(self) -> None:
        """Until the relay with the tunnel has all nodes up."""
        wait_until(lambda: self.status()["cluster"]["nodes"].get("up") == len(self.nodes), 30, "the nodes")

    def status(self) -> dict:
        """Of the relay with the tunnel."""
        return self.cluster.status("node-2")

    def is_settled(self, login: str) -> bool:
        """A store that is new gives nothing out for one lease."""
        scout = self.browser(99, "scout")
        if FASTX[:30] in login:
            told = scout.log_in()
            return told.status == 200 and scout.ask("POST", "/v3/api/auth/logout").status == 200 and self.is_free()
        told = scout.log_in_by_form()
        return told.status == 302 and scout.ask("POST", "/logout").status == 200 and self.is_free()

    def is_free(self) -> bool:
        wait_until(lambda: not self.status()["reservations"]["servers"], 20, "nobody has a node")
        return True

    def browser(self, number: int, user: str = "") -> Browser:
        return Browser(self.cluster.stack.doors["site"], number, user)

    def reserved(self) -> dict[str, str]:
        return {line["serverId"]: line["user"] for line in self.cluster.reservations("node-2") if line["user"]}

    def logins_sent(self, user: str) -> int:
        """Requests of logins of this user that any node has seen."""
        return sum(node.asked.count(("/login", user)) for node in self.nodes.values())

    def entries(self) -> int:
        return sum(line["entries"] for line in self.cluster.reservations("node-2"))

    def switch(self, command: str, *flags: str) -> None:
        """`fxrelay disable|enable node-3`, until the relay with the tunnel has heard it."""
        self.cluster.stack.relay_cli("node-2", command, "node-3", *flags)
        expected = [flag.removeprefix("--") for flag in flags]
        wait_until(lambda: self.status()["cluster"]["switched_off"].get("node-3", []) == expected, 20, f"{command} heard")

    def log(self) -> str:
        return (self.cluster.stack.directory / "node-2.log").read_text()

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()
        self.cluster.close()


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(make_stack: Callable[..., Stack], home: Path) -> Iterator[MakeSite]:
    made: list[Site] = []

    def make(store: str = "") -> Site:
        stack = make_stack("site")
        stack.start_gateway()
        made.append(Site(stack, store or f'store = "sqlite:{home / "cluster.db"}"'))
        return made[-1]

    yield make
    for site in made:
        site.close()


def test_every_user_has_a_node_alone_by_a_form(make_site: MakeSite) -> None:
    site = make_site()
    names = site.start(3, FORM)
    users = [site.browser(number) for number in range(1, 5)]
    assert users[0].log_in_by_form("nonsense").status == 200
    assert site.reserved() == {}
    for user in users[:3]:
        assert user.log_in_by_form().status == 302
    held = site.reserved()
    assert sorted(held) == names
    for user in users[:3]:
        assert held[user.where()] == user.user
    late = users[3].log_in_by_form()
    assert (late.status, late.error) == (503, "NoServerAvailable")
    assert late.fields["Retry-After"] is not None
    own = held_by(site, users[0].user)
    again = site.browser(1)  # another browser of the same user
    assert again.log_in_by_form().status == 302
    assert again.where() == own
    assert users[0].ask("POST", "/logout").status == 200
    assert "fxlogin" not in users[0].cookies
    assert site.reserved()[own] == again.user
    assert again.ask("POST", "/logout").status == 200
    wait_until(lambda: site.status()["reservations"]["servers"] == 2, 20, "the logout")
    assert users[3].log_in_by_form().status == 302
    assert users[3].where() == own
    wait_until(lambda: site.entries() == 0, 10, "no entries")
    events = [json.loads(line) for line in site.log().splitlines() if line.startswith("{")]
    told = [event["reservation"] for event in events if "reservation" in event]
    assert {"entered", "committed", "released"} <= set(told)


def test_a_users_connections_are_counted_once_he_has_logged_in(make_site: MakeSite) -> None:
    site = make_site()
    site.start(1, FORM, "limits = {per_user_streams = 1}")
    ann = site.browser(1, "ann")
    assert ann.log_in_by_form().status == 302
    fields = {"Cookie": "; ".join(f"{name}={value}" for name, value in ann.cookies.items())}
    first, second, stranger = (http.client.HTTPConnection("127.0.0.1", ann.port, timeout=30) for _ in range(3))
    try:
        for expected, connection in ((200, first), (429, second), (200, first)):
            connection.request("GET", "/whoami", headers=fields)
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (expected, True)
        stranger.request("GET", "/")  # nobody knows whose it is
        assert stranger.getresponse().status != 429
        first.close()
        third = site.browser(2, "ann")
        third.cookies = dict(ann.cookies)
        fourth = http.client.HTTPConnection("127.0.0.1", ann.port, timeout=30)

        def has_room() -> bool:
            fourth.request("GET", "/whoami", headers=fields)
            answer = fourth.getresponse()
            return bool(answer.read()) and answer.status == 200

        wait_until(has_room, 20, "room again")
        assert third.ask("GET", "/whoami").status == 429
        assert third.ask("POST", "/logout").status == 200, "who has too many may still log out"
        fourth.close()
    finally:
        for connection in (first, second, stranger):
            connection.close()


def held_by(site: Site, user: str) -> str:
    return next(name for name, holder in site.reserved().items() if holder == user)


def test_of_two_who_race_for_one_node_one_is_replayed_to_another(make_site: MakeSite) -> None:
    site = make_site()
    site.start(2, FORM, "queue = {max = 2, wait_s = 20}")  # relays may hear of node-3 a moment later than the loser looks for it
    ann, bob = site.browser(1, "ann"), site.browser(2, "bob")
    site.switch("disable", "--login")  # both can only go to node-2
    site.nodes["node-2"].hold = True
    answers: dict[str, int] = {}

    def come(user: Browser) -> None:
        answers[user.user] = user.log_in_by_form().status

    threads = [threading.Thread(target=come, args=(user,)) for user in (ann, bob)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len([path for path, user in site.nodes["node-2"].asked if user in ("ann", "bob")]) == 2, 20, "both logins")
    site.switch("enable")
    site.nodes["node-2"].go.set()
    for thread in threads:
        thread.join(30)
    assert answers == {"ann": 302, "bob": 302}
    assert {ann.where(), bob.where()} == {"node-2", "node-3"}
    assert sorted(site.reserved().values()) == ["ann", "bob"]


def test_a_login_of_several_requests_stays_at_its_server_and_its_token_counts(make_site: MakeSite) -> None:
    site = make_site()
    site.start(1, FASTX)
    node = site.nodes["node-2"]
    ann, bob = site.browser(1, "ann"), site.browser(2, "bob")
    begun = {user.user: user.stage(username=user.user).json()["result"]["authtoken"] for user in (ann, bob)}
    assert site.entries() == 2
    bob.cookies.clear()  # a program: what the login repeats is enough
    assert ann.finish(begun["ann"]).status == 200
    assert site.reserved() == {"node-2": "ann"}
    late = bob.finish(begun["bob"])
    assert (late.status, late.error) == (409, "Reserved")
    assert "bob" not in node.let_in
    assert bob.log_in().status == 503
    ann.cookies.clear()  # the token is enough
    assert ann.where() == "node-2"
    assert ann.ask("POST", "/v3/api/auth/logout").status == 200
    site.is_free()

    assert bob.log_in(daemon=True).status == 200  # a link daemon has nothing to do with all this
    assert site.reserved() == {}
    wait_until(lambda: site.entries() == 0, 10, "no entries")

    node.lifetime_s = 6  # the other login has to come within
    assert bob.log_in().status == 200
    assert ann.log_in().status == 503
    wait_until(lambda: ann.log_in().status == 200, 20, "the end of the token")
    assert bob.ask("GET", "/whoami").error == "LoginEnded"
    ann.ask("POST", "/v3/api/auth/logout")
    site.is_free()

    node.lifetime_s = 3_600
    strange = site.browser(50, "strange")  # a flood from one address keeps nobody else out
    statuses = [strange.stage(username=f"nobody{number}").status for number in range(12)]
    assert statuses.count(200) == 8
    assert statuses.count(429) == 4
    assert ann.log_in().status == 200
    assert site.reserved() == {"node-2": "ann"}


def test_logins_outlive_relays_and_end_with_their_servers(make_site: MakeSite) -> None:
    site = make_site()
    site.start(2, FASTX)
    stack = site.cluster.stack
    ann, bob = site.browser(1, "ann"), site.browser(2, "bob")
    assert ann.log_in().status == 200
    begun = bob.stage(username="bob").json()["result"]["authtoken"]
    stack.relays["node-2"].kill()
    stack.start_relay("node-2")
    stack.wait_for_relays("node-2")
    site.wait_until_known()
    assert bob.finish(begun).status == 200  # the browser knows where it was
    assert sorted(site.reserved().values()) == ["ann", "bob"]
    for user in (ann, bob):
        assert site.reserved()[user.where()] == user.user
    on_second = next(user for user in (ann, bob) if held_by(site, user.user) == "node-3")
    on_first = next(user for user in (ann, bob) if user is not on_second)
    stack.relays["node-3"].kill()
    assert "is free" in stack.relay_cli("node-2", "release", "node-2").stdout
    wait_until(lambda: on_first.ask("GET", "/whoami").status == 401, 20, "the end of the login")
    assert "fxlogin" not in on_first.cookies
    assert on_first.log_in().status == 200
    wait_until(lambda: site.status()["reservations"]["servers"] == 1, 40, "the death of the node")
    assert "node-3" not in site.reserved()
    assert "node-3 is down" in site.log()


def test_who_waits_is_told_his_place(make_site: MakeSite) -> None:
    site = make_site()
    site.start(1, FORM, "queue = {max = 1, wait_s = 20}")
    ann, bob, cid = (site.browser(number, user) for number, user in enumerate(("ann", "bob", "cid"), 1))
    assert ann.log_in_by_form().status == 302
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(bob.log_in_by_form(timeout_s=40).status))
    waiting.start()
    wait_until(lambda: site.status()["reservations"]["waiting"] == {"site": 1}, 10, "the line")
    told = cid.log_in_by_form()
    assert (told.status, told.fields["Fx-Queue-Position"]) == (503, "2")
    assert int(told.fields["Retry-After"]) > 0
    assert ann.ask("POST", "/logout").status == 200
    waiting.join(40)
    assert answers == [302]
    assert bob.where() == "node-2"


@NEEDS_REDIS
def test_without_the_store_nobody_is_let_in_and_nobody_is_thrown_out(make_site: MakeSite, home: Path) -> None:
    options = ("appendonly yes", "appendfsync always")
    server = RedisServer(home / "redis", new_authority("test"), f"requirepass {json.dumps(PASSWORD)}", 'save ""', *options)
    server.start()
    try:
        site = make_site(f'broker = "{write_broker(home, broker_content(server))}"')
        site.start(2, FORM)
        ann, bob = site.browser(1, "ann"), site.browser(2, "bob")
        assert ann.log_in_by_form().status == 302
        held = ann.where()
        server.kill()
        told = bob.log_in_by_form()
        assert (told.status, told.error) == (503, "ReservationsUnavailable")
        assert told.fields["Retry-After"] is not None
        assert site.logins_sent("bob") == 0, "a password left for a login that could not be granted"
        assert ann.where() == held
        assert bob.ask("GET", "/").status == 200  # pages without a login go on
        shutil.rmtree(home / "redis" / "appendonlydir")  # it comes back, and has forgotten who has what
        server.start()
        answers: list[str] = []

        def is_let_in() -> bool:
            told = bob.log_in_by_form()
            answers.append("" if told.status == 302 else told.error)
            assert bob.ask("GET", "/").status == 200
            return told.status == 302

        try:
            wait_until(is_let_in, 20, "the store")
        except AssertionError as exc:
            raise AssertionError(f"{answers[-3:]}: {site.log()[-4000:]}") from exc
        assert "ReservationsUnavailable" in answers
        assert "has forgotten who has which server" in site.log()
        assert site.logins_sent("bob") == 1
        assert bob.where() not in ("", held)
        assert ann.where() == held
    finally:
        server.kill()
