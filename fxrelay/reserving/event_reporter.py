"""Pump: reports what happens to reservations: to the log (all of it, for audits), to the counters, and to the other relays."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from fxrelay.balance.reservation_text import BadRecord, encode_record, read_record
from fxrelay.balance.reservations import Reason, Record
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, RESERVATIONS, Transporter
from fxrelay.cluster.threads import Threads
from fxtunnel.errors import TransporterError
from fxtunnel.model import RelayId, is_name

logger = logging.getLogger(__name__)

QUEUE: Final = 1_024
GATHER_S: Final = 0.02
"""News are held this long, so that an entry and its commit travel together."""
TOGETHER: Final = 8
"""Records in one message, since its receivers read them without a pause."""
ENTERED: Final = "entered"
COMMITTED: Final = "committed"
REJECTED: Final = "rejected"
RELEASED: Final = "released"
EXPIRED: Final = "expired"
LOST: Final = "lost"
REASSERTED: Final = "re-asserted"


class EventReporter:
    """Tells. `run` carries the messages to the other relays; without it only log and counters hear."""

    def __init__(self, transporter: Transporter, threads: Threads) -> None:
        self.counts: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self._transporter = transporter
        self._threads = threads
        self._told: dict[str, None] = {}
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
            latest = {(server_id, record.epoch): (server_id, record) for server_id, record in news}
            texts = encode_together(list(latest.values()))
            self._told.update(dict.fromkeys(texts))
            while len(self._told) > QUEUE:
                del self._told[next(iter(self._told))]
            try:
                await self._threads.run(partial(self._transporter.publish, RESERVATIONS, *texts))
            except TransporterError as exc:
                logger.debug("%d reservations were not told: %s", len(latest), exc)

    def is_own(self, text: str) -> bool:
        """Whether this relay sent that message itself. To be asked once for each message that comes back."""
        if text not in self._told:
            return False
        del self._told[text]
        return True

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
    """The text that the client may be shown."""
    return {
        Reason.RESERVED: "the server chosen is reserved for another user",
        Reason.OWN_LOGIN: "the server chosen is reserved, and its user has a login there",
        Reason.ELSEWHERE: "the user has another server, which he should use",
        Reason.NO_ENTRY: "the server chosen was reserved by another user meanwhile",
        Reason.TOO_MANY: "too many logins to the server chosen",
    }.get(reason, "reserved servers cannot be given out yet: the cluster's store is new, or has forgotten who has which")


def encode_event(server_id: str, record: Record) -> str:
    """The message about a server's record."""
    return f'{{"serverId":{json.dumps(server_id)},"record":{encode_record(record)}}}'


def encode_together(news: Sequence[tuple[str, Record]]) -> list[str]:
    """The messages about several servers' records: each a list, since one message costs about what its records do."""
    messages = [encode_event(server_id, record) for server_id, record in news]
    texts = []
    for start in range(0, len(messages), TOGETHER):
        part = messages[start : start + TOGETHER]
        is_short = sum(map(len, part)) < MAX_DOCUMENT_BYTES // 2
        texts += [f"[{','.join(part)}]"] if is_short and len(part) > 1 else part
    return texts


def read_events(text: str) -> list[tuple[RelayId, Record]] | None:
    """The servers and their records of a message; None if it is malformed."""
    try:
        found = json.loads(text)
        if not isinstance(found, list):
            return [_read(found)]
        return [_read(each) for each in found] if 1 <= len(found) <= TOGETHER else None
    except (ValueError, KeyError, TypeError, RecursionError, BadRecord):
        return None


def _read(found: Any) -> tuple[RelayId, Record]:
    server_id = found["serverId"]
    if not isinstance(server_id, str) or not is_name(server_id):
        raise ValueError("no server's id")
    return RelayId(server_id), read_record(found["record"])
