"""Pump: the relays that are connected now: which instance holds which name, their sessions, and which instances are fenced off."""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fxgateway.routing.offers import OfferTable, Readiness
from fxgateway.tunnels.live_relay import NO_INSTANCE, LiveRelay, why_gone
from fxgateway.tunnels.ports import ControlHandle, Departure
from fxgateway.tunnels.session_owner import RelaySessions
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.session import Session
from fxtunnel.model import InstanceId, Offer, RelayId, SessionId
from fxtunnel.protocol.credit import WindowBudget

logger = logging.getLogger(__name__)

MAX_LEAVING: Final = 8
"""Draining instances of one relay, beside the present one. Keeps a relay that restarts in a tight loop from filling the memory."""
HANDOVER_SHARES: Final = 2
"""All instances of a relay together may have this many times `links_per_relay`: a full set for the one leaving, and for the one coming."""
DEPARTURE_GRACE_S: Final = 10.0
"""How long after the deadline it announced itself a draining instance is fenced off."""


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """Bounds: data links of one relay, relays in all."""

    links_per_relay: int = 8
    relays: int = 4_096


class Registry:
    """The relays that are connected, one entry per relay id. A new instance takes the name over and fences the old one off, unless the old
    one has announced that it drains: then it keeps its sessions until their streams have ended.
    """

    def __init__(self, reactor: Reactor, config: SessionConfig, budget: WindowBudget, limits: RegistryLimits) -> None:
        self.offers: OfferTable[LiveRelay] = OfferTable()
        self.is_draining = False
        self.resumed = 0
        self.on_change: Callable[[], None] = lambda: None
        """Called when a relay has come or gone, or may have become able or unable to take streams."""
        self._reactor = reactor
        self._config = config
        self._budget = budget
        self._limits = limits
        self._relays: dict[RelayId, LiveRelay] = {}
        self._leaving: dict[RelayId, dict[InstanceId, LiveRelay]] = {}
        self._drained: set[RelayId] = set()
        self._names: dict[RelayId, tuple[int, InstanceId]] = {}
        """The highest known epoch of each relay, and the instance that got it, which may be at another process."""

    def relays(self) -> tuple[LiveRelay, ...]:
        """The present instance of every relay. For those that drain see `leaving`."""
        return tuple(self._relays.values())

    def leaving(self, relay_id: RelayId) -> tuple[LiveRelay, ...]:
        """Earlier instances of a relay whose streams have not all ended."""
        return tuple(self._leaving.get(relay_id, {}).values())

    def sessions(self) -> list[Session]:
        """All sessions of all relays, draining instances included."""
        instances = [*self._relays.values(), *(relay for relay_id in self._leaving for relay in self.leaving(relay_id))]
        return [session for relay in instances for session in relay.sessions.values()]

    def named(self, relay_id: RelayId) -> LiveRelay | None:
        """The relay with this name, if it could take a stream."""
        relay = self._relays.get(relay_id)
        return relay if relay is not None and relay.readiness is not Readiness.NONE else None

    def apply(self, limits: RegistryLimits, config: SessionConfig) -> None:
        """New limits, for sessions that begin from now on."""
        self._limits, self._config = limits, config

    def is_full(self, relay_id: RelayId) -> bool:
        """Whether a relay that is not here yet finds no room."""
        return relay_id not in self._relays and len(self._relays) >= self._limits.relays

    def enter(self, relay_id: RelayId, instance: InstanceId, offers: tuple[Offer, ...], link: ControlHandle, epoch: int = 0) -> int:
        """A control link is up; returns the epoch of its relay. `epoch` 0: the registry counts the next one itself.

        The same instance keeps its sessions, and this link replaces its older one. Another instance is fenced off, unless it drains; its
        clients that no link has told it of wait for this one's first.
        """
        self.sweep()
        older = fenced = None
        relay = self._leaving.get(relay_id, {}).get(instance) or self._relays.get(relay_id)
        if relay is not None and relay.instance != instance:
            if relay.draining:
                logger.info("relay %s has a new instance; the one before ends its streams", relay_id)
                older = self._step_aside(relay)
            else:
                logger.warning("relay %s was taken over by a new instance", relay_id)
                fenced = relay
            relay = None
        if relay is None:
            epoch = epoch or self._names.get(relay_id, (0, instance))[0] + 1
            self._names[relay_id] = epoch, instance
            relay = self._relays[relay_id] = LiveRelay(relay_id, instance, epoch, self._reactor.now)
            relay.predecessor = older
            relay.is_drained = relay_id in self._drained
        elif relay.link is not None:
            relay.link.close(Code.NORMAL, "a newer control link replaces this one")
        relay.link = link
        if self._relays.get(relay_id) is relay:
            self._offer(relay, offers)
        if fenced is not None:
            if fenced.sessions:
                self._hold_clients(relay)
            self._expel(fenced, *why_gone(fenced.instance, instance))
        return relay.epoch

    def _hold_clients(self, relay: LiveRelay) -> None:
        """Whom the instance before has not heard of, and who comes now, may wait for its first link: they were served a moment ago."""
        relay.given_up.add(self._add_session(relay).id)

    def _stand_in(self, fenced: LiveRelay) -> None:
        """As `_hold_clients`, where the new instance is at another process: until it serves there (`relieve`), or the hold is over."""
        relay = self._relays[fenced.relay_id] = LiveRelay(fenced.relay_id, NO_INSTANCE, fenced.epoch, self._reactor.now)
        relay.is_drained = fenced.is_drained
        self._offer(relay, fenced.offers)
        self._hold_clients(relay)

    def update_services(self, relay_id: RelayId, instance: InstanceId, offers: tuple[Offer, ...]) -> None:
        """The relay has reloaded its configuration."""
        relay = self._instance(relay_id, instance)
        if relay is not None and self._relays.get(relay_id) is relay:
            self._offer(relay, offers)

    def knows(self, relay_id: RelayId, instance: InstanceId | None = None) -> bool:
        """Whether this instance is here, or held; without one, whether any instance of the relay is."""
        if instance is None:
            return relay_id in self._relays or relay_id in self._leaving
        return self._instance(relay_id, instance) is not None

    def is_up(self, relay_id: RelayId, instance: InstanceId) -> bool:
        """Whether a data link of this instance is up."""
        relay = self._instance(relay_id, instance)
        return relay is not None and relay.is_up

    def mark_draining(self, relay_id: RelayId, instance: InstanceId, departure: Departure = Departure(0.0)) -> None:  # noqa: B008 - frozen
        """This instance drains: it gets nothing new, or only what nobody else can take (`Departure.hands_over`)."""
        relay = self._instance(relay_id, instance)
        if relay is not None:
            relay.draining = True
            relay.hands_over = departure.hands_over
            relay.leave_by = self._reactor.now + departure.deadline_s + DEPARTURE_GRACE_S
            present = self._relays.get(relay_id)
            if relay.link is not None and present is not relay and (present is None or present.is_up):
                relay.link.relieve()  # it was cut off when its successor began to serve
            self.on_change()

    def drain(self, relay_id: RelayId) -> None:
        """Give no instance of this relay anything new, until `undrain`."""
        self._drained.add(relay_id)
        if relay_id in self._relays:
            self._relays[relay_id].is_drained = True
            self.on_change()

    def undrain(self, relay_id: RelayId) -> None:
        """`drain` is over."""
        self._drained.discard(relay_id)
        if relay_id in self._relays:
            self._relays[relay_id].is_drained = False
            self.on_change()

    def sweep(self) -> None:
        """Fence off instances that have drained for longer than they announced. Call every few seconds."""
        for instances in list(self._leaving.values()):
            for relay in list(instances.values()):
                if self._reactor.now > relay.leave_by:
                    logger.warning("an earlier instance of relay %s has not ended in time", relay.relay_id)
                    self._expel(relay, Code.FENCED, "it was to end by now")

    def note_reluctance(self, relay_id: RelayId, instance: InstanceId, *, reluctant: bool) -> None:
        """Whether other relays should be asked first, as the relay says."""
        relay = self._instance(relay_id, instance)
        if relay is not None and relay.is_reluctant is not reluctant:
            relay.is_reluctant = reluctant
            says = "is cut off from its store, and is asked after the others" if reluctant else "has its store again"
            logger.warning("relay %s %s", relay_id, says)
            self.on_change()

    def leave(self, relay_id: RelayId, link: ControlHandle) -> None:
        """A control link has ended. Sessions stay: they live and die by their own links."""
        for relay in (*self.leaving(relay_id), self._relays.get(relay_id)):
            if relay is not None and relay.link is link:
                relay.link = None
                self._forget_if_gone(relay)

    def new_session(self, relay_id: RelayId, instance: InstanceId) -> Session | None:
        """A session for a data link that has shown its ticket; None when the relay is not here or has all the links it may have.

        The present instance always gets its share: if draining instances hold all the room, the oldest of them is fenced off.
        """
        relay = self._instance(relay_id, instance)
        if relay is None:
            return None
        if relay.link_count >= self._limits.links_per_relay or not self._has_room(relay):
            return None
        session = self._add_session(relay)
        # Only as many as are in the way: the streams of the rest may still find another link.
        self._end_given_up(relay, len(relay.sessions) - self._limits.links_per_relay)
        if relay.predecessor is not None and relay.predecessor.link is not None:
            relay.predecessor.link.relieve()
        self.on_change()
        return session

    def _add_session(self, relay: LiveRelay) -> Session:
        owner = RelaySessions(self, relay)
        session = Session(self._reactor, SessionId(secrets.token_hex(16)), owner, self._config, self._budget)
        relay.sessions[session.id] = session
        return session

    def note_sessions(self, relay_id: RelayId, instance: InstanceId, kept: tuple[SessionId, ...]) -> None:
        """The sessions that the instance still has. Any other held session of it will never be resumed; see `end_given_up`."""
        relay = self._instance(relay_id, instance)
        if relay is not None:
            # Not one with a link: it may be so new that its welcome has not reached the relay.
            relay.given_up = {session.id for session in relay.sessions.values() if not session.is_up and session.id not in kept}

    def end_given_up(self, relay_id: RelayId, instance: InstanceId) -> None:
        """End the sessions that the instance has given up. Call when another link of it is up, for streams whose OPEN is still waiting."""
        relay = self._instance(relay_id, instance)
        if relay is not None:
            self._end_given_up(relay, len(relay.given_up))

    def find_session(self, relay_id: RelayId, instance: InstanceId, session_id: SessionId) -> Session | None:
        """The session a relay wants to resume, if it is that relay's and still held."""
        relay = self._instance(relay_id, instance)
        self.on_change()
        if relay is None:
            return None
        relay.given_up.discard(session_id)
        return relay.sessions.get(session_id)

    def revoke(self, relay_id: RelayId) -> None:
        """End everything this relay has here."""
        for relay in (*self.leaving(relay_id), self._relays.get(relay_id)):
            if relay is not None:
                logger.warning("relay %s is revoked; its tunnels are closed", relay_id)
                self._expel(relay, Code.REVOKED, "the administrator revoked this relay")

    def yield_name(self, relay_id: RelayId, instance: InstanceId, epoch: int, successor: InstanceId) -> None:
        """Another process of this gateway has the relay now, under this epoch: end what this instance still has here.

        An instance that makes way goes on serving until `relieve`. For one that has not entered yet, see `overtaken`.
        """
        if epoch > self._names.get(relay_id, (0, successor))[0]:
            self._names[relay_id] = epoch, successor
        relay = self._instance(relay_id, instance)
        if relay is not None:
            self.on_change()
            code, text = why_gone(instance, successor)
            if relay.draining and code is Code.FENCED and self._relays.get(relay_id) is relay:
                relay.has_yielded = True
                if not relay.hands_over:
                    self.relieve(relay_id)
                return
            logger.warning("relay %s is at another worker now: %s", relay_id, text)
            if code is Code.FENCED and relay.sessions and self._relays.get(relay_id) is relay:
                self._stand_in(relay)
            self._expel(relay, code, text)

    def overtaken(self, relay_id: RelayId, instance: InstanceId, epoch: int) -> tuple[Code, str] | None:
        """Why this instance must not `enter` with the epoch it was just granted; None if it may. The name may have gone on since."""
        latest, successor = self._names.get(relay_id, (0, instance))
        if epoch >= latest or self._instance(relay_id, instance) is not None:  # one that has entered was told by `yield_name`
            return None
        return why_gone(instance, successor)

    def relieve(self, relay_id: RelayId) -> None:
        """Another process of this gateway serves this relay now: an instance here that has yielded its name takes nothing more."""
        relay = self._relays.get(relay_id)
        if relay is not None and relay.instance == NO_INSTANCE:
            self._expel(relay, Code.FENCED, "the new instance serves at another worker")
        elif relay is not None and relay.has_yielded:
            logger.info("relay %s has a new instance at another worker; the one here ends its streams", relay_id)
            if relay.link is not None and relay.hands_over:
                relay.link.relieve()
            self._step_aside(relay)
            self.offers.remove(relay_id)
            self.on_change()

    def begin_drain(self, deadline_s: float) -> None:
        """The gateway drains: no new relay comes in."""
        self.is_draining = True
        self.on_change()
        logger.info("draining for at most %g s; relays here: %d", deadline_s, len(self._relays))

    def send_on(self, deadline_s: float) -> None:
        """Another process of the gateway is about to serve: tell relays to look for it. They keep the links they have here."""
        for relay in self._relays.values():
            if relay.link is not None:
                relay.link.drain(deadline_s)

    def close_all(self, code: Code, text: str, retry_after_s: float) -> None:
        """Say goodbye to everyone."""
        leaving = [relay for relay_id in self._leaving for relay in self.leaving(relay_id)]
        for relay in [*self._relays.values(), *leaving]:
            if relay.link is not None:
                relay.link.close(code, text, retry_after_s)
            self._close_sessions(relay, code, text)
        self._relays.clear()
        self._leaving.clear()

    def session_closed(self, relay: LiveRelay, session: Session, code: Code, text: str) -> None:
        """A session has ended by itself."""
        statistics = session.statistics().mux
        self.resumed += session.resumed
        counts = {"bytes_in": statistics.bytes_in, "bytes_out": statistics.bytes_out, "streams": statistics.opened}
        logger.info("tunnel of %s closed: %s (%s)", relay.relay_id, code.label, text, extra={"tunnel": session.id, **counts})
        relay.sessions.pop(session.id, None)
        relay.given_up.discard(session.id)
        self.on_change()
        self._forget_if_gone(relay)

    def _instance(self, relay_id: RelayId, instance: InstanceId) -> LiveRelay | None:
        relay = self._relays.get(relay_id)
        if relay is not None and relay.instance == instance:
            return relay
        return self._leaving[relay_id].get(instance) if relay_id in self._leaving else None

    def _step_aside(self, relay: LiveRelay) -> LiveRelay | None:
        """Keep a draining instance beside the one that follows it; None if it has nothing left to end."""
        self._relays.pop(relay.relay_id, None)
        if relay.link is None and not relay.sessions:
            return None
        leaving = self._leaving.setdefault(relay.relay_id, {})
        if len(leaving) >= MAX_LEAVING:
            self._expel(next(iter(leaving.values())), Code.FENCED, "too many instances of this relay drain at once")
        leaving[relay.instance] = relay
        return relay

    def _has_room(self, relay: LiveRelay) -> bool:
        """Whether one more session of `relay` fits within what all its instances may have. Makes room for the present instance."""
        present = self._relays.get(relay.relay_id)
        while True:
            leaving = self.leaving(relay.relay_id)
            instances = leaving if present is None else (present, *leaving)
            if sum(instance.link_count for instance in instances) < HANDOVER_SHARES * self._limits.links_per_relay:
                return True
            if relay is not present or not leaving:
                return False
            self._expel(leaving[0], Code.FENCED, "instances of this relay that drain have too many links")

    def _offer(self, relay: LiveRelay, offers: tuple[Offer, ...]) -> None:
        self.on_change()
        relay.offers = offers
        self.offers.put(relay, [offer.name for offer in offers])

    def _expel(self, relay: LiveRelay, code: Code, text: str) -> None:
        # Out of the table first: streams that may be tried again must not find this relay.
        self.on_change()
        if self._relays.get(relay.relay_id) is relay:
            self.offers.remove(relay.relay_id)
            del self._relays[relay.relay_id]
        self._forget_leaving(relay)
        if relay.link is not None:
            relay.link.close(code, text)
        self._close_sessions(relay, code, text)

    def _end_given_up(self, relay: LiveRelay, count: int) -> None:
        for session in [session for session in relay.sessions.values() if session.id in relay.given_up][: max(0, count)]:
            session.close(Code.LINK_LOST, "the relay has given it up")

    def _close_sessions(self, relay: LiveRelay, code: Code, text: str) -> None:
        for session in list(relay.sessions.values()):
            session.close(code, text)

    def _forget_if_gone(self, relay: LiveRelay) -> None:
        if relay.link is not None or relay.sessions:
            return
        if self._relays.get(relay.relay_id) is relay:
            self.on_change()
            del self._relays[relay.relay_id]
            self.offers.remove(relay.relay_id)
        self._forget_leaving(relay)

    def _forget_leaving(self, relay: LiveRelay) -> None:
        leaving = self._leaving.get(relay.relay_id, {})
        if leaving.get(relay.instance) is relay:
            del leaving[relay.instance]
            if not leaving:
                del self._leaving[relay.relay_id]
        for later in (*leaving.values(), self._relays.get(relay.relay_id)):
            if later is not None and later.predecessor is relay:
                later.predecessor = None
