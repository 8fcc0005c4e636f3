"""Task: nodes that are gone for good leave the store: by themselves after `cluster.forget_after_s`, at once by `fxrelay forget`."""

import logging
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from fxrelay.balance.reservation_text import BadRecord, decode_record
from fxrelay.cluster.members import NOTHING_OFF
from fxrelay.cluster.ports import CONTROLS, RESERVATIONS, SERVERS, Document, Store, Transporter
from fxrelay.cluster.reading import unknown_node
from fxrelay.cluster.server import BadServer, parse_server
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import encode_control
from fxrelay.reserving.reading import release_node
from fxrelay.settings import RelaySettings
from fxtunnel.errors import FxError, StoreError, TransporterError

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 3_600.0
"""The longest pause between two looks for nodes that are gone; a tenth of `forget_after_s` where that is shorter."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A node that has been removed from the store. `user` had it reserved; empty if nobody had."""

    server_id: str
    silent_s: float
    user: str = ""


class Forgetter:
    """Any relay may do it, and all of them do: each node goes in one step, and only if it has not reported meanwhile."""

    def __init__(self, store: Store, threads: Threads, forget_after_s: float) -> None:
        self._store = store
        self._threads = threads
        self._forget_after_s = forget_after_s
        self._rng = random.Random()  # noqa: S311 - pauses, not secrets

    async def run(self) -> None:
        """Forget until cancelled; a store that is away is asked again the next time. Does nothing where nodes are kept for ever."""
        if not self._forget_after_s:
            await trio.sleep_forever()
        pause_s = min(LOOK_EVERY_S, self._forget_after_s / 10)
        while True:
            await trio.sleep(pause_s * self._rng.uniform(0.5, 1.0))  # a cluster's relays may have started together
            try:
                for gone in await self._threads.run(lambda: forget_silent(self._store, self._forget_after_s)):
                    logger.warning("forgot node %s, which has said nothing for %.1f h", gone.server_id, gone.silent_s / 3_600)
            except StoreError as exc:
                logger.debug("nodes that are gone were not looked for: %s", exc)


def forget_silent(store: Store, forget_after_s: float) -> list[Forgotten]:
    """Remove the nodes that have not reported for so long, by the store's clock. What administrators switched off for them stays: it holds
    again when they come back. A node that somebody has logged in to stays as well, until the rules of reservations have ended that. Blocks.

    Raises:
        StoreError: some may be removed; the others will be the next time.
    """
    now_ms = store.now_ms()
    last_ms = now_ms - int(forget_after_s * 1000)
    gone = []
    for document in store.documents(SERVERS):
        if document.updated_ms <= last_ms and _drop_record(store, document.key, now_ms) and store.delete_if_same(SERVERS, document):
            gone.append(Forgotten(document.key, (now_ms - document.updated_ms) / 1000))
    return gone


def forget_node(settings: RelaySettings, store: Store, transporter: Transporter, server_id: str) -> Forgotten:
    """Remove one node now, with what was switched off for it and its reservation, whose streams are reset. Blocks.

    Raises:
        FxError: there is no such node, or it is at work: it would be back with its next report.
        StoreError: a part may be done; try again.
    """
    found = store.get(SERVERS, server_id)
    if found is None:
        raise unknown_node(store, server_id)
    silent_s = max(0.0, (store.now_ms() - found.updated_ms) / 1000)
    if silent_s < settings.cluster.stale_s and not _has_left(found):
        raise FxError(f"{server_id} reported {silent_s:.0f} s ago: it is at work, and would be back at once; stop its relay first")
    user = release_node(settings, store, transporter, server_id) if store.get(RESERVATIONS, server_id) is not None else ""
    if not store.delete_if_same(SERVERS, found):
        raise FxError(f"{server_id} has reported just now: it is at work, and stays")
    _drop_record(store, server_id, store.now_ms())
    store.delete(CONTROLS, server_id)
    with suppress(TransporterError):  # it stands in the store: relays read it there
        transporter.publish(CONTROLS, encode_control(server_id, NOTHING_OFF))
    return Forgotten(server_id, silent_s, user)


def _has_left(document: Document) -> bool:
    try:
        return parse_server(document.text).draining
    except BadServer:
        return True


def _drop_record(store: Store, server_id: str, now_ms: int) -> bool:
    """Remove the record of the node's reservation, if nobody has the node. The number of its last grant stays: it is never given twice."""
    found = store.get(RESERVATIONS, server_id)
    if found is None:
        return True
    try:
        record = decode_record(found.text)
    except BadRecord:
        return False  # `fxrelay release` repairs it
    if any(now_ms < login.expires_ms for login in record.logins) or any(now_ms < entry.expires_ms for entry in record.entries):
        return False
    return store.delete_if_same(RESERVATIONS, found)
