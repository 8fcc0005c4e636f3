"""Pure: where connections come from: what counts as one source, and whether an address lies in given networks."""

import ipaddress
from collections.abc import Iterable
from typing import Final, TypeAlias

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_IPV6_SITE_BITS: Final = 64
"""A site has at least a /64 (RFC 6177), so its single addresses mean nothing."""


def source_of(address: str) -> str:
    """The source of a connection: an IPv4 address itself, the /64 of an IPv6 address (one site has all of it), or text that is neither."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> _IPV6_SITE_BITS << _IPV6_SITE_BITS, _IPV6_SITE_BITS)))


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Whether a peer's address (an IP as text, perhaps with a zone; empty for a unix socket) lies in one of the networks.

    An IPv4 address that a dual-stack socket reports as IPv6 is that IPv4 address.

    Raises:
        ValueError: `address` is neither empty nor an IP address.
    """
    if not address:
        return False
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed.version == network.version and parsed in network for network in networks)
