"""Task: this relay's part in its cluster: what it publishes, what it knows of the others, and how it chooses among them."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import trio

from fxrelay.admitting.memory import SharedMemory
from fxrelay.balance.chooser import Balancing, PoolChooser
from fxrelay.balance.entries import Scripts
from fxrelay.balance.environment import ClusterEnvironment
from fxrelay.balance.filters import Pool
from fxrelay.balance.model import Action
from fxrelay.balance.path_rules import PathRules
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.balance.seating import Queueing, SeatRules
from fxrelay.balance.workers import ScriptLimits
from fxrelay.cluster.follow import FollowConfig, Follower
from fxrelay.cluster.gather import Gatherer
from fxrelay.cluster.members import Ages, MemberState
from fxrelay.cluster.opening import open_cluster
from fxrelay.cluster.placement_news import PlacementNews
from fxrelay.cluster.programs import ProgramBounds
from fxrelay.cluster.publish import Publisher, PublisherConfig
from fxrelay.cluster.server import ServerObject
from fxrelay.cluster.static_data import site_environment
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxrelay.forgetting import Forgetter
from fxrelay.reserving.reservation_cache import ReservingConfig
from fxrelay.reserving.reservations import Reservations
from fxrelay.reserving.seats import StreamSeating
from fxrelay.service_settings import ServiceSection
from fxrelay.settings import RelaySettings
from fxrelay.uplink.ports import UplinkState, UplinkStatistics
from fxtunnel import __version__
from fxtunnel.engine.reactor import Reactor
from fxtunnel.kit.process import keep_going
from fxtunnel.model import GatewayId, InstanceId, RelayId, ServiceName

logger = logging.getLogger(__name__)

TUNNEL_POLL_S: Final = 0.5
TOLD_WITHIN_S: Final = 2.0
"""After this long gateways know that this relay lacks its store (`Load.reluctant`)."""
READS_BEFORE_STALE: Final = 3
"""While live updates are down the store is read so often within `stale_s`: one reading may fail, and what is read is not new itself."""


@dataclass(frozen=True, slots=True)
class AgentContext:
    """Whose agent it is, and how it sees its tunnels."""

    relay_id: RelayId
    instance: InstanceId
    uplinks: Callable[[], Sequence[UplinkStatistics]]


class ClusterAgent:
    """Joins the cluster of the configuration. `run` it once. Implements `Listener` for what its parts hear of each other by the view.

    Raises:
        ConfigError: broker.json or a balancing script cannot be used.
    """

    def __init__(self, settings: RelaySettings, config_path: Path, context: AgentContext) -> None:
        cluster = settings.cluster
        self._settings = settings
        self._context = context
        self._store, self._transporter = open_cluster(cluster, settings.relay.state_dir)
        self.view = ClusterView(Ages(cluster.stale_s, cluster.down_s), listener=self)
        self._threads = Threads(self.view.store_doubted)
        self._scripts = Scripts(ScriptLimits(cluster.script_timeout_s, cluster.script_memory_bytes), config_path)
        following = FollowConfig(cluster.resync_s, min(cluster.resync_s, cluster.stale_s / READS_BEFORE_STALE))
        self._follower = Follower(self._store, self._transporter, self.view, self._threads, following)
        self._gatherer = Gatherer(settings, bounds=ProgramBounds(module_dir=config_path.parent))
        self._news = PlacementNews(self._transporter, self._threads)
        self.publisher = Publisher(
            PublisherConfig(context.relay_id, context.instance, __version__, cluster.publish_s),
            self._store,
            self._transporter,
            self.view,
            self._threads,
            (self._gatherer.measure, self._agent),
        )
        environment = ClusterEnvironment(context.relay_id, self._store, self._threads)
        self.chooser = PoolChooser(self.view, path_rules(settings), environment, self._news.tell, context.instance)
        self.chooser.reconfigure(balancing(settings, self._scripts, site_environment(settings.node, os.environ)))
        self.tickets = SharedMemory(self._store, self._threads, lambda: self.view.is_store_down)
        self._forgetter = Forgetter(self._store, self._threads, cluster.forget_after_s)
        self.reservations: Reservations | None = None
        if _needs_reservations(settings):
            reserving = ReservingConfig(context.relay_id, cluster.lease_s, cluster.on_lost_lease)
            self.reservations = Reservations(reserving, self._store, self._transporter, self.view)
            self.reservations.upkeep.may_have_sessions = self._may_have_sessions
            self.chooser.seating = StreamSeating(self.reservations)

    def ask_store(self) -> None:
        """See `Listener`."""
        self._follower.ask_store()

    def hear_reservation(self, text: str) -> bool:
        """See `Listener`."""
        return self.reservations is None or self.reservations.hear(text)

    def hear_end(self, server_id: RelayId, placed_ms: int) -> None:
        """See `Listener`."""
        self.publisher.hear_end(server_id, placed_ms)

    def may_have_missed(self) -> None:
        """See `Listener`."""
        self.publisher.session_ended()

    def use_reactor(self, reactor: Reactor) -> None:
        """Nodes for streams may be chosen in its thread from now on."""
        self._scripts.use_reactor(reactor)

    @property
    def is_cut_off(self) -> bool:
        """Whether the store does not answer, or may not: gateways should ask other relays first."""
        return self.view.health().store_down_s > 0

    def others_may(self, service: ServiceName, gateway_id: GatewayId) -> bool:
        """Whether the gateway has another relay for the service, to be asked if this one cannot decide without the store. Not once it has
        been told that this one lacks it: then it has asked the others before.
        """
        own, now = self._context.relay_id, self.view.now
        return self.view.health().store_down_s < TOLD_WITHIN_S and any(
            member.state is MemberState.UP and member.server.server_id != own and _serves(member.server, service, gateway_id)
            for member in self.view.members.members(now)
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with what this node says about itself, and with a store that is to remember reservations."""
        doubt = self.reservations.store_doubt if self.reservations is not None else ""
        return (*self._gatherer.problems, *((doubt,) if doubt else ()))

    @property
    def dropped(self) -> dict[str, int]:
        """What was read or heard, besides server objects, that no member of ours would have written."""
        return {"malformed-message": self.view.dropped_messages, "malformed-document": self._store.skipped}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish, follow and tell until cancelled. Started when the cluster has been read once, or could not be."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._scripts.run)
                nursery.start_soon(keep_going, "measuring metrics", self._gatherer.run)
                nursery.start_soon(keep_going, "telling placements", self._news.run)
                await nursery.start(self._follower.run)
                await nursery.start(self.publisher.run)
                if self.reservations is not None:
                    await nursery.start(self.reservations.run)
                nursery.start_soon(keep_going, "watching the tunnels", self._watch_tunnels)
                nursery.start_soon(keep_going, "forgetting nodes", self._forgetter.run)
                task_status.started()
        finally:
            if self.reservations is not None:
                with trio.CancelScope(shield=True):  # within two seconds
                    await self.reservations.close()
            self._transporter.close()
            self._store.close()

    def reconfigure(self, settings: RelaySettings, environ: Mapping[str, str]) -> None:
        """Pools, chains, ways and what this node says about itself, from a reloaded configuration. `environ`: see `site_environment`.

        Raises:
            ConfigError: a balancing script cannot be used; nothing has changed.
        """
        pools = balancing(settings, self._scripts, environ)
        self.chooser.path_rules = path_rules(settings)
        self.chooser.reconfigure(pools)
        self._gatherer.reconfigure(settings)
        self._settings = settings
        self.publisher.changed()
        if self.reservations is None and _needs_reservations(settings):
            logger.warning("pools with reservations or guard_start take effect at the next restart: until then they refuse")

    def _may_have_sessions(self, server_id: RelayId, user: str, since_ms: int) -> bool:
        member = self.view.members.get(server_id, self.view.now)
        if member is None:
            return False
        if member.server.measured_ms <= since_ms:  # a session that he began last is not told yet
            return True
        if not member.server.sessions:
            return False
        listed = json.loads(member.server.text).get("sessionList")
        return user in {session.get("owner") for session in listed if isinstance(session, dict)} if isinstance(listed, list) else True

    def _usable(self) -> list[UplinkStatistics]:
        """The tunnels by which others may redirect to this node."""
        return [uplink for uplink in self._context.uplinks() if uplink.state is UplinkState.UP and not uplink.is_draining]

    def _agent(self) -> dict[str, Any]:
        rivals = self._rivals()
        return {
            **({"rivals": rivals} if rivals else {}),
            "tunnels": [
                {
                    "gatewayId": uplink.gateway_id,
                    "since": int(uplink.since_unix * 1000),
                    "streams": sum(session.mux.streams for session in uplink.sessions),
                }
                for uplink in self._usable()
            ],
        }

    def _rivals(self) -> list[InstanceId]:
        """Other processes that call themselves as this one does: who only reads the store sees one of them."""
        member = self.view.members.get(self._context.relay_id, self.view.now)
        return sorted({member.server.instance, *member.rivals} - {self._context.instance}) if member is not None and member.rivals else []

    async def _watch_tunnels(self) -> None:
        """Others redirect to this node by its tunnels: tell them at once when one comes or goes."""
        known: set[GatewayId] = set()
        while True:
            up = {uplink.gateway_id for uplink in self._usable()}
            if up != known:
                known = up
                self.publisher.changed()
            await trio.sleep(TUNNEL_POLL_S)


def _serves(server: ServerObject, service: ServiceName, gateway_id: GatewayId) -> bool:
    return gateway_id in server.gateways and service in server.services and not server.draining


def _needs_reservations(settings: RelaySettings) -> bool:
    return any(section.is_pool and (section.is_login or section.guard_start) for section in settings.services)


def path_rules(settings: RelaySettings) -> PathRules:
    """How this relay may reach other nodes."""
    cluster = settings.cluster
    networks = tuple(ip_network(network) for network in cluster.networks)
    return PathRules(RelayId(settings.relay.id), cluster.paths, cluster.force_indirect, networks, settings.relay.address)


def pool_of(section: ServiceSection) -> Pool:
    """The nodes a service may run on."""
    nodes = None if section.nodes == "*" else frozenset(RelayId(node) for node in section.nodes)
    return Pool(section.name, nodes, section.where or None)


def seat_rules(section: ServiceSection) -> SeatRules:
    """How the streams of a pool reserve nodes."""
    queue = section.queue
    return SeatRules(
        section.reservations,
        OwnerRelogin(section.owner_relogin),
        int(section.linger_s * 1000),
        section.hold_while_sessions,
        section.guard_start,
        Queueing(queue.max, queue.wait_s) if queue is not None else None,
    )


def balancing(settings: RelaySettings, scripts: Scripts, environ: Mapping[str, str]) -> dict[ServiceName, Balancing]:
    """Every pool of the configuration with its chain.

    Raises:
        ConfigError: an entry of a chain does not exist or cannot be used.
    """
    return {
        ServiceName(section.name): Balancing(
            pool_of(section),
            scripts.chain(section.balance, section.name, environ),
            Action.LOGIN if section.is_login and section.login is None else Action.START,
            seat_rules(section),
        )
        for section in settings.services
        if section.is_pool
    }
