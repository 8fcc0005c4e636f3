"""Pump: the cluster as this relay sees it now: members, placements on their way, and whether store and transporter answer.

Belongs to the trio thread. The follower writes it, decisions and status read it; nothing here waits.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from fxrelay.cluster.content import MAX_MS
from fxrelay.cluster.inflight import InFlight, Placement, PlacementId
from fxrelay.cluster.members import Ages, Control, Member, Members, Outcome
from fxrelay.cluster.ports import CONTROLS, MAX_DOCUMENT_BYTES, PLACEMENTS, RESERVATIONS, SERVERS, Document, Message
from fxrelay.cluster.roster import Roster
from fxtunnel.model import RelayId, is_name

logger = logging.getLogger(__name__)

PLACED: Final = "placed"
ENDED: Final = "ended"
SILENT_SHARE: Final = 0.5
"""Of the age at which nodes become stale: who gets no message for so long while the store is down is deaf. Nodes publish more often."""
MAX_REASONS: Final = 8
"""So many different ones are told of one outage."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether what the cluster says can be heard. `store_down_s` is 0 while the store answers; `synced`: it was read once."""

    synced: bool
    store_down_s: float
    live: bool
    last_error: str


class Listener(Protocol):
    """Who is called by a view. Nothing here may block."""

    def ask_store(self) -> None:
        """Have the store asked for its clock soon; what it answers comes by `store_said` or `store_failed`."""

    def hear_reservation(self, text: str) -> bool:
        """A message about a reservation. False: it is malformed."""

    def hear_end(self, server_id: RelayId, placed_ms: int) -> None:
        """A placement has ended: where, and when it was placed."""

    def may_have_missed(self) -> None:
        """News from others may have been missed for a while, and are heard again."""


class NullListener:
    """Implements `Listener` where a view is only looked at."""

    def ask_store(self) -> None:
        """See `Listener`."""

    def hear_reservation(self, text: str) -> bool:
        """See `Listener`."""
        return True

    def hear_end(self, server_id: RelayId, placed_ms: int) -> None:
        """See `Listener`."""

    def may_have_missed(self) -> None:
        """See `Listener`."""


class ClusterView:
    """What is known. `now` counts the seconds in which this relay could hear the others; `now_ms` is the store's clock as far as this relay
    can tell, without asking it.
    """

    def __init__(self, ages: Ages, monotonic: Callable[[], float] = time.monotonic, listener: Listener | None = None) -> None:
        self.members = Members(ages)
        self.in_flight = InFlight()
        self._silent_s = SILENT_SHARE * ages.stale_s
        self.dropped_messages = 0
        self._listener = listener or NullListener()
        self._monotonic = monotonic
        self._clock_offset_ms = int(time.time() * 1000 - monotonic() * 1000)
        self._synced = False
        self._doubted_since: float | None = None
        self._store_down_since: float | None = None
        self._reasons: set[str] = set()
        """Why the store is down, as told since it is."""
        self._is_refused = False
        self._blind_since: float | None = None
        self._blind_s = 0.0
        self._heard_at = -1.0
        self._said_at = monotonic()
        self._live = False
        self._was_live = False
        self.controls_heard = 0
        self._last_error = ""
        self._quarrels: set[RelayId] = set()

    @property
    def now(self) -> float:
        """Monotonic seconds, which stand still while neither the store nor messages reach this relay: no member goes stale by that."""
        blind_since = self._blind_since if self._blind_since is not None else self._deaf_since()
        return (self._monotonic() if blind_since is None else blind_since) - self._blind_s

    @property
    def now_ms(self) -> int:
        """The store's clock, ms since 1970."""
        return int(self._monotonic() * 1000) + self._clock_offset_ms

    def health(self) -> Health:
        """For status and metrics."""
        since = self._store_down_since if self._store_down_since is not None else self._doubted_since
        down_s = 0.0 if since is None else self._monotonic() - since
        return Health(self._synced, down_s, self._live, self._last_error)

    def everyone(self) -> Roster[Member]:
        """All members, down ones too; to be read before anything else is heard."""
        return self.members.members(self.now)

    def store_said(self, clock_ms: int) -> None:
        """The store has answered and told its clock. If it takes no updates it still counts as down."""
        if self._store_down_since is not None:
            self._look()  # it may have been silent until now
        self._said_at = self._monotonic()
        self._doubted_since = None
        self._clock_offset_ms = clock_ms - int(self._said_at * 1000)
        if self._is_refused:
            return
        if self._store_down_since is not None:
            logger.warning("the store answers again after %.1f s", self._monotonic() - self._store_down_since)
        self._store_down_since = None
        self._reasons.clear()
        self._look()

    def store_took(self, clock_ms: int) -> None:
        """The store has taken this node's server object, and told its clock."""
        self._is_refused = False
        self.store_said(clock_ms)

    def store_refused(self, error: str) -> None:
        """The store has not taken this node's server object: it is away, or full."""
        self._is_refused = True
        self.store_failed(error)

    @property
    def is_store_down(self) -> bool:
        """Whether the store was asked, and did not answer, or takes nothing."""
        return self._store_down_since is not None

    @property
    def is_store_doubted(self) -> bool:
        """Whether the store counts as down until it has been asked."""
        return self._doubted_since is not None

    def store_doubted(self) -> None:
        """Somebody could not use the store, perhaps because of what is in it: it counts as down until it has been asked for its clock."""
        if self._store_down_since is None and self._doubted_since is None:
            self._doubted_since = self._monotonic()
            self._listener.ask_store()

    def store_failed(self, error: str) -> None:
        """The store did not answer: what is known stays in use."""
        self._last_error = error
        doubted_since, self._doubted_since = self._doubted_since, None
        if self._store_down_since is None:
            self._store_down_since = self._monotonic() if doubted_since is None else doubted_since
            logger.warning("the store does not answer, going on with what is known: %s", error)
            self._look()
        elif error not in self._reasons and len(self._reasons) < MAX_REASONS:
            logger.warning("the store still does not answer, now for another reason: %s", error)
        self._reasons.add(error)

    def live_updates_heard(self) -> None:
        """Changes arrive at once."""
        if self._was_live and not self._live:
            logger.warning("live updates are heard again")
            self._listener.may_have_missed()
        self._live = self._was_live = True
        self._look()

    def live_updates_lost(self, error: str) -> None:
        """Changes do not arrive at once."""
        if self._live or (not self._was_live and error != self._last_error):
            logger.warning("live updates are interrupted, reading the store instead: %s", error)
        self._live = False
        self._last_error = error
        self._look()

    def read_servers(self, documents: Iterable[Document]) -> None:
        """A part of the store's servers."""
        for document in documents:
            age_s = (self.now_ms - document.updated_ms) / 1000
            outcome, server_id = self.members.hear(document.text, self.now, age_s)
            self._after(outcome, server_id)

    def read_controls(self, documents: Iterable[Document]) -> None:
        """All of the store's controls."""
        self.members.replace_controls({document.key: Control.parse(document.text) for document in documents})

    def read_everything(self, server_ids: frozenset[str]) -> None:
        """The store has been read to its end; these servers are in it."""
        self._synced = True
        self.members.forget_unless(server_ids, self.now)

    def know(self, text: str) -> None:
        """This node's own server object, which nobody had to tell."""
        self._after(*self.members.hear(text, self.now))

    def hear(self, message: Message) -> None:
        """A message. Whatever is malformed is dropped and counted."""
        if self._store_down_since is not None:
            self._look()  # it may have been silent until now
        self._heard_at = self._monotonic()
        if self._blind_since is not None:
            self._look()
        if len(message.text) > MAX_DOCUMENT_BYTES:
            self.dropped_messages += 1
        elif message.topic == SERVERS:
            self._after(*self.members.hear(message.text, self.now))
        elif not (self._listener.hear_reservation(message.text) if message.topic == RESERVATIONS else self._hear_small(message)):
            self.dropped_messages += 1

    def _look(self) -> None:
        """Notice that nothing can be heard any more, or that something can be again.

        Until the next look `now` says so by itself, however long that takes.
        """
        deaf_since = self._deaf_since()
        if deaf_since is not None and self._blind_since is None:
            self._blind_since = deaf_since
        elif deaf_since is None and self._blind_since is not None:
            self._blind_s += self._monotonic() - self._blind_since
            self._blind_since = None

    def _deaf_since(self) -> float | None:
        """Since when neither the store nor messages have been of use, if they are not.

        A subscription that stands proves nothing: a Redis that hangs keeps it open. Nor does a message that was on its way when the store
        went: a disk that is full takes neither. Only one that is not long ago, and came since the store went away, does.
        """
        if self._store_down_since is None:
            return None
        if self._live and self._heard_at > self._store_down_since and self._monotonic() - self._heard_at < self._silent_s:
            return None
        # Not from now: a store that hangs is noticed seconds after it was last of use.
        return max(self._said_at, self._heard_at)

    def _after(self, outcome: Outcome, server_id: RelayId | None) -> None:
        if server_id is None:
            return
        member = self.members.get(server_id, self.now)
        if member is None:
            return
        if outcome is Outcome.APPLIED:
            self.in_flight.measured(server_id, member.server.measured_ms)
        if not member.rivals:
            self._quarrels.discard(server_id)
        elif server_id not in self._quarrels:
            self._quarrels.add(server_id)
            logger.error(
                "two processes call themselves %s: %s at %s is used, being newer, %s is not; give one of them another relay.id",
                server_id,
                member.server.instance,
                member.server.hostname,
                ", ".join(member.rivals),
            )

    def _hear_small(self, message: Message) -> bool:
        try:
            found = json.loads(message.text)
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict):
            return False
        if message.topic == CONTROLS:
            server_id, control = found.get("serverId"), found.get("control")
            if not isinstance(server_id, str) or not is_name(server_id):
                return False
            self.controls_heard += 1
            self.members.control(server_id, Control.of(control))
            return True
        return message.topic == PLACEMENTS and self._hear_placement(found)

    def _hear_placement(self, found: dict[str, object]) -> bool:
        placement_id, server_id, placed_ms, event = (found.get(key) for key in ("id", "serverId", "at", "event"))
        if not isinstance(placement_id, str) or not is_name(placement_id):
            return False
        if event == ENDED:
            self.in_flight.withdraw(PlacementId(placement_id))
            if isinstance(server_id, str) and type(placed_ms) is int:
                self._listener.hear_end(RelayId(server_id), placed_ms)
            return True
        if event != PLACED or not isinstance(server_id, str) or not is_name(server_id):
            return False
        if type(placed_ms) is not int or not 0 <= placed_ms <= MAX_MS:
            return False
        placement = Placement(PlacementId(placement_id), RelayId(server_id), min(placed_ms, self.now_ms))
        member = self.members.get(placement.server_id, self.now)
        if member is None or not self.in_flight.is_counted(placement, member.server.measured_ms):  # news may be later than the update
            self.in_flight.add(placement, self.now)
        return True


def encode_placement(event: str, placement: Placement) -> str:
    """The message about a placement: `event` is PLACED or ENDED."""
    return json.dumps({"id": placement.placement_id, "serverId": placement.server_id, "at": placement.placed_ms, "event": event})


def encode_control(server_id: str, control: Control) -> str:
    """The message about a control."""
    return json.dumps({"serverId": server_id, "control": json.loads(control.encode())})
