"""Task: tickets are good for one stream: what this relay remembers of them, and what all relays of its cluster do."""

import logging
import time
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

import trio

from fxrelay.admitting.spent import SpentHere, bucket_of, give_back_in, spend_in
from fxrelay.admitting.ticket import Ticket
from fxrelay.cluster.ports import TICKETS, Present, Store
from fxrelay.cluster.threads import Threads
from fxtunnel.errors import StoreError

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S: Final = 1.8
"""For the store to answer: clients are told within two seconds if it does not."""

CLOCKS_MS: Final = 60_000
"""The store's clock may be this much ahead of the relays': it must not forget a ticket that they would still take."""


class Use(Enum):
    """What came of using a ticket."""

    FIRST = "first"
    AGAIN = "again"
    FORGOTTEN = "forgotten"
    """The ticket is older than our memory, so nobody can say whether it was used."""
    UNKNOWABLE = "unknowable"
    """The store is away: it may have been used at another relay. Nothing was used."""


class TicketMemory(Protocol):
    """Remembers which tickets were used."""

    async def spend(self, ticket: Ticket) -> Use:
        """Use a ticket. Raises nothing. Cancelled, it counts as used, and must not be given back: it may have been used before."""

    def spend_here(self, ticket: Ticket) -> Use:
        """Use a ticket whose use was `UNKNOWABLE`, as far as this relay alone can tell."""

    async def give_back(self, ticket: Ticket) -> None:
        """Its stream came to nothing: it may be used again. Raises nothing."""


class SharedMemory:
    """Implements `TicketMemory` with a cluster's store, beside this relay's own memory.

    A memory reaches back to its beginning only: a ticket that was made before this relay started, or before the store began anew, is
    refused. Its holder asks for another one. While `is_away`, nobody waits for the store.
    """

    def __init__(
        self, store: Store, threads: Threads, is_away: Callable[[], bool] = lambda: False, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._is_away = is_away
        self._threads = threads
        self._clock = clock
        self._here = SpentHere()
        self._epoch = ""
        self._begins_unix = int(clock())

    async def spend(self, ticket: Ticket) -> Use:
        """See `TicketMemory`."""
        if ticket.issued_unix < self._begins_unix:
            await trio.lowlevel.checkpoint()
            return Use.FORGOTTEN
        if not self._here.spend(ticket.use_id, ticket.expires_unix, self._clock()):
            await trio.lowlevel.checkpoint()
            return Use.AGAIN
        found = await self._note(ticket)
        if found is None:
            self._here.give_back(ticket.use_id)
            return Use.UNKNOWABLE
        use, epoch = found
        if self._epoch and epoch != self._epoch:
            self._begins_unix = int(self._clock()) + 1
            logger.warning("the store has begun anew: tickets from before are refused")
            use = Use.FORGOTTEN
        self._epoch = epoch
        return use

    async def _note(self, ticket: Ticket) -> tuple[Use, str] | None:
        """What the store says, and its epoch; None: nothing in time."""
        if self._is_away():
            await trio.lowlevel.checkpoint()
            return None
        with trio.move_on_after(STORE_TIMEOUT_S) as patience:
            try:
                return await self._threads.run(lambda: _spend(self._store, ticket))
            except StoreError as exc:
                logger.warning("tickets cannot be noted in the store: %s", exc)
        if patience.cancelled_caught:
            self._threads.store_failed()
        return None

    def spend_here(self, ticket: Ticket) -> Use:
        """See `TicketMemory`."""
        return Use.FIRST if self._here.spend(ticket.use_id, ticket.expires_unix, self._clock()) else Use.AGAIN

    async def give_back(self, ticket: Ticket) -> None:
        """See `TicketMemory`."""
        self._here.give_back(ticket.use_id)
        with trio.move_on_after(STORE_TIMEOUT_S):
            try:
                await self._threads.run(lambda: _give_back(self._store, ticket))
            except StoreError as exc:
                logger.debug("a ticket was not given back: %s", exc)


def _spend(store: Store, ticket: Ticket) -> tuple[Use, str]:
    uses: list[Use] = []

    def change(present: Present) -> str | None:
        text = spend_in(present.text, ticket.use_id, ticket.expires_unix * 1000 + CLOCKS_MS, present.now_ms)
        uses.append(Use.FIRST if text is not None else Use.AGAIN)
        return text

    present = store.update(TICKETS, bucket_of(ticket.use_id), change)
    return uses[-1], present.epoch


def _give_back(store: Store, ticket: Ticket) -> None:
    store.update(TICKETS, bucket_of(ticket.use_id), lambda present: give_back_in(present.text, ticket.use_id, present.now_ms))
