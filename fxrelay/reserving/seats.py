"""Task: seats for streams: each stream is a login on the node it goes to."""

from collections.abc import Callable
from typing import Final

import trio

from fxrelay.balance.holders import Holders
from fxrelay.balance.reservations import Reason
from fxrelay.balance.seating import SeatRules
from fxrelay.delivery.ports import NotTaken, Taken, Then
from fxrelay.reserving.leases import Hold, LeaseTerms
from fxrelay.reserving.record_updates import WouldDo
from fxrelay.reserving.reservations import NotEntered, Reservations
from fxtunnel.model import RelayId

_QUICKER: Final = frozenset({Reason.RESERVED, Reason.NO_ENTRY, Reason.ELSEWHERE})


class StreamSeat:
    """Implements `Seat`."""

    __slots__ = ("_hold", "_reservations", "_rules", "_server_id", "_user", "_would_do")

    def __init__(self, reservations: Reservations, server_id: RelayId, user: str, rules: SeatRules, would_do: WouldDo | None) -> None:
        self._reservations = reservations
        self._server_id = server_id
        self._user = user
        self._rules = rules
        self._would_do = would_do
        self._hold: Hold | None = None

    async def take(self) -> Taken | NotTaken:
        """See `Seat`. Taking what is taken changes nothing."""
        if self._hold is not None:
            await trio.lowlevel.checkpoint()
            return Taken()
        if not self._user:
            await trio.lowlevel.checkpoint()
            return NotTaken(f"{self._server_id} is for one user only, and whose stream it is cannot be told", Then.GIVE_UP)
        rules = self._rules
        answer = await self._reservations.take(
            self._server_id, self._user, self._user, LeaseTerms(rules.linger_ms, rules.hold_while_sessions), rules.relogin, self._would_do
        )
        if isinstance(answer, NotEntered):
            then = Then.AGAIN if answer.reason in _QUICKER else Then.ELSEWHERE
            return NotTaken(answer.text, Then.GIVE_UP if answer.is_final else then)
        self._hold = answer
        return Taken()

    def watch(self, lost: Callable[[], None]) -> None:
        """See `Seat`."""
        if self._hold is not None:
            self._hold.watch(lost)

    def release(self) -> None:
        """See `Seat`. Does nothing for a seat that was not taken."""
        hold, self._hold = self._hold, None
        if hold is not None:
            self._reservations.release(hold)


class StreamSeating:
    """Implements `Seating` with reservations."""

    def __init__(self, reservations: Reservations) -> None:
        self._reservations = reservations

    @property
    def holders(self) -> Holders:
        """See `Seating`."""
        return self._reservations.holders

    @property
    def changed(self) -> trio.Event:
        """See `Seating`."""
        return self._reservations.changed

    def seat(self, server_id: RelayId, user: str, rules: SeatRules, would_do: WouldDo | None = None) -> StreamSeat:
        """See `Seating`."""
        return StreamSeat(self._reservations, server_id, user, rules, would_do)

    async def find_homes(self, user: str) -> None:
        """See `Seating`."""
        await self._reservations.find_homes(user)
