"""Task: what this relay knows of reservations, and how it asks the store: in a worker thread, with a deadline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import trio

from fxrelay.balance.holders import Holders
from fxrelay.balance.reservations import Record
from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.reserving.ledger import Ledger, Written
from fxrelay.reserving.tidings import EXPIRED, Tidings
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId

T = TypeVar("T")

CALL_S: Final = 4.0
"""For one call to the store, its own deadlines and the wait for a thread included."""


@dataclass(frozen=True, slots=True)
class ReservingConfig:
    """`lease_s` must be the same at all relays. `on_lost_lease`: what to do with logins that could not be renewed for so long."""

    relay_id: RelayId
    lease_s: float = 15.0
    on_lost_lease: Literal["keep", "end"] = "keep"


class Books:
    """Who has what, as far as it was read or heard; what the store says when asked goes in by `learn`."""

    def __init__(self, config: ReservingConfig, store: Store, transporter: Transporter) -> None:
        self.config = config
        self.ledger = Ledger(store, config.relay_id, config.lease_s)
        self.holders = Holders()
        self._threads = Threads()
        self.tidings = Tidings(transporter, self._threads)
        self.changed = trio.Event()
        """Set when who has which server may have changed; made anew each time."""
        self.last_error = ""

    async def ask(self, call: Callable[[], T]) -> T | StoreError:
        """What `call` returns in a thread, or why there is no answer."""
        try:
            with trio.move_on_after(CALL_S):
                result = await self._threads.run(call)
                self.last_error = ""
                return result
        except StoreError as exc:
            self.last_error = str(exc)
            return exc
        self.last_error = f"no answer within {CALL_S:g} s"
        return StoreError(self.last_error)

    def learn(self, server_id: RelayId, written: Written) -> None:
        """What this relay has just read or written itself."""
        for login in written.expired:
            self.tidings.happened(EXPIRED, server_id, login.user, login.login_id, written.record)
        if self.know(server_id, written.record):
            self.tidings.publish(server_id, written.record)

    def know(self, server_id: RelayId, record: Record) -> bool:
        """What was read or heard. Whether it is news."""
        is_news = self.holders.learn(server_id, record)
        if is_news:
            changed, self.changed = self.changed, trio.Event()
            changed.set()
        return is_news
