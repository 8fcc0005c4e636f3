"""Port: what the relay shows of itself. Snapshots, read when somebody asks; nothing here is kept or counted twice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fxtunnel.engine.status import LinkStatus

UplinkState = Literal["up", "connecting", "waiting", "failed"]


@dataclass(frozen=True, slots=True)
class UplinkStatus:
    """One gateway. `next_try_s` says how long until the next attempt while `state` is waiting; failed: not tried again."""

    gateway_id: str
    url: str
    state: UplinkState
    epoch: int
    connected_s: float
    next_try_s: float | None
    last_error: str
    attempts: int
    links: tuple[LinkStatus, ...]


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service. `streams` is now; `opened` and `refused` (a reason, a fixed set of words, to a count) are since start."""

    name: str
    protocol: str
    target: str
    streams: int
    opened: int
    refused: Mapping[str, int]
    paths: Mapping[str, int] = field(default_factory=dict)
    """Of a pool: streams by the way they took since start: local, redirect, direct."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What this relay knows of its cluster. `store_down_s` is 0 while the store answers; `live`: changes are heard at once.

    `nodes` counts servers by state, `switched_off` is what administrators have switched off, by node, as far as this relay has heard,
    `updates` received server objects by what became of them, and what else was dropped; `failures` decisions without a node.
    `problems` is what is wrong with this node's static data and metadata, and why the store may forget reservations.
    """

    store_down_s: float
    live: bool
    synced: bool
    last_error: str
    nodes: Mapping[str, int]
    quarrels: tuple[str, ...]
    switched_off: Mapping[str, tuple[str, ...]]
    in_flight: int
    updates: Mapping[str, int]
    published: int
    decisions: int
    failures: Mapping[str, int]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReservationStatus:
    """`servers` are reserved in the cluster, `held` counts this relay's own logins, `waiting` streams that wait for a server, by service.

    `events` (entered, committed, ...) and `rejections` (by reason) are counts since start.
    """

    servers: int
    held: int
    waiting: Mapping[str, int]
    events: Mapping[str, int]
    rejections: Mapping[str, int]
    last_error: str


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as this relay believes it to be, whatever the store has by now. `seq` is the number of its last update that was heard.

    `placements` are sessions on their way to it, beside the `sessions` it counts itself; `gateways` those it has tunnels to; `switched_off`
    what administrators took from it: login, start, drain. `user` has it reserved.
    """

    node: str
    state: str
    seq: int
    sessions: int
    placements: int
    gateways: tuple[str, ...]
    switched_off: tuple[str, ...]
    user: str


@dataclass(frozen=True, slots=True)
class Totals:
    """The whole daemon. Streams and memory are now, the rest since start."""

    relay_id: str
    instance: str
    version: str
    uptime_s: float
    streams: int
    streams_opened: int
    resumed: int
    memory_bytes: int
    memory_limit_bytes: int
    is_draining: bool = False
    window_bytes: Mapping[str, int] = field(default_factory=dict)
    """Promised to streams, as `first` windows and as windows that have `grown`."""


class RelayView(Protocol):
    """What the pages read. Every call is synchronous and cheap."""

    def uplinks(self) -> list[UplinkStatus]:
        """The gateways of the present configuration."""

    def services(self) -> list[ServiceStatus]:
        """The services of the present configuration."""

    def totals(self) -> Totals:
        """The daemon as a whole."""

    def cluster(self) -> ClusterStatus:
        """What it knows of the others."""

    def node(self, name: str) -> NodeStatus | None:
        """One node of the cluster, if it is known."""

    def reservations(self) -> ReservationStatus:
        """Who has what, as far as this relay is concerned."""
