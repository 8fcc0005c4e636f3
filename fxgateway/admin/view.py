"""Port: what the gateway shows of itself. Snapshots, read when somebody asks; nothing here is kept or counted twice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fxtunnel.engine.status import LinkStatus

RelayState = Literal["up", "held", "draining", "connecting"]


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """One relay that is here, or whose sessions are held. `connected_s` counts from when this instance came.

    `leaving_streams` are those that earlier instances of it still have.
    """

    relay_id: str
    instance: str
    epoch: int
    state: RelayState
    remote_address: str
    connected_s: float
    services: tuple[str, ...]
    links: tuple[LinkStatus, ...]
    leaving_streams: int = 0


@dataclass(frozen=True, slots=True)
class DoorStatus:
    """One door. `connections` is now, counts are since start, bytes those of clients that have left; `refused` maps a reason to a count."""

    name: str
    listen: str
    service: str
    connections: int
    accepted: int
    refused: Mapping[str, int]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One process of several. `restarts` counts the times it has died since the gateway started, `far_relays` those that it can reach at
    other workers.
    """

    worker: int
    pid: int
    up: bool
    restarts: int
    relays: int
    connections: int
    far_relays: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """The whole daemon. `listening` holds every bound address; streams, sessions and memory are now, the rest since start.

    `window_bytes`: what is promised to streams, as `first` windows and as windows that have `grown`. `certificate_expires_unix`: the
    tunnel port's. `workers` is empty where one process does everything.
    """

    gateway_id: str
    version: str
    uptime_s: float
    listening: tuple[str, ...]
    streams: int
    streams_opened: int
    resumed: int
    memory_bytes: int
    memory_limit_bytes: int
    relays_refused: Mapping[str, int]
    window_bytes: Mapping[str, int] = field(default_factory=dict)
    certificate_expires_unix: float = 0.0
    access_dropped: int = 0
    workers: tuple[WorkerStatus, ...] = ()


class GatewayView(Protocol):
    """What pages and metrics read. Every call is synchronous and cheap."""

    def relays(self) -> list[RelayStatus]:
        """The relays that are here or held, in any order."""

    def doors(self) -> list[DoorStatus]:
        """The doors of the present configuration."""

    def ready(self) -> tuple[bool, list[str]]:
        """Whether clients would be served now; if not, why: one short sentence each."""

    def totals(self) -> Totals:
        """The daemon as a whole."""
