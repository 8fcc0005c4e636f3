"""Tickets at real daemons: `fxrelay ticket mint`, `fxgateway connect --ticket` and sshd; two relays that share what they remember."""

import http.client
import itertools
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fxrelay.admitting.ticket import UnsignedTicket, mint_ticket
from fxtunnel.kit.signed_claims import Algorithm, signing_key
from fxtunnel.model import ServiceName
from tests.ports import free_port
from tests.system.conftest import MakeStack
from tests.system.peers import Service, dial, echo, read_exactly
from tests.system.servers import Ssh, need, nginx_server, program, ssh_server
from tests.system.stack import Stack, cli, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("tickets")]

OWNER = """
def may(question):
    if question["user"] == "eve":
        return {"allow": False, "reason": "eve has left"}
    return question["node"] in ("node-a", "node-b")
"""

SCRIPT = """#!/bin/sh
case "$(cat)" in *'"user": "eve"'*) echo deny: eve has gone;; *) echo allow;; esac
"""


@dataclass(frozen=True, slots=True)
class Site:
    """One door that speaks HTTP, and relays behind it whose services want tickets."""

    stack: Stack
    port: int
    ssh: Ssh
    key: Path

    def ticket(self, sub: str, service: str, node: str = "") -> str:
        """As a portal makes one."""
        key = load_pem_private_key(self.key.read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        return mint_ticket(
            UnsignedTicket(sub, ServiceName(service), node), key, Algorithm.EDDSA, signing_key(key.public_key()).kid, time.time()
        )

    def minted(self, *words: str) -> str:
        """As the administrator makes one."""
        return cli(["fxrelay.cli", "ticket", "mint", "--key", str(self.key), *words]).stdout.strip()

    def open(self, service: str, ticket: str, node: str = "", source: str = "127.0.0.1") -> tuple[int, str, socket.socket | None]:
        """Ask for a stream: the status, the page, and the stream if there is one."""
        sock = dial(self.port, source=source)
        shown = f"Authorization: Bearer {ticket}\r\n" if ticket else ""
        query = f"?node={node}" if node else ""
        sock.sendall(
            f"GET /.fx/stream/{service}{query} HTTP/1.1\r\nHost: gw\r\nAccept: application/json\r\n"
            f"Connection: Upgrade\r\nUpgrade: fx-stream\r\n{shown}\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += read_exactly(sock, 1)
        status = int(head.split()[1])
        if status == 101:
            return status, "", sock
        page = b""
        while block := sock.recv(65_536):
            page += block
        sock.close()
        return status, page.decode(), None

    def streams(self, relay: str, service: str) -> int:
        """How many this relay has of a service."""
        return next(line["streams"] for line in self.stack.relay_status(relay)["services"] if line["name"] == service)

    def status(self, service: str, ticket: str, node: str = "") -> int:
        """Only that."""
        status, _, sock = self.open(service, ticket, node)
        if sock is not None:
            sock.close()
        return status


@pytest.fixture(scope="module")
def site(make_shared_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need("sshd", "nginx")
    home = tmp_path_factory.mktemp("tickets")
    key, store, port = home / "tickets.key", home / "shared.db", free_port()
    cli(["fxrelay.cli", "ticket", "keygen", "--out", str(key)])
    with ssh_server(home / "ssh") as ssh, nginx_server(home / "web") as (web_port, files):
        (files / "page").write_text("inside")
        stack = make_shared_stack(
            extra=f'[[door]]\nlisten = "127.0.0.1:{port}"\nkind = "http"\nstreams = ["ssh", "desk", "mine", "open", "both"]\n'
            '[[route]]\nhost = "web.test"\nservice = "web"\n'
        )
        stack.start_gateway()
        service = Service(echo)
        service_port = service.target.rpartition(":")[2]
        for name in ("node-a", "node-b"):
            keys = f'ticket = {{keys = "{home}/tickets.pub"}}\n'
            extra = f'[cluster]\nlease_s = 2\nstore = "sqlite:{store}"\npaths = ["local", "redirect"]\n'
            extra += f'[[service]]\nname = "desk"\nhost = "127.0.0.1"\nport = {service.target.rpartition(":")[2]}\n{keys}'
            extra += 'owner = "python:owners:may"\nlimits = {per_user_streams = 2}\n'
            extra += f'[[service]]\nname = "both"\ntarget = "{service.target}"\n{keys}'
            extra += f'[[service]]\nname = "mine"\nhost = "127.0.0.1"\nport = {service_port}\nreservations = true\n{keys}'
            if name == "node-a":
                extra += f'[[service]]\nname = "web"\nprotocol = "http"\ntarget = "127.0.0.1:{web_port}"\n{keys}owner = "exec:owner.sh"\n'
                extra += f'[[service]]\nname = "ssh"\ntarget = "127.0.0.1:{ssh.port}"\n{keys}'
                extra += f'[[service]]\nname = "open"\ntarget = "{service.target}"\nlimits = {{per_address_streams = 2}}\n'
            stack.write_relay_config(name, {}, extra)
            (stack.directory / name / "owners.py").write_text(OWNER)
            (script := stack.directory / name / "owner.sh").write_text(SCRIPT)
            script.chmod(0o700)
            stack.start_relay(name)
        stack.wait_for_relays("node-a", "node-b")
        yield Site(stack, port, ssh, key)
        service.close()


def run_ssh(site: Site, ticket: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "ticket").write_text(ticket + "\n")
    words = ["connect", "ssh", "--via", f"http://127.0.0.1:{site.port}", "--ticket", str(tmp_path / "ticket")]
    command = shlex.join([sys.executable, "-m", "fxgateway.cli", *words])
    ssh = [program("ssh"), "-o", f"ProxyCommand={command}", *site.ssh.options(1), site.ssh.login, "echo in"]
    return subprocess.run(ssh, capture_output=True, text=True, timeout=60, check=False)


def test_ssh_with_a_ticket_and_once_only(site: Site, tmp_path: Path) -> None:
    ticket = site.minted("--sub", "alice", "--service", "ssh", "--node", "node-a", "--groups", "staff,cad", "--ttl", "30")
    assert run_ssh(site, ticket, tmp_path).stdout == "in\n"
    again = run_ssh(site, ticket, tmp_path)
    assert again.returncode != 0
    assert "get a fresh one (trace " in again.stderr
    trace = re.search(r"\(trace ([0-9a-f]+)\)", again.stderr)
    assert trace is not None

    def line() -> dict[str, str]:
        found = [json.loads(text) for text in site.stack.relays["node-a"].log.read_text().splitlines() if trace[1] in text]
        return next((entry for entry in found if entry.get("refused")), {})

    wait_until(lambda: bool(line()), 10, "the refusal in the relay's log")
    assert (line()["why"], line()["user"], line()["refused"]) == ("used", "alice", "bad-ticket")
    assert ticket not in site.stack.logs()


@pytest.mark.parametrize(("service", "status"), [("ssh", 401), ("desk", 401), ("open", 101)])
def test_without_a_ticket(site: Site, service: str, status: int) -> None:
    assert site.status(service, "") == status


def test_a_ticket_for_something_else(site: Site) -> None:
    assert site.status("ssh", site.ticket("alice", "desk")) == 401
    assert site.status("ssh", "x" * 1_000) == 401
    assert site.status("ssh", "x" * 1_025) == 400
    assert site.status("ssh", site.ticket("alice", "ssh")) == 101


def test_a_node_in_the_ticket_binds(site: Site) -> None:
    visitors = (f"visitor{number}" for number in itertools.count())  # a relay may take a while to learn that somebody has left
    for node in ("node-a", "node-b"):
        wait_until(lambda: site.status("desk", site.ticket(next(visitors), "desk", node)) == 101, 30, f"{node} known")  # noqa: B023 - over before the next one
    assert site.status("desk", site.ticket(next(visitors), "desk", "node-a"), node="node-b") == 403
    # One of the two has to be asked first, and the stream has to come out at the other one.
    for node in ("node-a", "node-b") * 2:
        visitor = next(visitors)
        assert site.status("desk", site.ticket(visitor, "desk", node), node=node) == 101
        assert site.status("both", site.ticket(visitor, "both", node)) == 101


def test_what_one_relay_has_seen_the_other_one_knows(site: Site) -> None:
    wait_until(lambda: site.status("desk", site.ticket("alice", "desk")) == 101, 30, "nodes known")
    ticket = site.ticket("frank", "desk")
    assert [site.status("desk", ticket, node) for node in ("node-a", "node-b", "node-a")] == [101, 401, 401]
    tickets = [site.ticket("alice", "both") for _ in range(4)]
    assert [site.status("both", ticket) for ticket in tickets * 2] == [101] * 4 + [401] * 4


def test_the_owner_is_asked(site: Site) -> None:
    status, page, _ = site.open("desk", site.ticket("eve", "desk"))
    assert (status, json.loads(page)["error"]["name"]) == (403, "Forbidden")
    wait_until(lambda: "eve has left" in site.stack.logs(), 10, "the owner's reason in the log")


def test_a_user_has_two_streams(site: Site) -> None:
    wait_until(lambda: site.status("desk", site.ticket("alice", "desk"), "node-a") == 101, 30, "node-a known")
    streams = []
    for user, expected in (("carol", 101), ("carol", 101), ("carol", 429), ("dave", 101)):
        status, _, sock = site.open("desk", site.ticket(user, "desk"), "node-a")
        assert status == expected, user
        if sock is not None:
            streams.append(sock)
            sock.sendall(b"there")
            assert read_exactly(sock, 5) == b"there"
    streams.pop(0).close()
    wait_until(lambda: site.status("desk", site.ticket("carol", "desk"), "node-a") == 101, 20, "a place is free again")
    for sock in streams:
        sock.close()


def test_an_address_has_two_streams(site: Site) -> None:
    wait_until(lambda: site.streams("node-a", "open") == 0, what="those who came before gone")
    streams = [site.open("open", "")[2] for _ in range(2)]
    assert site.status("open", "") == 429
    for sock in streams:
        assert sock is not None
        sock.close()
    wait_until(lambda: site.status("open", "") == 101, 20, "a place is free again")


def test_a_reserved_node_is_its_users_wherever_he_is(site: Site) -> None:
    """Two addresses of one user are one holder; two users behind one address are two."""

    def holders(relay: str = "node-a") -> dict[str, str]:
        found = json.loads(site.stack.relay_cli(relay, "reservations", "--json").stdout)
        return {line["serverId"]: line["user"] for line in found if line["user"]}

    def opened(user: str, source: str) -> socket.socket:
        found: list[socket.socket] = []

        def is_open() -> bool:
            status, _, sock = site.open("mine", site.ticket(user, "mine"), source=source)
            found.extend([sock] if sock is not None else [])
            return status == 101

        wait_until(is_open, 30, f"a node for {user}")
        return found[0]

    streams = [opened("alice", "127.0.0.1")]
    # Whichever relay gets the next one: until it has heard of the first, a free node is as good.
    wait_until(lambda: bool(holders()), what="her node in the store")
    (hers,) = holders()
    wait_until(lambda: all(site.stack.believed(relay, hers).get("user") for relay in site.stack.relays), what="all know who has it")
    streams.append(opened("alice", "127.0.0.2"))
    assert list(holders().values()) == ["alice"]
    streams.append(opened("bob", "127.0.0.1"))
    assert sorted(holders().values()) == ["alice", "bob"]
    assert site.status("mine", site.ticket("carol", "mine")) in (502, 503)
    for sock in streams:
        sock.close()
    wait_until(lambda: not holders(), 20, "the nodes are free")


def ask_web(site: Site, path: str, headers: dict[str, str]) -> tuple[int, str, str]:
    """Status, cookie and body."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    try:
        connection.request("GET", path, headers={"Host": "web.test", **headers})
        answer = connection.getresponse()
        return answer.status, (answer.getheader("Set-Cookie") or "").partition(";")[0], answer.read().decode()
    finally:
        connection.close()


def test_pages_for_a_ticket_and_then_for_its_pass(site: Site) -> None:
    assert ask_web(site, "/page", {})[0] == 401
    ticket = site.ticket("alice", "web")
    status, cookie, body = ask_web(site, f"/page?fx_ticket={ticket}", {})
    assert (status, body) == (200, "inside")
    assert ask_web(site, f"/page?fx_ticket={ticket}", {})[0] == 401
    assert ask_web(site, "/page", {"Cookie": cookie})[::2] == (200, "inside")
    assert ask_web(site, "/page", {"Cookie": cookie[:-2]})[0] == 401
    assert ask_web(site, "/page", {"Authorization": f"Bearer {site.ticket('alice', 'web')}"})[::2] == (200, "inside")
    status, cookie, page = ask_web(site, "/page", {"Authorization": f"Bearer {site.ticket('eve', 'web')}"})
    assert (status, cookie) == (403, "")
    assert "eve has gone" not in page
    wait_until(lambda: "eve has gone" in site.stack.logs(), 10, "the owner's reason in the log")


def test_a_restarted_relay_takes_no_old_tickets(site: Site) -> None:
    old = site.ticket("alice", "ssh")
    time.sleep(1 - time.time() % 1)  # a ticket knows whole seconds only: one of the second in which a relay starts may be a fresh one
    site.stack.relays["node-a"].stop()
    site.stack.start_relay("node-a")
    site.stack.wait_for_relays("node-a")
    assert site.status("ssh", old) == 401
    wait_until(lambda: site.status("ssh", site.ticket("alice", "ssh")) == 101, 20, "a fresh one")
