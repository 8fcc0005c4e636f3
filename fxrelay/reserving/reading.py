"""Task: reservations for commands: read and released without a relay that runs. Blocking."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fxrelay.balance.holders import Holders
from fxrelay.cluster.ports import RESERVATIONS, SERVERS, Store, Transporter
from fxrelay.cluster.reading import unknown_node
from fxrelay.reserving.event_reporter import encode_event
from fxrelay.reserving.ledger import Ledger
from fxrelay.settings import RelaySettings
from fxtunnel.errors import TransporterError
from fxtunnel.model import RelayId


@dataclass(frozen=True, slots=True)
class ReservationRow:
    """A server as `fxrelay reservations` shows it. `fence` is the number of the last grant, `store_epoch` the store memory it is of."""

    server_id: str
    user: str
    since_s: float
    since_ms: int
    logins: int
    fence: int
    store_epoch: str
    entries: int

    def document(self) -> dict[str, Any]:
        """As JSON for other programs."""
        return {
            "serverId": self.server_id,
            "user": self.user or None,
            "sinceMs": self.since_ms if self.user else None,
            "logins": self.logins,
            "epoch": self.fence,
            "storeEpoch": self.store_epoch,
            "entries": self.entries,
        }


def ledger_of(settings: RelaySettings, store: Store) -> Ledger:
    """The records as the relay of this configuration sees them."""
    return Ledger(store, RelayId(settings.relay.id), settings.cluster.lease_s)


def holders_in(settings: RelaySettings, store: Store) -> Holders:
    """Who has which server now. Raises StoreError."""
    holders = Holders()
    for server_id, record in ledger_of(settings, store).records():
        holders.learn(RelayId(server_id), record)
    return holders


def read_reservations(settings: RelaySettings, store: Store) -> list[ReservationRow]:
    """Servers that are reserved, or for which somebody is being authenticated. Raises StoreError."""
    now_ms = store.now_ms()
    holders = holders_in(settings, store)
    users = holders.users(now_ms)
    found = []
    for server_id, standing in sorted(holders.standings().items()):
        record = standing.record
        entries = sum(now_ms < entry.expires_ms for entry in record.entries)
        user = users.get(server_id, "")
        if user or entries:
            logins = sum(now_ms < login.expires_ms and not login.is_lingering for login in record.logins)
            since_s = max(0.0, (now_ms - record.since_ms) / 1000)
            found.append(ReservationRow(server_id, user, since_s, record.since_ms, logins, record.fence, record.epoch, entries))
    return found


def release_node(settings: RelaySettings, store: Store, transporter: Transporter, server_id: str) -> str:
    """Take a server from its user. Returns that user's name, or an empty text if it had none.

    Raises:
        StoreError: it may or may not be done.
        FxError: no such server has ever been seen.
    """
    if store.get(RESERVATIONS, server_id) is None and store.get(SERVERS, server_id) is None:
        raise unknown_node(store, server_id)
    before, after = ledger_of(settings, store).clear(server_id)
    with suppress(TransporterError):  # it stands in the store: relays read it there
        transporter.publish(RESERVATIONS, encode_event(server_id, after))
    return before.holder
