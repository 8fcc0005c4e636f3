"""A cluster on one machine: nodes on 127.0.0.2, 127.0.0.3, …, each with a service of its own that says whose it is."""

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.ports import free_port
from tests.system.peers import Service, dial, echo, read_exactly
from tests.system.stack import Stack, wait_until

NAME_BYTES = 6


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
    tunnelled: dict[str, bool] = field(default_factory=dict)

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
        self.tunnelled[name] = gateway
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
        """What the relay says of itself."""
        return self.stack.relay_status(name)

    def metrics(self, name: str) -> str:
        """What the relay's status socket serves to Prometheus."""
        return self.stack.relay_page(name, "/metrics")

    def believed(self, relay: str) -> list[dict]:
        """What this relay believes of each node now: what it decides by."""
        return [self.stack.believed(relay, name) for name in self.tunnelled]

    def wait_until_known(self, names: Sequence[str], by: Sequence[str], timeout_s: float = 20.0) -> None:
        """Until each relay of `by` has all of `names` up, tunnels included."""

        def is_known(relay: str, name: str) -> bool:
            node = self.stack.believed(relay, name)
            # A node's first words may be from before its tunnel was up.
            return bool(node) and node["state"] == "up" and bool(node["gateways"]) is self.tunnelled[name]

        wait_until(lambda: all(is_known(relay, name) for relay in by for name in names), timeout_s, f"{by} know {names}")

    def wait_until_empty(self, by: Sequence[str], timeout_s: float = 20.0) -> None:
        """Until each relay of `by` believes that no node has a session, or is about to have one."""

        def is_empty() -> bool:
            return all(node["sessions"] == node["placements"] == 0 for relay in by for node in self.believed(relay))

        wait_until(is_empty, timeout_s, "no sessions")

    def who_serves(self, timeout_s: float = 30.0) -> str:
        """A client's visit: the node that served it."""
        with dial(self.stack.doors[self.service], timeout_s) as client:
            return read_exactly(client, NAME_BYTES).decode().strip()

    def held(self, count: int, told: Sequence[str] = ()) -> tuple[list[socket.socket], list[str]]:
        """Clients that stay, one after the other, and who serves each. Before the next one, relays in `told` have heard of the last."""
        clients: list[socket.socket] = []
        names = []

        def have_heard() -> bool:
            return all(sum(node["sessions"] + node["placements"] for node in self.believed(relay)) >= len(clients) for relay in told)

        for _ in range(count):
            clients.append(dial(self.stack.doors[self.service]))
            names.append(read_exactly(clients[-1], NAME_BYTES).decode().strip())
            wait_until(have_heard, what=f"{told} have heard of {len(clients)} clients")
        return clients, names


MakeCluster = Callable[..., Cluster]
