"""Pure: sessions that were placed on a server, and are not counted in its last update yet.

Server objects are seconds old. Without these counts a burst of logins all lands on the node that looked best when it began.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, NewType

from fxtunnel.model import RelayId

PlacementId = NewType("PlacementId", str)

MAX_PLACEMENTS: Final = 100_000
MARGIN_MS: Final = 250
"""By how much members may be wrong about the store's clock."""
EXPIRES_S: Final = 180.0
"""When a placement expires that nobody withdrew, on a server that no longer publishes: twice the age at which a server is down."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A session on its way. `placed_ms` is on the store's clock: a server measured later counts it itself."""

    placement_id: PlacementId
    server_id: RelayId
    placed_ms: int


class InFlight:
    """The placements of this relay and of those that told it. `now` is monotonic seconds."""

    def __init__(self, margin_ms: int = MARGIN_MS) -> None:
        self._margin_ms = margin_ms
        self._by_server: dict[RelayId, dict[PlacementId, Placement]] = {}
        self._where: OrderedDict[PlacementId, tuple[RelayId, float]] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._where)

    def add(self, placement: Placement, now: float) -> None:
        """Count it. The same one twice counts once; a later time replaces the earlier one, since connecting takes a while."""
        self._expire(now)
        at_server = self._by_server.get(placement.server_id, {})
        if placement.placement_id in self._where:
            known = at_server.get(placement.placement_id)
            if known is None or placement.placed_ms <= known.placed_ms:
                return
        elif len(self._where) >= MAX_PLACEMENTS:
            return
        else:
            self._where[placement.placement_id] = (placement.server_id, now)
        self._by_server.setdefault(placement.server_id, at_server)[placement.placement_id] = placement

    def withdraw(self, placement_id: PlacementId) -> None:
        """The placement failed, or has ended already. May be repeated."""
        found = self._where.pop(placement_id, None)
        if found is not None:
            server_id = found[0]
            at_server = self._by_server[server_id]
            at_server.pop(placement_id, None)
            if not at_server:
                del self._by_server[server_id]

    def measured(self, server_id: RelayId, measured_ms: int) -> None:
        """A server's update arrived: it counts what was placed well before it was measured."""
        at_server = self._by_server.get(server_id)
        if at_server:
            for placement in [p for p in at_server.values() if self.is_counted(p, measured_ms)]:
                self.withdraw(placement.placement_id)

    def is_counted(self, placement: Placement, measured_ms: int) -> bool:
        """Whether the server counts it itself in an update that it measured then."""
        return placement.placed_ms + self._margin_ms <= measured_ms

    def counts(self, now: float) -> dict[RelayId, int]:
        """Placements on their way, by server."""
        self._expire(now)
        return {server_id: len(at_server) for server_id, at_server in self._by_server.items()}

    def _expire(self, now: float) -> None:
        while self._where:
            placement_id, (_, added_at) = next(iter(self._where.items()))
            if now - added_at <= EXPIRES_S:
                break
            self.withdraw(placement_id)
