"""Pump: what is told of reservations: to the log (every one of them, for audits), to the counters, and to the other relays."""

import json
import logging
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from fxrelay.balance.reservation_text import BadRecord, decode_record, encode_record
from fxrelay.balance.reservations import Reason, Record
from fxrelay.cluster.ports import RESERVATIONS, Transporter
from fxrelay.cluster.threads import Threads
from fxtunnel.errors import TransporterError
from fxtunnel.model import RelayId, is_name

logger = logging.getLogger(__name__)

QUEUE: Final = 1_024
GATHER_S: Final = 0.02
"""News wait so long for others: an entry and its commit are told together, and telling the one is not in the way of the other."""
ENTERED: Final = "entered"
COMMITTED: Final = "committed"
REJECTED: Final = "rejected"
RELEASED: Final = "released"
EXPIRED: Final = "expired"
LOST: Final = "lost"
REASSERTED: Final = "re-asserted"


class Tidings:
    """Tells. `run` carries the messages to the other relays; without it only log and counters hear."""

    def __init__(self, transporter: Transporter, threads: Threads) -> None:
        self.counts: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self._transporter = transporter
        self._threads = threads
        self._news_in, self._news_out = trio.open_memory_channel[tuple[str, Record]](QUEUE)

    async def run(self) -> None:
        """Tell the other relays until cancelled. What they do not hear they read in the store."""
        async for first in self._news_out:
            await trio.sleep(GATHER_S)
            news = [first]
            with suppress(trio.WouldBlock):
                while True:
                    news.append(self._news_out.receive_nowait())
            # Threads finish in any order: the last one told is not always the latest.
            news.sort(key=lambda told: told[1].revision)
            latest = {(server_id, record.epoch): encode_tidings(server_id, record) for server_id, record in news}
            try:
                await self._threads.run(partial(self._transporter.publish, RESERVATIONS, *latest.values()))
            except TransporterError as exc:
                logger.debug("%d reservations were not told: %s", len(latest), exc)

    def publish(self, server_id: str, record: Record) -> None:
        """To the other relays."""
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            self._news_in.send_nowait((server_id, record))

    def happened(self, event: str, server_id: str, user: str, login_id: str, record: Record | None = None) -> None:
        """A step of a login, for the audit. Only entries, which cost strangers nothing, are left out of the log where there are many."""
        self.counts[event] += 1
        extra: dict[str, Any] = {"reservation": event, "server": server_id, "user": user, "login": login_id}
        if event != ENTERED:
            extra["audit"] = True
        if record is not None:
            extra |= {"fence": record.fence, "epoch": record.epoch}
        logger.info("reservation %s: %s for %s", event, server_id, user or "nobody", extra=extra)

    def rejected(self, server_id: str, user: str, login_id: str, reason: Reason | str) -> None:
        """A login was not let in. Strangers can cause these: many of them are counted, and few are logged."""
        self.counts[REJECTED] += 1
        self.rejections[str(reason)] += 1
        extra = {"reservation": REJECTED, "server": server_id, "user": user, "login": login_id, "reason": str(reason)}
        logger.info("reservation rejected: %s for %s: %s", server_id, user or "nobody", reason, extra=extra)


def refusal_text(reason: Reason) -> str:
    """What whoever wanted in may be told."""
    return {
        Reason.RESERVED: "the server chosen is reserved for another user",
        Reason.OWN_LOGIN: "the server chosen is reserved, and its user has a login there",
        Reason.NO_ENTRY: "the server chosen was reserved by another user meanwhile",
        Reason.TOO_MANY: "too many logins to the server chosen",
    }.get(reason, "reserved servers cannot be given out yet: the cluster's store is new, or has forgotten who has which")


def encode_tidings(server_id: str, record: Record) -> str:
    """The message about a server's record."""
    return json.dumps({"serverId": server_id, "record": encode_record(record)})


def read_tidings(text: str) -> tuple[RelayId, Record] | None:
    """The server and its record of a message; None if it is malformed."""
    try:
        found = json.loads(text)
        server_id = found["serverId"]
        if not isinstance(server_id, str) or not is_name(server_id):
            return None
        return RelayId(server_id), decode_record(found["record"])
    except (ValueError, KeyError, TypeError, RecursionError, BadRecord):
        return None
