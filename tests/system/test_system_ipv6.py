"""System: IPv6 all the way: tunnel, doors, admin page and services on ::1, and what counts as one client there."""

import contextlib
import json
import shutil
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.peers import read_exactly
from tests.system.stack import Daemon, cli, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ipv6")]

PER_SOURCE = 3
_V2 = bytes.fromhex("0d0a0d0a000d0a515549540a2121")


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")


def header(address: str, port: int = 5_000) -> bytes:
    """A PROXY header, version 2, of a client at `address`."""
    block = IPv6Address(address).packed + IPv6Address("2001:db8::9").packed + struct.pack(">HH", port, 443)
    return _V2 + struct.pack(">H", len(block)) + block


class Site:
    """A gateway and a relay, and a service that tells what came first from its client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = {name: free_port() for name in ("tunnel", "echo", "proxied", "both", "admin")}
        self._listener = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=64)
        threading.Thread(target=self._serve, daemon=True).start()
        port = self._listener.getsockname()[1]
        cli(["fxgateway.cli", "init", "--dir", str(directory), "--public-url", f"wss://[::1]:{self.ports['tunnel']}"])
        self.gateway_config = directory / "gateway.toml"
        id_line = next(line for line in self.gateway_config.read_text().splitlines() if line.startswith("gateway_id"))
        self.gateway_config.write_text(
            f'[tunnel]\nlisten = "[::1]:{self.ports["tunnel"]}"\npublic_url = "wss://[::1]:{self.ports["tunnel"]}"\n{id_line}\n'
            f'[[door]]\nlisten = "[::1]:{self.ports["echo"]}"\nservice = "echo"\n'
            f'[[door]]\nlisten = "[::1]:{self.ports["proxied"]}"\nservice = "echo"\nproxy_from = ["::1/128"]\n'
            f'[[door]]\nlisten = "[::]:{self.ports["both"]}"\nservice = "told"\n'
            f'[admin]\nlisten = "[::1]:{self.ports["admin"]}"\n'
            f"[limits]\nconnections_per_source = {PER_SOURCE}\nexempt_sources = []\n"
        )
        home = directory / "node"
        home.mkdir(mode=0o700)
        shutil.copy(directory / "gateway.json", home / "gateway.json")
        self.relay_config = home / "relay.toml"
        self.relay_config.write_text(
            '[relay]\nid = "node-a"\nstate_dir = "state"\n[[gateway]]\nfile = "gateway.json"\n'
            f'[[service]]\nname = "echo"\nprotocol = "tcp"\ntarget = "[::1]:{port}"\n'
            f'[[service]]\nname = "told"\nprotocol = "tcp"\ntarget = "[::1]:{port}"\nproxy_protocol = "v1"\n'
        )
        self.daemons: list[Daemon] = []
        for name, config in (("fxgateway", self.gateway_config), ("fxrelay", self.relay_config)):
            self.daemons.append(Daemon([f"{name}.cli", "run", "--config", str(config)], directory / f"{name}.log"))
            self.daemons[-1].wait_ready()

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            while block := sock.recv(1 << 16):
                sock.sendall(block)

    def is_empty(self) -> bool:
        """Whether everyone who was at a door has left."""
        with urllib.request.urlopen(f"http://[::1]:{self.ports['admin']}/relays", timeout=5) as answer:
            return not any(door["connections"] for door in json.load(answer)["doors"])

    def dial(self, door: str, host: str = "::1", first: bytes = b"") -> socket.socket:
        sock = socket.create_connection((host, self.ports[door]), 10)
        sock.sendall(first + b"hello")
        return sock


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site") / "s")
    yield site
    site.close()


def is_served(client: socket.socket) -> bool:
    try:
        return read_exactly(client, 5) == b"hello"
    except (OSError, EOFError):
        return False


@needs_ipv6
def test_the_whole_way(site: Site) -> None:
    with site.dial("echo") as client:
        assert is_served(client)
        client.sendall(bytes(1 << 20))
        client.shutdown(socket.SHUT_WR)
        assert len(read_exactly(client, 1 << 20)) == 1 << 20
    gateway = json.loads(cli(["fxgateway.cli", "relays", "--json", "--config", str(site.gateway_config)]).stdout)
    (relay,) = gateway["relays"]
    assert relay["state"] == "up"
    assert relay["remote_address"].startswith("[::1]:")
    status = cli(["fxrelay.cli", "status", "--json", "--config", str(site.relay_config)]).stdout
    assert f"wss://[::1]:{site.ports['tunnel']}" in status
    assert f"[::1]:{site.ports['echo']}" in site.daemons[0].ready_line


@needs_ipv6
@pytest.mark.parametrize(("host", "seen"), [("::1", b"PROXY TCP6 ::1 "), ("127.0.0.1", b"PROXY TCP4 127.0.0.1 ")])
def test_a_door_for_both_kinds_of_addresses(site: Site, host: str, seen: bytes) -> None:
    with site.dial("both", host) as client:
        assert read_exactly(client, len(seen)) == seen


@needs_ipv6
def test_clients_of_one_network_count_as_one(site: Site) -> None:
    wait_until(site.is_empty, what="nobody at a door")
    with contextlib.ExitStack() as stack:

        def visit(door: str, first: bytes = b"") -> bool:
            with contextlib.suppress(OSError):  # a reset may be there before connect has returned
                return is_served(stack.enter_context(site.dial(door, first=first)))
            return False

        for number in range(PER_SOURCE):
            assert visit("proxied", header(f"2001:db8:1:2::{number + 1:x}"))
        assert not visit("proxied", header("2001:db8:1:2:ffff::1"))
        assert visit("proxied", header("2001:db8:1:3::1"))
        assert [visit("echo") for _ in range(PER_SOURCE + 1)] == [True] * PER_SOURCE + [False]


@needs_ipv6
def test_an_address_without_brackets_is_explained(site: Site) -> None:
    result = cli(
        ["fxgateway.cli", "check", "--config", str(site.gateway_config)], check=False, env={"FXGATEWAY__DOOR__0__LISTEN": "::1:2222"}
    )
    assert result.returncode == 2
    assert "expected HOST:PORT, [IPV6]:PORT or unix:PATH, found '::1:2222'" in result.stderr


@needs_ipv6
def test_the_logs_hold_nothing_unusual(site: Site) -> None:
    logs = "".join(path.read_text() for path in site.directory.glob("*.log"))
    assert "Traceback" not in logs
    assert "[::1]:" in logs
