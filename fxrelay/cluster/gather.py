"""Task: gathers what this node says about itself: from its configuration, the machine, and what its administrator added."""

import ipaddress
import json
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

import psutil
import trio

from fxrelay.cluster.machine import End, MachineReader, SessionCounter
from fxrelay.cluster.metrics import Metrics
from fxrelay.cluster.programs import ProgramBounds
from fxrelay.cluster.publish import Facts
from fxrelay.cluster.server import MAX_SERVER_BYTES, MAX_SERVICES
from fxrelay.cluster.static_data import StaticData
from fxrelay.service_settings import ServiceSection
from fxrelay.settings import RelaySettings

logger = logging.getLogger(__name__)

RESERVED_BYTES: Final = 12_288
"""Of a server object, for what the relay adds: the tunnels."""
DISPENSABLE: Final = ("sessionList", "metrics", "metadata")
"""What is left out, in this order, when a server object is too large: not to be published at all would be worse."""
BOUNDS: Final = ProgramBounds()


class Gatherer:
    """Gathers. `run` it once beside the publisher; call `measure` from one task."""

    def __init__(self, settings: RelaySettings, environ: Mapping[str, str] = os.environ, bounds: ProgramBounds = BOUNDS) -> None:
        self._environ = environ
        self._bounds = bounds
        self._machine = MachineReader()
        self._machine_facts: dict[str, Any] = {}
        self._complaint = ""
        self._left_out: list[str] = []
        self._changed = trio.Event()
        self._settings = settings
        self._static_data = StaticData(settings.node, environ)
        self._sessions = self._session_counter(settings)
        self._metrics = self._new_metrics(settings)

    def reconfigure(self, settings: RelaySettings) -> None:
        """What the node says from now on. Metrics begin anew if theirs has changed."""
        before, self._settings = self._settings, settings
        if (settings.node, settings.cluster) == (before.node, before.cluster) and settings.services == before.services:
            return
        self._static_data.section = settings.node
        self._sessions = self._session_counter(settings)
        if _metric_settings(settings) != _metric_settings(before):
            self._metrics = self._new_metrics(settings)
            self._changed.set()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with static data and metadata, for status."""
        return self._static_data.problems

    async def run(self) -> None:
        """Measure metrics until cancelled."""
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._metrics.run)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    async def measure(self) -> Facts:
        """The node's fields of the server object (docs/CLUSTER.md), as they are now.

        Takes milliseconds, unless a program counts the sessions. Whatever fails is logged, and left out or as it was before.
        """
        settings, node = self._settings, self._settings.node
        facts: dict[str, Any] = {
            "address": settings.relay.address,
            "services": published_services(settings),
            "weight": node.weight,
            "maxSessions": node.max_sessions,
            "serverPool": node.pool,
            "enableReservations": node.enable_reservations,
            "forceIndirect": settings.cluster.force_indirect,
            "disable": [],
            **await self._ask_machine(),
            **await trio.to_thread.run_sync(self._static_data.read),
            **self._metrics.fields(),
        }
        fitting = _fitting(facts)
        left_out = fitting.get("leftOut", [])
        if left_out != self._left_out and left_out:
            logger.warning("left out, the server object would be too large: %s", ", ".join(left_out))
        self._left_out = left_out
        return fitting

    async def _ask_machine(self) -> dict[str, Any]:
        try:
            sessions = await self._sessions.count(self._environ)
            self._machine_facts = {**await trio.to_thread.run_sync(self._machine.read), **sessions}
            self._complaint = ""
        except Exception as exc:  # a machine that does not say its load is no reason to leave the cluster
            complaint = f"{type(exc).__name__}: {exc}"
            if complaint != self._complaint:
                logger.exception("the machine cannot be measured")
            self._complaint = complaint
        return self._machine_facts

    def _session_counter(self, settings: RelaySettings) -> SessionCounter:
        return SessionCounter(settings.node.sessions, local_ends(settings), settings.cluster.publish_s, self._bounds)

    def _new_metrics(self, settings: RelaySettings) -> Metrics:
        node = settings.node
        return Metrics(node.metrics_dir, node.metrics, settings.cluster.publish_s, self._bounds, self._environ)


def _metric_settings(settings: RelaySettings) -> tuple[object, ...]:
    return settings.node.metrics_dir, settings.node.metrics, settings.cluster.publish_s


def published_services(settings: RelaySettings) -> list[dict[str, Any]]:
    """The services the others may send sessions for: pools that this node is in, and targets; port 0 for unix sockets."""
    found = []
    for section in settings.services:
        if section.port is not None:
            if section.nodes != "*" and settings.relay.id not in section.nodes:
                continue
            port = section.port
        else:
            port = (section.target.port or 0) if section.target is not None else 0
        found.append({"name": section.name, "proto": section.protocol, "port": port})
    return found[:MAX_SERVICES]


def local_ends(settings: RelaySettings) -> frozenset[End]:
    """Where the services that run on this machine are: connections to them are sessions. May look at the network interfaces."""
    names = {entry["name"] for entry in published_services(settings)}
    found = set[End]()
    for section in settings.services:
        port = section.port or (section.target.port if section.target is not None else None) or 0
        if port and section.name in names and _is_here(section):
            found |= {(address, port) for address in _played(settings, section) or ("",)}
    return frozenset(found)


def _played(settings: RelaySettings, section: ServiceSection) -> set[str]:
    """The addresses of a node that is played on a machine with others, each at an address of 127/8 of its own: the port is everybody's."""
    host = section.host if section.target is None else section.target.host
    return {address for address in (host, settings.relay.address) if _is_played(host) and address is not None and _is_played(address)}


def _is_played(host: str | None) -> bool:
    try:
        address = ipaddress.IPv4Address(host or "")
    except ValueError:
        return False
    return address.is_loopback and address != ipaddress.IPv4Address("127.0.0.1")


def _is_here(section: ServiceSection) -> bool:
    host = section.host if section.target is None else section.target.host
    if section.is_pool:
        return True
    if host is None or host in ("localhost", socket.gethostname()):
        return host is not None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    own = {found.address.partition("%")[0] for interface in psutil.net_if_addrs().values() for found in interface}
    return address.is_loopback or address.is_unspecified or str(address) in own


def _fitting(facts: dict[str, Any]) -> dict[str, Any]:
    for name in DISPENSABLE:
        if len(json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()) <= MAX_SERVER_BYTES - RESERVED_BYTES:
            break
        if facts.get(name):
            facts = {key: value for key, value in facts.items() if key != name} | {"leftOut": [*facts.get("leftOut", []), name]}
    return facts
