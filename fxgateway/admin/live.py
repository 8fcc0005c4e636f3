"""Pump: the running gateway as the admin pages see it."""

import time
from collections.abc import Callable

from fxgateway.admin.view import DoorStatus, RelayState, RelayStatus, Totals
from fxgateway.doors.doors import Doors
from fxgateway.routing.offers import Readiness
from fxgateway.tunnels.live_relay import LiveRelay
from fxgateway.tunnels.registry import Registry
from fxtunnel import __version__
from fxtunnel.engine.status import link_status
from fxtunnel.kit.process import memory_bytes
from fxtunnel.model import GatewayId
from fxtunnel.protocol.credit import WindowBudget


class LiveView:
    """Implements `GatewayView` by looking at the registry and the doors when asked."""

    def __init__(self, gateway_id: GatewayId, registry: Registry, doors: Doors, budget: WindowBudget, memory_limit_bytes: int) -> None:
        self.certificate_expires_unix = 0.0
        self.access_dropped: Callable[[], int] = int
        self.listening: tuple[str, ...] = ()
        self.memory_limit_bytes = memory_limit_bytes
        self.relays_refused: dict[str, int] = {}
        self.is_drained = False
        """An administrator wants no more clients here."""
        self._gateway_id = gateway_id
        self._budget = budget
        self._registry = registry
        self._doors = doors
        self._started = time.monotonic()

    def note_drain(self) -> None:
        """See `is_drained`."""
        self.is_drained = True

    def relays(self) -> list[RelayStatus]:
        """See `GatewayView`."""
        now = time.monotonic()
        return [_relay(relay, self._registry.leaving(relay.relay_id), now) for relay in self._registry.relays()]

    def doors(self) -> list[DoorStatus]:
        """See `GatewayView`."""
        return [
            DoorStatus(
                door.name,
                str(door.config.listen),
                door.leads_to,
                len(door.clients),
                door.counters.accepted,
                dict(door.counters.refused),
                door.counters.bytes_in,
                door.counters.bytes_out,
            )
            for door in self._doors.shown()
        ]

    def ready(self) -> tuple[bool, list[str]]:
        """See `GatewayView`."""
        if self._registry.is_draining or self.is_drained:
            return False, ["the gateway is draining"]
        able = [relay for relay in self._registry.relays() if relay.readiness is not Readiness.NONE]
        served = {offer.name for relay in able for offer in relay.offers}
        reasons = [
            f"no relay for service {service} of door {door.name}"
            for door in self._doors.open_doors()
            for service in sorted(door.services - served)
        ]
        return not reasons, reasons

    def totals(self) -> Totals:
        """See `GatewayView`."""
        instances = [one for relay in self._registry.relays() for one in (relay, *self._registry.leaving(relay.relay_id))]
        sessions = [session.statistics() for relay in instances for session in relay.sessions.values()]
        return Totals(
            gateway_id=self._gateway_id,
            version=__version__,
            uptime_s=round(time.monotonic() - self._started, 1),
            listening=self.listening,
            streams=sum(s.mux.streams for s in sessions),
            streams_opened=self._doors.accepted,
            resumed=self._registry.resumed + sum(s.resumed for s in sessions),
            memory_bytes=memory_bytes(),
            memory_limit_bytes=self.memory_limit_bytes,
            relays_refused=dict(self.relays_refused),
            window_bytes={"first": self._budget.promised_bytes, "grown": self._budget.grown_bytes},
            certificate_expires_unix=self.certificate_expires_unix,
            access_dropped=self.access_dropped(),
        )


def _relay(relay: LiveRelay, leaving: tuple[LiveRelay, ...], now: float) -> RelayStatus:
    state: RelayState
    if relay.draining or relay.is_drained:
        state = "draining"
    elif relay.readiness <= Readiness.RELUCTANT:
        state = "up"
    else:
        state = "held" if relay.sessions else "connecting"
    return RelayStatus(
        relay.relay_id,
        relay.instance,
        relay.epoch,
        state,
        relay.link.remote_address if relay.link is not None else "",
        round(now - relay.since, 1),
        tuple(offer.name for offer in relay.offers),
        tuple(link_status(session.statistics()) for session in relay.sessions.values()),
        sum(instance.open_streams for instance in leaving),
    )
