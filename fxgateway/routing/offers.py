"""Pure: which relay takes a client: one that offers the service, has a working tunnel, is willing, and has the fewest open streams."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Generic, Protocol, TypeVar

from fxtunnel.model import RelayId, ServiceName


class Readiness(IntEnum):
    """How well a relay could take a stream now; lower is better."""

    UP = 0
    RELUCTANT = 1
    """It is up but cut off from its cluster's store, and would refuse streams that need the store."""
    LEAVING = 2
    """It makes way for its successor, which does not serve yet: still better than nobody."""
    HELD = 3
    """Its links are lost but may be resumed; a stream would wait."""
    NONE = 4


class Candidate(Protocol):
    """A relay as routing sees it."""

    @property
    def relay_id(self) -> RelayId:
        """Its name."""

    @property
    def readiness(self) -> Readiness:
        """Whether it could take a stream."""

    @property
    def open_streams(self) -> int:
        """How many streams it carries."""


C = TypeVar("C", bound=Candidate)


class RejectReason(Enum):
    """Why a client gets no relay."""

    NO_RELAY = "no-relay"
    EXHAUSTED = "all-refused"
    TOO_MANY_ATTEMPTS = "too-many-attempts"


@dataclass(frozen=True, slots=True)
class Forward(Generic[C]):
    """Open the stream on this relay."""

    relay: C


@dataclass(frozen=True, slots=True)
class Reject:
    """Turn the client away."""

    reason: RejectReason


class OfferTable(Generic[C]):
    """Which relays offer which services."""

    def __init__(self) -> None:
        self._by_service: dict[ServiceName, dict[RelayId, C]] = {}

    def put(self, relay: C, services: Iterable[ServiceName]) -> None:
        """`relay` offers exactly these services from now on."""
        self.remove(relay.relay_id)
        for service in services:
            self._by_service.setdefault(service, {})[relay.relay_id] = relay

    def remove(self, relay_id: RelayId) -> None:
        """The relay offers nothing any more."""
        for service in [name for name, relays in self._by_service.items() if relay_id in relays]:
            relays = self._by_service[service]
            del relays[relay_id]
            if not relays:
                del self._by_service[service]

    def services(self) -> dict[ServiceName, tuple[RelayId, ...]]:
        """Who offers what, for status pages."""
        return {service: tuple(relays) for service, relays in self._by_service.items()}

    def decide(self, service: ServiceName, tried: Collection[RelayId] = ()) -> Forward[C] | Reject:
        """The best relay for `service` that is not in `tried`."""
        best: C | None = None
        best_rank = (Readiness.NONE, 0)
        relays = self._by_service.get(service, {})
        if len(relays) == 1 and not tried:
            (only,) = relays.values()
            return Forward(only) if only.readiness is not Readiness.NONE else Reject(RejectReason.NO_RELAY)
        for relay in relays.values():
            if relay.relay_id in tried:
                continue
            rank = (relay.readiness, relay.open_streams)
            if rank[0] is not Readiness.NONE and (best is None or rank < best_rank):
                best, best_rank = relay, rank
        if best is not None:
            return Forward(best)
        return Reject(RejectReason.EXHAUSTED if tried else RejectReason.NO_RELAY)
