"""A cluster on one machine: nodes on 127.0.0.2, 127.0.0.3, …, each with a service of its own that says whose it is."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.ports import free_port
from tests.system.peers import Service, dial, echo, read_exactly, read_to_end
from tests.system.stack import Stack, wait_until

NAME_BYTES = 6
HEARD_S = 0.2
"""Relays hear at once what others publish, if they get that much of a processor."""


class NamedService(Service):
    """Listens on a node's address; tells each client the node's name, then echoes. Keeps what comes first from each client."""

    def __init__(self, address: str, port: int, name: str) -> None:
        self.heads: list[bytes] = []

        def serve(sock: socket.socket) -> None:
            sock.sendall(name.encode().ljust(NAME_BYTES))
            first = sock.recv(1 << 16)
            if first:
                self.heads.append(first)
                sock.sendall(first)
            echo(sock)

        super().__init__(serve, address=(address, port))


@dataclass
class Cluster:
    """Nodes and their relays behind one gateway; `[cluster]` is the same for all."""

    stack: Stack
    settings: str
    service: str = "desk"
    port: int = field(default_factory=free_port)
    services: dict[str, NamedService] = field(default_factory=dict)

    def node(self, number: int, *, gateway: bool = True, service: str = "", extra: str = "", serve: bool = True) -> str:
        """Start node `number` on 127.0.0.`number`; without a gateway it only reports. Returns its name."""
        name, address = f"node-{number}", f"127.0.0.{number}"
        if serve:
            self.services[name] = NamedService(address, self.port, name)
        home = self.stack.directory / name
        home.mkdir(mode=0o700, exist_ok=True)
        if not (home / "gateway.json").exists():
            shutil.copy(self.stack.directory / "gateway.json", home / "gateway.json")
        self.stack.relay_config(name).write_text(
            f'[relay]\nid = "{name}"\nstate_dir = "state"\naddress = "{address}"\n'
            + ('[[gateway]]\nfile = "gateway.json"\n' if gateway else "")
            + f'[[service]]\nname = "{self.service}"\nport = {self.port}\nhost = "{address}"\n{service}\n'
            + f"[cluster]\n{self.settings}\n{extra}\n"
        )
        self.stack.start_relay(name)
        return name

    def close(self) -> None:
        """The services; the stack ends its own daemons."""
        for service in self.services.values():
            service.close()

    def nodes(self, name: str) -> dict[str, dict]:
        """What `fxrelay nodes --json` says with this node's configuration."""
        found = self.stack.relay_cli(name, "nodes", "--json")
        return {node["serverId"]: node for node in json.loads(found.stdout)}

    def reservations(self, name: str) -> list[dict]:
        """What `fxrelay reservations --json` says with this node's configuration."""
        return json.loads(self.stack.relay_cli(name, "reservations", "--json").stdout)

    def status(self, name: str) -> dict:
        """What the relay's status socket says; much quicker than `fxrelay status --json`, which says the same."""
        return json.loads(self._page(name, "/status"))

    def metrics(self, name: str) -> str:
        """What the relay's status socket serves to Prometheus."""
        return self._page(name, "/metrics")

    def _page(self, name: str, path: str) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self.stack.directory / name / "state" / "status.sock"))
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n".encode())
            return read_to_end(sock).decode().partition("\r\n\r\n")[2]

    def wait_until_known(self, names: Sequence[str], by: Sequence[str], timeout_s: float = 20.0) -> None:
        """Until each relay of `by` has all of `names` up, tunnels included."""

        def all_know() -> bool:
            return all(self.status(relay)["cluster"]["nodes"].get("up") == len(names) for relay in by)

        wait_until(all_know, timeout_s, f"{by} know {names}")
        # A node's first words may be from before its tunnel was up.
        published = {name: self.status(name)["cluster"]["published"] for name in names}
        wait_until(lambda: all(self.status(name)["cluster"]["published"] > published[name] for name in names), timeout_s, "their tunnels")
        time.sleep(HEARD_S)

    def who_serves(self, timeout_s: float = 10.0) -> str:
        """A client's visit: the node that served it."""
        with dial(self.stack.doors[self.service], timeout_s) as client:
            return read_exactly(client, NAME_BYTES).decode().strip()

    def held(self, count: int, pause_s: float = 0.0) -> tuple[list[socket.socket], list[str]]:
        """Clients that stay, one after the other, and who serves each. `pause_s` lets relays hear of each other's decisions."""
        clients, names = [], []
        for _ in range(count):
            time.sleep(pause_s)
            client = dial(self.stack.doors[self.service], 10)
            clients.append(client)
            names.append(read_exactly(client, NAME_BYTES).decode().strip())
        return clients, names


MakeCluster = Callable[..., Cluster]
