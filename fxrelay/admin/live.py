"""Pump: the running relay as its status pages see it."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

from fxrelay.admin.view import ClusterStatus, NodeStatus, ReservationStatus, ServiceStatus, Totals, UplinkState, UplinkStatus
from fxrelay.cluster_agent import ClusterAgent
from fxrelay.delivery.delivery import DeliveryDesk
from fxrelay.uplink import ports
from fxrelay.uplink.uplink import Uplink
from fxtunnel import __version__
from fxtunnel.engine.status import link_status
from fxtunnel.kit.process import memory_bytes
from fxtunnel.model import InstanceId, RelayId
from fxtunnel.protocol.credit import WindowBudget

_STATES: dict[ports.UplinkState, UplinkState] = {
    ports.UplinkState.CONNECTING: "connecting",
    ports.UplinkState.ENROLLING: "connecting",
    ports.UplinkState.UP: "up",
    ports.UplinkState.WAITING: "waiting",
    ports.UplinkState.STOPPED: "failed",
}


class LiveView:
    """Implements `RelayView` by looking at the uplinks and the deliveries when asked."""

    def __init__(
        self,
        relay_id: RelayId,
        instance: InstanceId,
        uplinks: Callable[[], Sequence[Uplink]],
        desk: DeliveryDesk,
        agent: ClusterAgent,
        budget: WindowBudget,
        memory_limit_bytes: int,
    ) -> None:
        self._relay_id = relay_id
        self._instance = instance
        self._uplinks = uplinks
        self._desk = desk
        self._agent = agent
        self._memory_limit_bytes = memory_limit_bytes
        self._budget = budget
        self._started = time.monotonic()

    def uplinks(self) -> list[UplinkStatus]:
        """See `RelayView`."""
        return [_uplink(uplink.statistics()) for uplink in self._uplinks()]

    def services(self) -> list[ServiceStatus]:
        """See `RelayView`."""
        streams = Counter(delivery.service.name for delivery in self._desk.deliveries)
        if self._desk.web is not None:
            streams.update(self._desk.web.services_in_use())
        counters = self._desk.counters
        return [
            ServiceStatus(
                service.name,
                service.protocol,
                str(service.target),
                streams[service.name],
                counters.opened_by_service.get(service.name, 0),
                dict(counters.refused_by_service.get(service.name, {})),
                {str(path): count for path, count in counters.paths_by_service.get(service.name, {}).items()},
            )
            for service in self._desk.services.services()
        ]

    def cluster(self) -> ClusterStatus:
        """See `RelayView`."""
        view, chooser, publisher = self._agent.view, self._agent.chooser, self._agent.publisher
        health = view.health()
        return ClusterStatus(
            store_down_s=math.ceil(health.store_down_s * 10) / 10,  # never 0 while it is down
            live=health.live,
            synced=health.synced,
            last_error=publisher.last_error or health.last_error,
            nodes=view.members.statistics(view.now),
            quarrels=tuple(sorted(member.server.server_id for member in view.everyone() if member.rivals)),
            switched_off=view.members.switched_off(),
            in_flight=len(view.in_flight),
            updates={outcome.value: count for outcome, count in view.members.outcomes.items()} | self._agent.dropped,
            published=publisher.published,
            decisions=chooser.decisions,
            failures=dict(chooser.failures),
            problems=self._agent.problems,
        )

    def node(self, name: str) -> NodeStatus | None:
        """See `RelayView`."""
        view, reservations, server_id = self._agent.view, self._agent.reservations, RelayId(name)
        member = view.members.get(server_id, view.now)
        if member is None:
            return None
        return NodeStatus(
            node=server_id,
            state=member.standing,
            seq=member.server.seq,
            sessions=member.server.sessions,
            placements=view.in_flight.counts(view.now).get(server_id, 0),
            gateways=tuple(sorted(member.server.gateways)),
            switched_off=view.members.switched_off().get(name, ()),
            user="" if reservations is None else reservations.holders.user(server_id, view.now_ms),
        )

    def reservations(self) -> ReservationStatus:
        """See `RelayView`."""
        agent = self._agent
        waiting = {str(service): count for service, count in agent.chooser.waiting().items()}
        if agent.reservations is None:
            return ReservationStatus(0, 0, waiting, {}, {}, "")
        reservations = agent.reservations
        reporter = reservations.reporter
        held = len(reservations.holders.users(agent.view.now_ms))
        return ReservationStatus(
            held, len(reservations.leases), waiting, dict(reporter.counts), dict(reporter.rejections), reservations.last_error
        )

    def totals(self) -> Totals:
        """See `RelayView`."""
        sessions = [session for uplink in self._uplinks() for session in uplink.statistics().sessions]
        return Totals(
            relay_id=self._relay_id,
            instance=self._instance,
            version=__version__,
            uptime_s=round(time.monotonic() - self._started, 1),
            streams=len(self._desk.deliveries) + (self._desk.web.streams if self._desk.web is not None else 0),
            streams_opened=sum(self._desk.counters.opened_by_service.values()),
            resumed=sum(session.resumed for session in sessions),
            memory_bytes=memory_bytes(),
            memory_limit_bytes=self._memory_limit_bytes,
            is_draining=self._desk.is_draining,
            window_bytes={"first": self._budget.promised_bytes, "grown": self._budget.grown_bytes},
        )


def _uplink(uplink: ports.UplinkStatistics) -> UplinkStatus:
    return UplinkStatus(
        uplink.gateway_id,
        uplink.url,
        _STATES[uplink.state],
        uplink.epoch,
        round(time.time() - uplink.since_unix, 1) if uplink.state is ports.UplinkState.UP else 0.0,
        round(max(0.0, uplink.next_try_unix - time.time()), 1) if uplink.state is ports.UplinkState.WAITING else None,
        uplink.last_error,
        uplink.attempts,
        tuple(link_status(session) for session in uplink.sessions),
    )
