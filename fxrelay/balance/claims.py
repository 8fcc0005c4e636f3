"""Task: claims on chosen nodes, which all relays count, and the seat at a relay without reservations."""

from collections.abc import Callable
from typing import Final

import trio

from fxrelay.cluster.inflight import Placement
from fxrelay.cluster.view import ENDED, PLACED, ClusterView
from fxrelay.delivery.ports import NotTaken, Then

TAKES_NO_PART: Final = "this relay takes no part in reservations until it is restarted"


class NoClaim:
    """Implements `Claim` for what is counted already."""

    def connected(self) -> None:
        """See `Claim`."""

    def release(self) -> None:
        """See `Claim`."""

    def hand_over(self) -> None:
        """See `Claim`."""


class ClosedSeat:
    """Implements `Seat` at a relay that takes no part in reservations: nobody gets it."""

    async def take(self) -> NotTaken:
        """See `Seat`."""
        await trio.lowlevel.checkpoint()
        return NotTaken(TAKES_NO_PART, Then.GIVE_UP)

    def watch(self, lost: Callable[[], None]) -> None:
        """See `Seat`."""

    def release(self) -> None:
        """See `Seat`."""


class PlacementClaim:
    """Implements `Claim`: a placement that all relays count until the node does."""

    __slots__ = ("_placement", "_released", "_tell", "_view")

    def __init__(self, view: ClusterView, placement: Placement, tell: Callable[[str, Placement], None]) -> None:
        self._view = view
        self._placement = placement
        self._tell = tell
        self._released = False
        tell(PLACED, placement)

    def connected(self) -> None:
        """See `Claim`."""
        placement = self._placement
        self._placement = later = Placement(placement.placement_id, placement.server_id, self._view.now_ms)
        self._view.in_flight.add(later, self._view.now)
        self._tell(PLACED, later)

    def hand_over(self) -> None:
        """See `Claim`."""
        if not self._released:
            self._released = True
            self.connected()

    def release(self) -> None:
        """See `Claim`."""
        if not self._released:
            self._released = True
            self._view.in_flight.withdraw(self._placement.placement_id)
            self._tell(ENDED, self._placement)
