"""Pure: what counts as one source of connections."""

import ipaddress
from typing import Final

_IPV6_SITE_BITS: Final = 64
"""A site has at least a /64 (RFC 6177), so its single addresses mean nothing."""


def source_of(address: str) -> str:
    """An IPv4 address as it is; an IPv6 one as its /64, since whoever has one address there has all of them. What is no address stays."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> _IPV6_SITE_BITS << _IPV6_SITE_BITS, _IPV6_SITE_BITS)))
