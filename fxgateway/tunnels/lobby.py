"""Task: peers that have not yet proved who they are: how many, from where, and for how long."""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import trio

_V6_PREFIX_BITS: Final = 64  # one customer's network: its addresses are free


@dataclass(frozen=True, slots=True)
class PortLimits:
    """Bounds for peers that have not proved who they are. They protect memory, descriptors and CPU from strangers."""

    hello_timeout_s: float = 5.0
    hello_bytes: int = 16_384
    pending: int = 512
    pending_per_source: int = 64


class Guest:
    """One such peer. Whatever is done for it runs inside `scope`."""

    __slots__ = ("is_evicted", "scope", "source")

    def __init__(self, source: str, deadline: float) -> None:
        self.source = source
        self.scope = trio.CancelScope(deadline=deadline)
        self.is_evicted = False


class Lobby:
    """Where peers wait. When it is full the one that waited longest goes: a good relay needs milliseconds, a silent one stays."""

    def __init__(self) -> None:
        self._guests: OrderedDict[Guest, None] = OrderedDict()
        self._by_source: dict[str, OrderedDict[Guest, None]] = {}

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, address: str, limits: PortLimits) -> Guest:
        """A peer from this IP address comes in; its time runs. Pair it with `leave`."""
        source = source_of(address)
        mine = self._by_source.get(source)
        if mine is not None and len(mine) >= limits.pending_per_source:
            self._evict(next(iter(mine)))
        elif len(self._guests) >= limits.pending:
            self._evict(next(iter(self._guests)))
        guest = Guest(source, trio.current_time() + limits.hello_timeout_s)
        self._guests[guest] = None
        self._by_source.setdefault(source, OrderedDict())[guest] = None
        return guest

    def leave(self, guest: Guest) -> None:
        """It has proved who it is, or is gone. Twice is once."""
        if self._guests.pop(guest, guest) is guest:
            return
        mine = self._by_source[guest.source]
        del mine[guest]
        if not mine:
            del self._by_source[guest.source]

    def _evict(self, guest: Guest) -> None:
        guest.is_evicted = True
        guest.scope.cancel()
        self.leave(guest)


def source_of(address: str) -> str:
    """What counts as one source: an IPv4 address, or an IPv6 /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, _V6_PREFIX_BITS), strict=False).network_address)
