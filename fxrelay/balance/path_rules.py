"""Pure: how this relay can reach another node, by its own configuration and by what the node publishes."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from fxrelay.cluster.server import ServerObject
from fxrelay.cluster.settings import Network, PathKind
from fxtunnel.model import GatewayId, RelayId

_MAX_KEPT: Final = 65_536
"""Addresses for which the result is kept."""


@dataclass(frozen=True, slots=True)
class PathRules:
    """How this relay may reach other nodes: its own configuration, which the store cannot widen."""

    server_id: RelayId
    paths: tuple[PathKind, ...]
    force_indirect: bool
    networks: tuple[Network, ...]
    address: str
    _kept: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)

    def direct_address(self, server: ServerObject) -> str:
        """The server's address if a direct connection to it is allowed, else empty."""
        if "direct" not in self.paths or self.force_indirect or server.force_indirect or not server.address:
            return ""
        allowed = self._kept.get(server.address)
        if allowed is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            allowed = self._kept[server.address] = self._if_allowed(server.address)
        return allowed

    def _if_allowed(self, address: str) -> str:
        found = _address(address)
        if found is None or found.is_link_local or found.is_unspecified or found.is_multicast:
            return ""  # cloud metadata services answer on link-local addresses
        if found.is_loopback:
            own = _address(self.address)
            allowed = own is not None and own.is_loopback
        else:
            allowed = any(found in network for network in self.networks)
        return str(found) if allowed else ""

    def can_redirect(self, server: ServerObject, gateway_id: GatewayId) -> bool:
        """Whether the gateway can reach the server by a tunnel of its own."""
        return "redirect" in self.paths and gateway_id in server.gateways and server.server_id != self.server_id

    def is_local(self, server: ServerObject) -> bool:
        """Whether the server is this node."""
        return "local" in self.paths and server.server_id == self.server_id

    def reaches(self, server: ServerObject, gateway_id: GatewayId) -> bool:
        """Whether there is any way to the server for a stream of this gateway."""
        return self.is_local(server) or self.can_redirect(server, gateway_id) or bool(self.direct_address(server))


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An IPv4 address written as an IPv6 one is that IPv4 address: the kernel connects to it as such."""
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
