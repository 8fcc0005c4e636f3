"""Port: the relay's metrics: the only place that names them. Values are read from the view when Prometheus asks.

Labels are bounded: gateways and services of the configuration, reasons (a fixed set of words).
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fxrelay.admin.view import ClusterStatus, RelayView, ReservationStatus, ServiceStatus, Totals, UplinkStatus


class RelayCollector(Collector):
    """Turns one look at the view into one exposition."""

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
