"""Pump: what becomes of a relay's sessions is told to its registry."""

import logging
from typing import Protocol

from fxgateway.tunnels.live_relay import LiveRelay
from fxtunnel.codes import Code
from fxtunnel.engine.session import Session

logger = logging.getLogger(__name__)


class Told(Protocol):
    """A registry, as it hears of sessions."""

    def on_change(self) -> None:
        """What a relay could take may be another."""

    def session_closed(self, relay: LiveRelay, session: Session, code: Code, text: str) -> None:
        """See `Registry`."""


class RelaySessions:
    """Implements `SessionOwner` for the sessions of one relay."""

    __slots__ = ("_registry", "_relay")

    def __init__(self, registry: Told, relay: LiveRelay) -> None:
        self._registry = registry
        self._relay = relay

    def on_link_down(self, session: Session, reason: str) -> None:
        """The relay dials again."""
        held = len(session.mux.streams)
        logger.info("link of relay %s lost: %s; streams held: %d", self._relay.relay_id, reason, held, extra={"tunnel": session.id})
        self._registry.on_change()

    def on_closed(self, session: Session, code: Code, text: str) -> None:
        """See `SessionOwner`."""
        self._registry.session_closed(self._relay, session, code, text)
