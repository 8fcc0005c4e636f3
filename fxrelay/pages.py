"""Task: the relay's status socket: /healthz, /status, /nodes/NAME and /metrics, which only tell, and /drain, for planned work."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fxtunnel.engine.status import LinkStatus
from fxtunnel.kit.pages import JsonPage, pages_app

UplinkState = Literal["up", "connecting", "waiting", "failed"]

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


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
    `problems` is what is wrong with this node's static data and metadata.
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


def make_app(view: RelayView, drain: Callable[[], None] | None = None) -> Starlette:
    """The pages, for `serve_pages`. Every answer is made from one look at `view`.

    /healthz: 200 while the process answers. /status: JSON object with `relay` (see `Totals`), `uplinks`, `services`, `cluster` and
    `reservations`. /nodes/NAME: JSON object, see `NodeStatus`; 404 for a node that this relay has not heard of.
    /metrics: Prometheus text. POST /drain calls `drain`, if there is one, and tells how many streams are left. All others: GET and HEAD.
    """
    registry = CollectorRegistry()
    registry.register(RelayCollector(view))
    ProcessCollector(registry=registry)

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=_HEADERS)

    async def status(request: Request) -> Response:
        return JsonPage(
            {
                "relay": asdict(view.totals()),
                "uplinks": [asdict(uplink) for uplink in view.uplinks()],
                "services": [asdict(service) for service in view.services()],
                "cluster": asdict(view.cluster()),
                "reservations": asdict(view.reservations()),
            },
            headers=_HEADERS,
        )

    async def node(request: Request) -> Response:
        found = view.node(request.path_params["name"])
        if found is None:
            return PlainTextResponse("no such node has been heard of\n", 404, headers=_HEADERS)
        return JsonPage(asdict(found), headers=_HEADERS)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4, headers=_HEADERS)

    async def planned(request: Request) -> Response:
        if drain is not None and request.method == "POST":
            drain()
        return JsonPage({"left": view.totals().streams}, headers=_HEADERS)

    return pages_app(
        [
            Route("/drain", planned, methods=["GET", "POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/status", status, methods=["GET"]),
            Route("/nodes/{name}", node, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ]
    )


class RelayCollector(Collector):
    """The relay's metrics, read from the view when Prometheus asks. The only place that names them.

    Labels are bounded: gateways and services of the configuration, reasons (a fixed set of words).
    """

    def __init__(self, view: RelayView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Every metric of the relay."""
        yield from _daemon(self._view.totals())
        yield from _uplinks(self._view.uplinks())
        yield from _services(self._view.services())
        yield from _cluster(self._view.cluster())
        yield from _reservations(self._view.reservations())

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read a view that is still being put together."""
        return []


def _daemon(totals: Totals) -> Iterator[Metric]:
    info = GaugeMetricFamily("fxrelay_info", "Always 1; the labels say what runs.", labels=["version", "relay"])
    info.add_metric([totals.version, totals.relay_id], 1)
    yield info
    yield GaugeMetricFamily("fxrelay_uptime_seconds", "Seconds since start.", value=totals.uptime_s)
    yield GaugeMetricFamily("fxrelay_streams", "Open streams.", value=totals.streams)
    yield CounterMetricFamily("fxrelay_streams_opened", "Streams opened.", value=totals.streams_opened)
    yield CounterMetricFamily("fxrelay_links_resumed", "Data links that were cut and continued.", value=totals.resumed)
    yield GaugeMetricFamily("fxrelay_memory_bytes", "Resident memory.", value=totals.memory_bytes)
    yield GaugeMetricFamily("fxrelay_memory_limit_bytes", "limits.memory_bytes.", value=totals.memory_limit_bytes)
    windows = GaugeMetricFamily("fxrelay_window_bytes", "Promised to streams, as first windows and as grown ones.", labels=["kind"])
    for kind, size in totals.window_bytes.items():
        windows.add_metric([kind], size)
    yield windows


def _uplinks(uplinks: list[UplinkStatus]) -> Iterator[Metric]:
    up = GaugeMetricFamily("fxrelay_uplink_up", "1 while the gateway's control link stands.", labels=["gateway"])
    attempts = CounterMetricFamily("fxrelay_uplink_attempts", "Times the gateway was dialled.", labels=["gateway"])
    links = GaugeMetricFamily("fxrelay_uplink_links", "Data links by whether they work now.", labels=["gateway", "state"])
    rtt = GaugeMetricFamily("fxrelay_uplink_rtt_seconds", "Shortest round trip over the data links.", labels=["gateway"])
    # Two enrolment files may lead to one gateway; a label set may appear only once in an exposition.
    for gateway_id in dict.fromkeys(uplink.gateway_id for uplink in uplinks):
        same = [uplink for uplink in uplinks if uplink.gateway_id == gateway_id]
        sessions = [link for uplink in same for link in uplink.links]
        working = sum(link.up for link in sessions)
        up.add_metric([gateway_id], float(any(uplink.state == "up" for uplink in same)))
        attempts.add_metric([gateway_id], sum(uplink.attempts for uplink in same))
        links.add_metric([gateway_id, "up"], working)
        links.add_metric([gateway_id, "held"], len(sessions) - working)
        measured = [link.rtt_ms for link in sessions if link.rtt_ms is not None]
        if measured:
            rtt.add_metric([gateway_id], min(measured) / 1000)
    yield from (up, attempts, links, rtt)


def _services(services: list[ServiceStatus]) -> Iterator[Metric]:
    streams = GaugeMetricFamily("fxrelay_service_streams", "Open streams.", labels=["service"])
    opened = CounterMetricFamily("fxrelay_service_opened", "Streams that asked for the service, refused ones included.", labels=["service"])
    refused = CounterMetricFamily("fxrelay_service_refused", "Streams refused.", labels=["service", "reason"])
    paths = CounterMetricFamily("fxrelay_service_paths", "Streams of a pool by the way they took.", labels=["service", "path"])
    for service in services:
        for path, count in sorted(service.paths.items()):
            paths.add_metric([service.name, path], count)
        streams.add_metric([service.name], service.streams)
        opened.add_metric([service.name], service.opened)
        for reason, count in sorted(service.refused.items()):
            refused.add_metric([service.name, reason], count)
    yield from (streams, opened, refused, paths)


def _cluster(cluster: ClusterStatus) -> Iterator[Metric]:
    nodes = GaugeMetricFamily("fxrelay_cluster_nodes", "Nodes of the cluster by state.", labels=["state"])
    for state, count in sorted(cluster.nodes.items()):
        nodes.add_metric([state], count)
    updates = CounterMetricFamily(
        "fxrelay_cluster_updates",
        "Server objects by what became of them; other dropped messages.",
        labels=["outcome"],
    )
    for outcome, count in sorted(cluster.updates.items()):
        updates.add_metric([outcome], count)
    failures = CounterMetricFamily("fxrelay_decision_failures", "Decisions that chose no node, by reason.", labels=["reason"])
    for reason, count in sorted(cluster.failures.items()):
        failures.add_metric([reason], count)
    yield from (nodes, updates, failures)
    yield GaugeMetricFamily("fxrelay_store_up", "1 while the cluster's store answers.", value=float(not cluster.store_down_s))
    yield GaugeMetricFamily("fxrelay_cluster_live", "1 while changes are heard at once.", value=float(cluster.live))
    yield GaugeMetricFamily("fxrelay_cluster_quarrels", "Ids that more than one process claims.", value=len(cluster.quarrels))
    yield GaugeMetricFamily("fxrelay_placements", "Placements that no server counts yet.", value=cluster.in_flight)
    yield CounterMetricFamily("fxrelay_decisions", "Decisions made.", value=cluster.decisions)
    yield CounterMetricFamily("fxrelay_published", "Server objects that this node has published.", value=cluster.published)


def _reservations(reservations: ReservationStatus) -> Iterator[Metric]:
    events = CounterMetricFamily("fxrelay_reservation_events", "Logins on reserved servers, by what became of them.", labels=["event"])
    for event, count in sorted(reservations.events.items()):
        events.add_metric([event], count)
    rejected = CounterMetricFamily("fxrelay_reservations_rejected", "Logins that were not let in, by reason.", labels=["reason"])
    for reason, count in sorted(reservations.rejections.items()):
        rejected.add_metric([reason], count)
    waiting = GaugeMetricFamily("fxrelay_reservation_waiting", "Streams that wait for a server.", labels=["service"])
    for service, count in sorted(reservations.waiting.items()):
        waiting.add_metric([service], count)
    yield from (events, rejected, waiting)
    yield GaugeMetricFamily("fxrelay_reserved_servers", "Servers that belong to a user.", value=reservations.servers)
    yield GaugeMetricFamily("fxrelay_reservation_logins", "Logins that this relay keeps.", value=reservations.held)
