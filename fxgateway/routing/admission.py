"""Pure: limits on client connections: in all, per door and per source address, and how fast a source may open them (docs/dos.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from fxtunnel.kit.sources import Network, is_within, source_of

REMEMBERED_SOURCES: Final = 65_536
"""Sources that are tracked at the same time, whether they have connections or recently had. Bounds the memory that strangers can take."""
_SWEEP_EVERY_S: Final = 1.0
"""While the table is full, a sweep for every new source would cost a walk through all of it."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds; rates per second. Sources in `exempt` are not counted one by one (the host itself, a front balancer)."""

    connections: int = 16_384
    connections_per_door: int = 16_384
    connections_per_source: int = 256
    open_rate_per_source_per_s: float = 100.0
    open_burst_per_source: int = 200
    exempt: tuple[Network, ...] = ()
    per_door: Mapping[str, int] = field(default_factory=dict)
    """Doors whose bound is not `connections_per_door`, by the address they listen at."""


class Verdict(Enum):
    """What becomes of a new connection."""

    ADMIT = "admit"
    FULL = "full"
    """The whole gateway is at its limit: doors pause instead of refusing."""
    DOOR_FULL = "door-full"
    SOURCE_FULL = "source-full"
    TOO_FAST = "too-fast"


class _Source:
    """One address: open connections and a token bucket."""

    __slots__ = ("count", "tokens", "updated")

    def __init__(self, tokens: float, now: float) -> None:
        self.count = 0
        self.tokens = tokens
        self.updated = now


class Admission:
    """Counts connections. Every `admit` that answers ADMIT is paired with one `release`."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.connections = 0
        self._doors: dict[str, int] = {}
        self._sources: dict[str, _Source] = {}
        self._swept_full = float("-inf")
        self._exempt_open: dict[str, int] = {}
        self._exempt_cache: dict[str, bool] = {}

    def apply(self, limits: AdmissionLimits) -> None:
        """New limits for what comes in from now on."""
        self.limits = limits
        self._exempt_cache.clear()

    def admit(self, door: str, address: str, now: float) -> Verdict:
        """Judge and count a new connection from `address` (text of an IP, or empty for a unix socket) at `door` (where that listens)."""
        limits = self.limits
        if self.connections >= limits.connections:
            return Verdict.FULL
        in_door = self._doors.get(door, 0)
        if in_door >= limits.per_door.get(door, limits.connections_per_door):
            return Verdict.DOOR_FULL
        if self._is_exempt(address):
            self._exempt_open[address] = self._exempt_open.get(address, 0) + 1
        else:
            verdict = self._admit_source(source_of(address), now)
            if verdict is not Verdict.ADMIT:
                return verdict
        self.connections += 1
        self._doors[door] = in_door + 1
        return Verdict.ADMIT

    def release(self, door: str, address: str) -> None:
        """A connection that was admitted has ended."""
        self.connections -= 1
        self._doors[door] -= 1
        if not self._doors[door]:
            del self._doors[door]
        # Which counter it is in was decided when it came in; the exemptions may have changed since.
        exempt = self._exempt_open.get(address)
        if exempt is None:
            self._sources[source_of(address)].count -= 1
        elif exempt > 1:
            self._exempt_open[address] = exempt - 1
        else:
            del self._exempt_open[address]

    def sweep(self, now: float) -> None:
        """Forget sources with nothing open and a full bucket. Call every few seconds."""
        limits = self.limits
        refill_s = limits.open_burst_per_source / limits.open_rate_per_source_per_s
        self._sources = {key: s for key, s in self._sources.items() if s.count or now - s.updated < refill_s}

    def _admit_source(self, key: str, now: float) -> Verdict:
        limits = self.limits
        source = self._sources.get(key)
        if source is None:
            if len(self._sources) >= REMEMBERED_SOURCES:
                if now - self._swept_full >= _SWEEP_EVERY_S:
                    self._swept_full = now
                    self.sweep(now)
                if len(self._sources) >= REMEMBERED_SOURCES:
                    return Verdict.TOO_FAST
            source = self._remember(key, now)
        if source.count >= limits.connections_per_source:
            return Verdict.SOURCE_FULL
        self._refill(source, now)
        if source.tokens < 1.0:
            return Verdict.TOO_FAST
        source.tokens -= 1.0
        source.count += 1
        return Verdict.ADMIT

    def _remember(self, key: str, now: float) -> _Source:
        source = self._sources[key] = _Source(float(self.limits.open_burst_per_source), now)
        return source

    def _refill(self, source: _Source, now: float) -> None:
        refilled = source.tokens + (now - source.updated) * self.limits.open_rate_per_source_per_s
        source.tokens = min(refilled, float(self.limits.open_burst_per_source))
        source.updated = now

    def _is_exempt(self, address: str) -> bool:
        known = self._exempt_cache.get(address)
        if known is None:
            if len(self._exempt_cache) >= REMEMBERED_SOURCES:
                self._exempt_cache.clear()
            known = self._exempt_cache[address] = not address or is_within(address, self.limits.exempt)
        return known
