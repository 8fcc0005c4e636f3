"""Port: what choosing a node needs to know of reservations, and what it asks of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from fxrelay.balance.holders import Holders
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.delivery.ports import Seat
from fxtunnel.model import RelayId


@dataclass(frozen=True, slots=True)
class Queueing:
    """How many may wait for a server, and how long."""

    most: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class SeatRules:
    """How the logins of a pool reserve. `always`: every server of the pool; otherwise those whose server object says so."""

    always: bool = False
    relogin: OwnerRelogin = OwnerRelogin.PREFER
    linger_ms: int = 0
    hold_while_sessions: bool = False
    guard_start: bool = False
    queue: Queueing | None = None


NO_RULES: Final = SeatRules()


class Seating(Protocol):
    """Reservations, as the chooser uses them."""

    @property
    def holders(self) -> Holders:
        """Who has what."""

    @property
    def changed(self) -> trio.Event:
        """Set when that changes; made anew each time."""

    def seat(self, server_id: RelayId, user: str, rules: SeatRules, would_do: Callable[[str], bool] | None = None) -> Seat:
        """A seat that nobody has taken yet. It is not taken by who has another server that `would_do`; asked in a worker thread."""

    async def find_homes(self, user: str) -> None:
        """Read anew which servers a user has."""
