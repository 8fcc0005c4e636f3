"""Task: a whole gateway: composes the parts, runs them, reloads them, drains them. The only module that names them all."""

import logging
import os
import secrets
import ssl
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import trio

from fxgateway import settings as config
from fxgateway.access_log import AccessLog
from fxgateway.admin.live import LiveView
from fxgateway.admin.pages import make_app
from fxgateway.certificates import Certificates, load_certificates
from fxgateway.door_settings import DoorSettings
from fxgateway.doors.door import DoorConfig, DoorRelays
from fxgateway.doors.doors import Doors
from fxgateway.routing.admission import Admission, AdmissionLimits
from fxgateway.routing.hosts import HostTable, Route
from fxgateway.routing.preread_router import DoorKind, PrereadRouter
from fxgateway.sandbox import Sandbox
from fxgateway.settings import GatewaySettings
from fxgateway.steering import AdminPages, Steering
from fxgateway.tunnels.control import YIELDED_BEATS, ControlConfig
from fxgateway.tunnels.identities import Identities
from fxgateway.tunnels.peer_processes import PeerProcesses
from fxgateway.tunnels.port import PortLimits, TunnelPort
from fxgateway.tunnels.registry import Registry, RegistryLimits
from fxgateway.tunnels.succession import Succession
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.engine.reactor import Reactor
from fxtunnel.errors import ConfigError, FxError
from fxtunnel.kit import logs
from fxtunnel.kit.listeners import Inherited, bound_address, listen
from fxtunnel.kit.notify import LoopNotifier, Notifier
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
from fxtunnel.model import GatewayId, ServiceName
from fxtunnel.protocol.alpn import spoken_by
from fxtunnel.protocol.credit import WindowBudget

logger = logging.getLogger(__name__)

SWEEP_S: Final = 5.0
"""Between two looks for idle clients, overdue instances and sources that can be forgotten."""
GOODBYE_S: Final = 1.0
"""For control links to end once they have been told to."""
RETRY_AFTER_S: Final = 1.0
"""How long relays wait before they dial a gateway that has said goodbye; a restart takes about that."""
FILES_OF_ITS_OWN: Final = 16
"""Listeners, epolls and wake-up descriptors that are opened after the limits have been worked out."""
RESERVED_FILES: Final = 32
"""Descriptors kept for tunnels, status and reloads, so that clients can never take the last one."""


def run(settings: GatewaySettings, config_path: Path) -> int:
    """Run the gateway until it is told to stop; returns the exit code. Blocks.

    Raises:
        FxError: it cannot work here; alone, or in a group.
    """
    logs.configure(settings.log.level, settings.log.style, sys.stderr)
    notifier = LoopNotifier.of_this_process()
    sandbox = Sandbox(settings, config_path)
    sandbox.enter(os.environ.get("NOTIFY_SOCKET", ""))  # while there is one thread only
    reactor = Reactor()
    gateway = Gateway(reactor, settings, config_path, notifier, raise_file_limit(), sandbox)
    try:
        reactor.host_trio(gateway.serve)
    finally:
        reactor.close()
        notifier.close()
    return 0


class Gateway:
    """One fxgateway process, with all its parts."""

    def __init__(
        self, reactor: Reactor, settings: GatewaySettings, config_path: Path, notifier: Notifier, file_limit: int, sandbox: Sandbox
    ) -> None:
        self._sandbox = sandbox
        self._reactor = reactor
        self._settings = settings
        self._config_path = config_path
        self._notifier = notifier
        self._file_limit = file_limit
        self._own_files = open_files() + FILES_OF_ITS_OWN
        self._stop = trio.Event()
        self._name = self._process()
        logger.info("this is process %s of the gateway, pid %d", self._name, os.getpid())
        self._reloads = Reloads()
        self._admission = self._make_admission(settings)
        budget = WindowBudget(settings.limits.memory_bytes)
        self._registry = Registry(reactor, session_config(settings), budget, registry_limits(settings))
        self._access = AccessLog()
        self._relays = self._make_relays()
        self._doors = Doors(reactor, self._relays, self._admission)
        self._identities = Identities(settings.tunnel.identities_path)
        self._view = LiveView(GatewayId(settings.tunnel.gateway_id), self._registry, self._doors, budget, settings.limits.memory_bytes)
        self._view.access_dropped = lambda: self._access.dropped
        self._certificates = load_certificates(settings, spoken_by(self._name))
        self._view.certificate_expires_unix = self._certificates.tunnel_expires_unix
        self._port = TunnelPort(
            self._certificates.tunnel,
            GatewayId(settings.tunnel.gateway_id),
            self._identities,
            self._registry,
            port_limits(settings),
            ControlConfig(
                settings.liveness.heartbeat_s,
                settings.liveness.dead_after_s,
                settings.resume.hold_s,
                settings.limits.hello_timeout_s,
                self._name,
            ),
            self._make_peer_processes(),
        )
        self._view.relays_refused = self._port.refused
        self._inherited = self._make_inherited()
        self._steering = Steering(self._registry, self._doors, self._view.note_drain)
        steering = Address(path=settings.tunnel.steering_path)
        self._pages = AdminPages(make_app(self._view), settings.admin.listen, self._steering.ask, steering, self._inherited)

    async def serve(self) -> None:
        """Listen, serve, and return when everything has ended after SIGTERM.

        Raises:
            FxError: an address cannot be listened on, or the state cannot be read.
        """
        inherited = self._inherited
        await trio.to_thread.run_sync(self._identities.load)
        tunnel_socket = listen(self._settings.tunnel.listen, inherited)
        await trio.to_thread.run_sync(self._access.open, self._settings.log.access)
        self._doors.apply(self._door_configs(self._settings, self._certificates), inherited)
        self._doors.hold()
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_signals, self._reloads.ask, self._stop.set)
            await nursery.start(self._await_turn)
            await nursery.start(self._follow_earlier)
            has_relays = any(relay.revoked_unix is None for relay in self._identities.known())
            self._doors.hold_until_served(self._settings.limits.relay_wait_s if has_relays else 0.0)
            await nursery.start(partial(self._port.run, [trio.SocketListener(trio.socket.from_stdlib_socket(tunnel_socket))]))
            admin = await nursery.start(self._serve_pages)
            inherited.close()
            nursery.start_soon(keep_going, "watching identities", partial(self._identities.watch, self._registry.revoke))
            nursery.start_soon(keep_going, "ending idle clients", self._sweep)
            nursery.start_soon(self._reloads.run, self._load_again, self._notifier)
            nursery.start_soon(feed_watchdog, self._notifier)
            self._announce(str(bound_address(tunnel_socket)), str(admin))
            nursery.start_soon(self._tell_ready)
            settle()
            await self._stop.wait()
            await self._drain()
            await trio.to_thread.run_sync(self._access.close)
            nursery.cancel_scope.cancel()

    # What a worker does differently (fxgateway/workers/worker.py).

    def _make_admission(self, settings: GatewaySettings) -> Admission:
        return Admission(self._admission_limits(settings))

    def _make_relays(self) -> DoorRelays:
        return self._registry

    def _make_peer_processes(self) -> PeerProcesses:
        self._succession = Succession(self._name)
        return self._succession

    def _make_inherited(self) -> Inherited:
        return Inherited.from_environ(os.environ, os.getpid(), self._notifier)

    def _process(self) -> str:
        """A name for this run of the gateway, under which relays know it."""
        return secrets.token_hex(8)

    async def _await_turn(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Called when everything is prepared. `started()` when the process before us has let go of the addresses."""
        await follow_launcher(self._notifier, self._stop.set, task_status=task_status)

    async def _follow_earlier(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Pass relays on to earlier processes of this gateway, and take those that later ones pass on to us."""
        await self._succession.run(self._inherited, task_status=task_status)

    async def _serve_pages(self, *, task_status: trio.TaskStatus[Address]) -> None:
        await self._pages.run(task_status=task_status)

    def _has_successor(self) -> bool:
        return self._inherited.is_handed_on

    async def _let_clients_finish(self, drain_s: float) -> None:
        await let_finish("clients", lambda: self._doors.clients, drain_s)

    def _announce(self, tunnel: str, admin: str) -> None:
        doors = ", ".join(f"{door.leads_to} on {self._doors.bound[str(door.config.listen)]}" for door in self._doors.open_doors())
        self._view.listening = (tunnel, *self._doors.bound.values(), admin)
        say_ready(f"fxgateway ready: tunnels on {tunnel}; doors: {doors or 'none'}; admin on {admin}")

    async def _tell_ready(self) -> None:
        """Report READY once clients are served, so that a restart right after this one cannot leave them waiting for both."""
        await wait_until(lambda: self._stop.is_set() or not self._doors.is_waiting)
        if not self._stop.is_set():
            self._notifier.ready()

    async def _drain(self) -> None:
        drain_s = self._settings.limits.drain_s
        until = trio.current_time() + drain_s
        if self._has_successor():
            await self._hand_over(drain_s)
        else:
            self._notifier.stopping()
            self._doors.close()
        self._registry.begin_drain(drain_s)
        await self._let_clients_finish(drain_s)
        self._doors.abort_all()
        await let_arrive(self._registry.sessions, until)
        self._registry.close_all(Code.SHUTDOWN, "the gateway is stopping", RETRY_AFTER_S)
        with trio.move_on_after(GOODBYE_S):
            await wait_until(lambda: all(relay.link is None for relay in self._registry.relays()))
            await trio.sleep(POLL_S)  # for goodbyes that have just been queued to leave

    async def _hand_over(self, drain_s: float) -> None:
        """Close everything that a successor listens on, and send relays there. Open clients and tunnels stay."""
        self._doors.release()
        self._port.stop_accepting()
        await self._pages.end()
        self._notifier.stopping()
        self._registry.send_on(drain_s)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self._registry.sweep()
            self._admission.sweep(self._reactor.now)
            self._doors.end_idle()

    async def _load_again(self) -> None:
        written = await trio.to_thread.run_sync(config.load, self._config_path, os.environ)
        fresh, waiting = config.take_up(self._settings, written)
        self._sandbox.check(fresh)
        certificates = await trio.to_thread.run_sync(load_certificates, fresh, spoken_by(self._name))
        self._check_goes_on()
        await trio.to_thread.run_sync(self._access.open, fresh.log.access)
        try:
            self._check_goes_on()
            self._apply(fresh, certificates)
        except FxError:
            await self._move_access_log_back(fresh)
            raise
        if waiting:
            logger.warning("changed, but not before the next restart: %s", ", ".join(waiting))
        logger.info("reloaded %s", self._config_path)

    async def _move_access_log_back(self, refused: GatewaySettings) -> None:
        """To where it was before the reload that is refused now."""
        await trio.lowlevel.checkpoint()
        if refused.log.access != self._settings.log.access:
            try:
                await trio.to_thread.run_sync(self._access.open, self._settings.log.access)
            except ConfigError as exc:
                logger.error("the access log stays where a refused reload had moved it: %s", exc)

    def _check_goes_on(self) -> None:
        if self._stop.is_set():
            raise FxError("the gateway is stopping, and would open its doors again")

    def _apply(self, fresh: GatewaySettings, certificates: Certificates, inherited: Inherited | None = None) -> None:
        """Take up a reloaded configuration, as far as that is possible without a restart."""
        self._doors.apply(self._door_configs(fresh, certificates), inherited)
        self._admission.apply(self._admission_limits(fresh))
        self._registry.apply(registry_limits(fresh), session_config(fresh))
        self._port.apply(certificates.tunnel, port_limits(fresh))
        self._view.certificate_expires_unix = certificates.tunnel_expires_unix
        logs.configure(fresh.log.level, fresh.log.style, sys.stderr)
        self._settings, self._certificates = fresh, certificates
        self._view.listening = (self._view.listening[0], *self._doors.bound.values(), self._view.listening[-1])

    def _door_configs(self, settings: GatewaySettings, certificates: Certificates) -> list[DoorConfig]:
        return [] if self._view.is_drained else door_configs(settings, certificates.doors, self._access)

    def _spare_files(self) -> int:
        """How many descriptors clients may take."""
        return self._file_limit - self._own_files - max(RESERVED_FILES, self._file_limit // 10)

    def _admission_limits(self, settings: GatewaySettings) -> AdmissionLimits:
        limits = settings.limits
        spare = self._spare_files()
        if spare < limits.connections:
            logger.info("limits.connections is %d; with %d files it is %d", limits.connections, self._file_limit, spare)
        return AdmissionLimits(
            connections=max(1, min(limits.connections, spare)),
            connections_per_door=limits.connections_per_door,
            connections_per_source=limits.connections_per_source,
            open_rate_per_source_per_s=limits.open_rate_per_source_per_s,
            open_burst_per_source=limits.open_burst_per_source,
            exempt=limits.exempt_sources,
            per_door={str(door.listen): door.max_connections for door in settings.doors if door.max_connections is not None},
        )


def door_configs(settings: GatewaySettings, contexts: Mapping[str, ssl.SSLContext], access: AccessLog) -> list[DoorConfig]:
    """The doors of a configuration."""
    limits = settings.limits
    routes = HostTable(Route(route.host, route.path, ServiceName(route.service)) for route in settings.routes)
    return [
        DoorConfig(
            door.label,
            door.listen,
            ServiceName(door.service),
            limits.open_timeout_s,
            limits.idle_timeout_s,
            door.proxy_from,
            limits.hello_timeout_s,
            preread_router(door, routes),
            door.sniff_s,
            contexts.get(door.label),
            access if settings.log.access != "off" else None,
        )
        for door in settings.doors
    ]


def preread_router(door: DoorSettings, routes: HostTable) -> PrereadRouter | None:
    """What decides where the door's clients go; None for a door where all get the same service."""
    if door.kind is DoorKind.TCP:
        return None
    return PrereadRouter(
        door.kind, routes, ServiceName(door.service) or None, ServiceName(door.ssh) or None, frozenset(map(ServiceName, door.streams))
    )


def session_config(settings: GatewaySettings) -> SessionConfig:
    """The bounds of sessions."""
    return SessionConfig(
        max_streams=settings.limits.streams_per_link,
        max_ring_bytes=settings.resume.replay_bytes,
        resume=settings.resume.enabled,
        hold_s=settings.resume.hold_s,
        heartbeat_s=settings.liveness.heartbeat_s,
        dead_after_s=settings.liveness.dead_after_s,
        yield_s=settings.liveness.heartbeat_s * YIELDED_BEATS,
    )


def registry_limits(settings: GatewaySettings) -> RegistryLimits:
    """The bounds of relays."""
    return RegistryLimits(settings.limits.links_per_relay, settings.limits.relays)


def port_limits(settings: GatewaySettings) -> PortLimits:
    """The limits for peers that have not proved who they are."""
    limits = settings.limits
    return PortLimits(
        hello_timeout_s=limits.hello_timeout_s,
        hello_bytes=limits.hello_bytes,
        pending=limits.pending_handshakes,
        pending_per_source=limits.pending_handshakes_per_source,
        at_once=limits.handshakes_at_once,
    )
