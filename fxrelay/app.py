"""Task: a whole relay: composes the parts, runs them, reloads them, drains them. The only module that names them all."""

import logging
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fxrelay import settings as config
from fxrelay.admin.live import LiveView
from fxrelay.admin.pages import make_app
from fxrelay.admitting.composing import entry_rules, owner_limits
from fxrelay.admitting.stream_admission import StreamAdmission
from fxrelay.admitting.streams import StreamEntries
from fxrelay.balance.workers import Workers
from fxrelay.cluster.static_data import site_environment
from fxrelay.cluster_agent import AgentContext, ClusterAgent
from fxrelay.delivery.composing import delivery_limits, resolved
from fxrelay.delivery.delivery import DeliveryDesk, DeliveryLimits
from fxrelay.delivery.placing import Placer
from fxrelay.delivery.services import AnyService, PoolService, ServiceTable
from fxrelay.logins.composing import guarded_services, login_services
from fxrelay.logins.gate import LoginGate, Timing
from fxrelay.logins.login import HeldLogin
from fxrelay.settings import RelaySettings
from fxrelay.uplink.composing import session_config, uplink_config
from fxrelay.uplink.forerunners import Forerunners
from fxrelay.uplink.gateway_file import GatewayFile, load_gateway_file
from fxrelay.uplink.identity import Identity, load_identity
from fxrelay.uplink.ports import LinkSession, UplinkSessionOwner
from fxrelay.uplink.uplink import Uplink, UplinkEnvironment
from fxrelay.web import access
from fxrelay.web.composing import files_of_a_stream, web_limits, web_rules
from fxrelay.web.desk import WebDesk
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.session import Session
from fxtunnel.errors import FxError
from fxtunnel.kit import logs
from fxtunnel.kit.files import held_alone
from fxtunnel.kit.listeners import Inherited
from fxtunnel.kit.notify import LoopNotifier, Notifier
from fxtunnel.kit.pages import listening_for_pages, serve_pages_on
from fxtunnel.kit.process import (
    POLL_S,
    Reloads,
    feed_watchdog,
    follow_launcher,
    keep_going,
    let_arrive,
    let_finish,
    open_files,
    raise_file_limit,
    say_ready,
    settle,
    wait_until,
    watch_signals,
)
from fxtunnel.kit.settings import Address
from fxtunnel.model import GatewayId, RelayId, SessionId
from fxtunnel.protocol.credit import WindowBudget

logger = logging.getLogger(__name__)

SWEEP_S: Final = 5.0
"""Between two looks for idle streams, whose limit is minutes at least."""
RESOLVE_EVERY_S: Final = 30.0
"""For targets given by name: how long a service that has moved is still looked for at its old address."""
READY_POLL_S: Final = 0.02
PAGES_END_S: Final = 1.0
"""For open status pages to be hung up on; a successor waits for the address."""
RESERVED_FILES: Final = 48
"""Descriptors kept for uplinks, the store, scripts and status, so that streams can never take the last one."""
PLANNED_DRAIN_S: Final = 86_400.0
"""For streams to end after `fxrelay drain`, which waits for as long as the administrator likes: a day at most."""


def run(settings: RelaySettings, config_path: Path) -> int:
    """Run the relay until it is told to stop; returns the exit code. Blocks.

    Raises:
        FxError: it cannot work here; alone, or in a group.
    """
    configure_logs(settings)
    reactor = Reactor()
    notifier = LoopNotifier.of_this_process()
    relay = Relay(reactor, settings, config_path, notifier, raise_file_limit())
    try:
        return reactor.host_trio(relay.serve)
    finally:
        relay.close()
        reactor.close()
        notifier.close()


def configure_logs(settings: RelaySettings) -> None:
    """Send what is logged to standard error; of the requests of HTTP services only if that is wanted."""
    logs.configure(settings.log.level, settings.log.style, sys.stderr)
    access.logger.setLevel(logging.INFO if settings.log.access else logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Parts:
    """What serves streams in a relay that knows who it is."""

    agent: ClusterAgent
    placer: Placer
    admission: StreamAdmission
    gate: LoginGate
    web: WebDesk


class Relay:
    """Everything one fxrelay process consists of. Also the factory of its uplinks' sessions."""

    def __init__(self, reactor: Reactor, settings: RelaySettings, config_path: Path, notifier: Notifier, file_limit: int) -> None:
        self._reactor = reactor
        self._file_limit = file_limit
        self._own_files = open_files()
        self._settings = settings
        self._config_path = config_path
        self._notifier = notifier
        self._inherited = Inherited.from_environ(os.environ, os.getpid(), notifier)
        self._state_dir = ExitStack()
        self._status = ExitStack()
        self._pages = trio.CancelScope()
        self._pages_ended = trio.Event()
        self._stop = trio.Event()
        self._reloads = Reloads()
        self._services = ServiceTable()
        self._desk = DeliveryDesk(reactor, self._services, self._delivery_limits(settings))
        self._budget = WindowBudget(settings.limits.memory_bytes)
        self._uplinks: list[Uplink] = []
        self._composed: Parts | None = None
        self._owners = Workers(owner_limits(settings), config_path.absolute().parent)
        self._failed = 0

    async def serve(self) -> int:
        """Serve until SIGTERM, or until no gateway is left that could be tried again. Returns the exit code.

        Raises:
            ConfigError: a gateway.json or the state directory cannot be used.
        """
        files = [await trio.to_thread.run_sync(load_gateway_file, gateway.file) for gateway in self._settings.gateways]
        identity = await load_identity(self._settings.relay.state_dir, RelayId(self._settings.relay.id))
        self._composed = parts = await self._compose(identity)
        agent = parts.agent
        forerunners = Forerunners(identity)
        environment = UplinkEnvironment(is_reluctant=lambda: agent.is_cut_off, earlier=forerunners.earlier)
        self._uplinks = self._make_uplinks(files, identity, environment)
        memory_bytes = self._settings.limits.memory_bytes
        view = LiveView(identity.relay_id, identity.instance, lambda: self._uplinks, self._desk, agent, self._budget, memory_bytes)
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_signals, self._reloads.ask, self._stop.set)
            await nursery.start(follow_launcher, self._notifier, self._stop.set)
            # Before the cluster or a gateway hears of us: if another process holds this directory, that one is this relay, and stays.
            self._state_dir.enter_context(held_alone(self._settings.relay.state_dir))
            forerunners.load()
            status = self._status.enter_context(listening_for_pages(self._settings.relay.status_address, self._inherited))
            await nursery.start(agent.run)
            await nursery.start(parts.placer.run)
            await nursery.start(parts.gate.run)
            await nursery.start(parts.web.run)
            await nursery.start(self._serve_pages, view, status)
            self._inherited.close()
            nursery.start_soon(keep_going, "ending idle streams", self._sweep)
            nursery.start_soon(keep_going, "resolving targets", self._keep_resolved)
            nursery.start_soon(self._reloads.run, self._load_again, self._notifier)
            nursery.start_soon(feed_watchdog, self._notifier)
            nursery.start_soon(self._announce)
            for uplink in self._uplinks:
                nursery.start_soon(self._run_uplink, uplink)
            nursery.start_soon(self._tell_ready)
            settle()
            await self._stop.wait()
            if not self._has_failed:
                if not (self._inherited.is_handed_on and await self._make_way(forerunners)):
                    self._notifier.stopping()
                    self._take_nothing_more(self._settings.limits.drain_s)
                await self._let_finish()
            nursery.cancel_scope.cancel()
        return 1 if self._has_failed else 0

    async def _compose(self, identity: Identity) -> Parts:
        """Make the parts, tell them of each other, and apply the configuration to them. None of them runs yet.

        Raises:
            ConfigError: a key, a certificate or a script of the configuration cannot be used.
        """
        settings, desk = self._settings, self._desk
        context = AgentContext(identity.relay_id, identity.instance, lambda: [uplink.statistics() for uplink in self._uplinks])
        agent = ClusterAgent(settings, self._config_path, context)
        agent.use_reactor(self._reactor)
        desk.placer = placer = Placer(agent.chooser, settings.cluster.paths, agent.chooser)
        desk.node = identity.relay_id
        desk.redirected_ended = agent.publisher.session_ended
        admission = StreamAdmission(agent.tickets, identity.relay_id)
        admission.reconfigure(await trio.to_thread.run_sync(entry_rules, settings, self._owners, self._directory))
        placer.entries = StreamEntries(admission, lambda name: isinstance(self._services.get(name), PoolService))
        gate = LoginGate(agent.chooser, agent.view, HeldLogin, Timing(settings.cluster.lease_s, settings.cluster.down_s))
        gate.reservations = agent.reservations
        gate.reconfigure(await trio.to_thread.run_sync(login_services, settings), guarded_services(settings))
        desk.web = web = WebDesk(desk, agent.chooser, identity.relay_id, web_limits(settings.limits), gate)
        web.admission, web.others_may = admission, agent.others_may
        web.reconfigure(await trio.to_thread.run_sync(web_rules, settings))
        self._services.replace(await resolved(settings.services))
        return Parts(agent, placer, admission, gate, web)

    @property
    def _parts(self) -> Parts:
        assert self._composed is not None  # whoever asks was started by `serve`
        return self._composed

    def close(self) -> None:
        """End the processes of owner scripts, and let go of the status socket and the state directory."""
        self._owners.close()
        self._status.close()
        self._state_dir.close()

    @property
    def _directory(self) -> Path:
        """Where the configuration is."""
        return self._config_path.absolute().parent

    @property
    def _has_failed(self) -> bool:
        """Whether no gateway is left that could be tried again. A node that only reports has none to lose."""
        return bool(self._uplinks) and self._failed == len(self._uplinks)

    def new_session(self, gateway_id: GatewayId, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """A session of one gateway; the desk hears who asks."""
        on_open = partial(self._desk.on_open, gateway_id=gateway_id)
        return Session(self._reactor, session_id, owner, session_config(self._settings), self._budget, on_open)

    def _delivery_limits(self, settings: RelaySettings) -> DeliveryLimits:
        """As configured, as far as there are descriptors: one a stream, or all the links that a connection to an HTTP pool may have."""
        spare = self._file_limit - self._own_files - max(RESERVED_FILES, self._file_limit // 10)
        most = max(1, spare // files_of_a_stream(settings.services))
        if most < settings.limits.streams:
            logger.info("limits.streams is %d; with %d files it is %d", settings.limits.streams, self._file_limit, most)
        return delivery_limits(settings, most)

    def _make_uplinks(self, files: list[GatewayFile], identity: Identity, environment: UplinkEnvironment) -> list[Uplink]:
        settings = self._settings
        offers = self._services.offers()
        uplinks = []
        for gateway, file in zip(settings.gateways, files, strict=True):
            sessions, timing = GatewaySessions(self, file.gateway_id), uplink_config(settings, gateway)
            uplinks.append(Uplink(file, identity, offers, sessions, timing, environment))
        return uplinks

    async def _run_uplink(self, uplink: Uplink) -> None:
        """One gateway that can never work does not end the others; when none is left, the relay ends."""
        try:
            await uplink.run()
        except FxError as exc:
            logger.error("%s", exc)
            self._failed += 1
            if self._has_failed:
                self._stop.set()

    async def _tell_ready(self) -> None:
        """READY when each gateway has a tunnel, or could not be had at the first attempt.

        A process that is stopped before it serves leaves clients to its predecessor, whose time is limited (`limits.handover_s`): restarts
        that follow each other as soon as one is done must not add up.
        """
        await wait_until(lambda: self._stop.is_set() or all(uplink.statistics().has_tried for uplink in self._uplinks))
        if not self._stop.is_set():
            self._notifier.ready()

    async def _announce(self) -> None:
        """The ready line: the first tunnel is up, or there is none to wait for."""
        if not self._uplinks:
            say_ready(f"fxrelay ready: {self._settings.relay.id} reports to its cluster; no gateway")
            return
        while True:
            for uplink in self._uplinks:
                statistics = uplink.statistics()
                if statistics.has_tunnel:
                    names = ", ".join(offer.name for offer in self._services.offers())
                    say_ready(f"fxrelay ready: {self._settings.relay.id} at {statistics.url}; services: {names or 'none'}")
                    return
            await trio.sleep(READY_POLL_S)

    async def _serve_pages(self, view: LiveView, status: socket.socket, *, task_status: trio.TaskStatus[Address]) -> None:
        """What administrators ask, until there is a successor to ask."""
        with self._pages, self._status:
            await serve_pages_on(make_app(view, self._drain_as_planned), status, task_status=task_status)
        self._pages_ended.set()

    def _drain_as_planned(self) -> None:
        """Nothing new from now on; the process stays until it is stopped."""
        logger.info("draining, as an administrator wished: no more streams until the next restart")
        self._take_nothing_more(PLANNED_DRAIN_S)

    async def _make_way(self, forerunners: Forerunners) -> bool:
        """Let a successor have this node's name; serve until it does. Returns whether it does at all gateways."""
        limits = self._settings.limits
        serves, deadline_s = not self._desk.is_draining, limits.handover_s + limits.drain_s
        if serves:
            self._parts.agent.publisher.hush()
            for uplink in self._uplinks:
                uplink.make_way(deadline_s)
        await forerunners.add_ourselves(deadline_s, handover=serves)
        self._pages.cancel()
        with trio.move_on_after(PAGES_END_S):
            await self._pages_ended.wait()
        self._state_dir.close()
        self._notifier.stopping()
        with trio.move_on_after(limits.handover_s if serves else 0):
            await wait_until(lambda: all(uplink.is_relieved for uplink in self._uplinks))
            self._parts.web.drain()  # clients' connections would otherwise stay for their next request
            return True
        return False

    def _take_nothing_more(self, drain_s: float) -> None:
        self._desk.is_draining = True
        self._parts.agent.publisher.leave()
        self._parts.web.drain()
        for uplink in self._uplinks:
            uplink.drain(drain_s)

    async def _let_finish(self) -> None:
        drain_s = self._settings.limits.drain_s
        until = trio.current_time() + drain_s
        await let_finish("streams", lambda: self._desk.streams, drain_s)
        self._desk.abort_all()
        await let_arrive(lambda: [session for uplink in self._uplinks for session in uplink.sessions()], until)
        await trio.sleep(POLL_S)  # FINs and RESETs that were just queued still have to leave
        async with trio.open_nursery() as nursery:
            for uplink in self._uplinks:
                nursery.start_soon(uplink.shutdown, Code.SHUTDOWN, "the relay is stopping")

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self._desk.end_idle()

    async def _keep_resolved(self) -> None:
        while True:
            await trio.sleep(RESOLVE_EVERY_S)
            sections = self._settings.services
            fresh = await resolved(sections, self._services)
            if sections is self._settings.services:
                self._services.replace(fresh)

    async def _load_again(self) -> None:
        written = await trio.to_thread.run_sync(config.load, self._config_path, os.environ)
        fresh, waiting = config.take_up(self._settings, written)
        services = await resolved(fresh.services, self._services)
        rules = await trio.to_thread.run_sync(web_rules, fresh)
        entries = await trio.to_thread.run_sync(entry_rules, fresh, self._owners, self._directory)
        logins = await trio.to_thread.run_sync(login_services, fresh)
        environ = await trio.to_thread.run_sync(site_environment, fresh.node, os.environ)
        parts = self._parts
        parts.agent.reconfigure(fresh, environ)  # first: it refuses the whole configuration if a script cannot be used
        parts.web.limits = web_limits(fresh.limits)
        parts.web.reconfigure(rules)
        parts.admission.reconfigure(entries)
        parts.gate.reconfigure(logins, guarded_services(fresh))
        self._apply(fresh, services)
        if waiting:
            logger.warning("changed, but not before the next restart: %s", ", ".join(waiting))
        logger.info("reloaded %s", self._config_path)

    def _apply(self, fresh: RelaySettings, services: list[AnyService]) -> None:
        """Services and limits of a reloaded configuration, as far as it counts by now."""
        self._services.replace(services)
        self._desk.limits = self._delivery_limits(fresh)
        self._parts.placer.paths = fresh.cluster.paths
        for uplink in self._uplinks:
            uplink.update_services(self._services.offers())
        configure_logs(fresh)
        self._settings = fresh


class GatewaySessions:
    """Implements `SessionFactory` for one gateway."""

    def __init__(self, relay: Relay, gateway_id: GatewayId) -> None:
        self._relay = relay
        self._gateway_id = gateway_id

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """See `SessionFactory`."""
        return self._relay.new_session(self._gateway_id, owner, session_id)
