"""Pure: how many streams of a service a user, or an address, has at this relay."""

import ipaddress
from collections import Counter
from dataclasses import dataclass
from typing import Final

_IPV6_SITE_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """At most so many streams of one service at once; 0: no limit."""

    per_user: int = 0
    per_address: int = 0


NO_LIMITS: Final = StreamLimits()


class Quotas:
    """Counts of one relay. A place that was taken must be given back."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, key: tuple[str, str, str], most: int) -> bool:
        """Take a place, if there is one. `key` is the service, what is counted, and who."""
        if most and self._counts[key] >= most:
            return False
        self._counts[key] += 1
        return True

    def give_back(self, key: tuple[str, str, str]) -> None:
        """The stream has ended."""
        self._counts[key] -= 1
        if self._counts[key] <= 0:
            del self._counts[key]


def source_of(address: str) -> str:
    """Whom an address counts as: itself, or its /64 if it is an IPv6 one, since whoever has one address there has all of them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    mapped = found.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_network((found, _IPV6_SITE_BITS), strict=False))
