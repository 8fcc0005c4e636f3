"""Pump: what this relay serves: names to local addresses, from its own configuration and nothing else."""

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fxtunnel.kit.proxy_header import ProxyVersion
from fxtunnel.kit.settings import Address
from fxtunnel.model import Offer, ServiceName

SocketAddress = str | tuple[str, int] | tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to connect: an address family and an address for it. Never a host name."""

    family: int
    address: SocketAddress
    is_local: bool = False
    """Whether it is on this host, where a peer cannot vanish without its kernel saying so (no keep-alive needed)."""


@dataclass(frozen=True, slots=True)
class Service:
    """A service of this relay's configuration. `endpoints` is empty as long as its host name has not been resolved."""

    name: ServiceName
    target: Address
    endpoints: tuple[Endpoint, ...]
    protocol: str = "tcp"
    proxy_protocol: ProxyVersion | None = None
    is_guarded: bool = False
    """Whether every stream has to be admitted first."""


@dataclass(frozen=True, slots=True)
class PoolService:
    """A service of this relay's configuration that many nodes have at the same port; one of them is chosen for each stream.

    `endpoints` are `host` and `port` of this node, empty as long as `host` has not been resolved. On other nodes it is their address and
    this port, which nobody but this relay's administrator decides.
    """

    name: ServiceName
    host: str
    port: int
    endpoints: tuple[Endpoint, ...]
    protocol: str = "tcp"
    proxy_protocol: ProxyVersion | None = None
    wait_s: float = 0.0
    """How long a stream may wait for a node that another user has."""
    is_guarded: bool = False

    @property
    def target(self) -> Address:
        """Where this node itself has it."""
        return Address(self.host, self.port)

    def endpoint_at(self, address: str) -> Endpoint | None:
        """The service on the node with this IP address; None if it is not one."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return None
        text = str(found)
        if found.version == 4:
            return Endpoint(socket.AF_INET, (text, self.port), found.is_loopback)
        return Endpoint(socket.AF_INET6, (text, self.port, 0, 0), found.is_loopback)


AnyService = Service | PoolService


class ServiceTable:
    """The services, looked up for every stream (trust: a gateway can ask for a name, never for an address)."""

    def __init__(self) -> None:
        self._services: Mapping[ServiceName, AnyService] = {}

    def replace(self, services: Iterable[AnyService]) -> None:
        """Serve exactly these from now on; streams that are open stay."""
        self._services = {service.name: service for service in services}

    def get(self, name: ServiceName) -> AnyService | None:
        """The service with this name, if this relay serves it."""
        return self._services.get(name)

    def services(self) -> tuple[AnyService, ...]:
        """All of them."""
        return tuple(self._services.values())

    def offers(self) -> tuple[Offer, ...]:
        """What gateways are told: names, not targets."""
        return tuple(Offer(service.name, service.protocol) for service in self._services.values())


def resolve(target: Address) -> tuple[Endpoint, ...]:
    """The addresses of a target. Blocks on DNS for host names: call it in a worker thread.

    Raises:
        OSError: the name does not resolve.
    """
    if target.path is not None:
        return (Endpoint(socket.AF_UNIX, str(target.path), is_local=True),)
    found: list[Endpoint] = []
    for family, _, _, _, address in socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM):
        is_local = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        endpoint = Endpoint(family, address, is_local)  # type: ignore[arg-type]  # typeshed allows families without text addresses
        if family in (socket.AF_INET, socket.AF_INET6) and endpoint not in found:
            found.append(endpoint)
    return tuple(found)
