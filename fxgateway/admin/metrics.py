"""Port: the gateway's metrics: the only place that names them. Values are read from the view when Prometheus asks.

Labels are bounded: relay ids (limits.relays), workers, doors and services (the configuration), reasons (a fixed set of words). Addresses
of clients, sessions and streams are never labels.
"""

import os
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fxgateway.admin.view import DoorStatus, GatewayView, RelayStatus, Totals, WorkerStatus

_DOOR: Final = ("door", "service")
_NOT_SUMMED: Final = frozenset({"process_start_time_seconds", "process_max_fds"})


class GatewayCollector(Collector):
    """Turns one look at the view into one exposition."""

    def __init__(self, view: GatewayView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Every metric of the gateway."""
        is_ready, _ = self._view.ready()
        yield GaugeMetricFamily("fxgateway_ready", "1 while clients would be served.", value=float(is_ready))
        totals = self._view.totals()
        yield from _daemon(totals)
        yield from _workers(totals.workers)
        yield from _doors(self._view.doors())
        yield from _relays(self._view.relays())

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read a view that is still being put together."""
        return []


class ProcessesCollector(Collector):
    """What `ProcessCollector` says of one process (memory, file descriptors, CPU), as sums over this one and the workers."""

    def __init__(self, view: GatewayView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """The same names as for one process; the start is the oldest one's, the limit of descriptors each one's own."""
        pids = [os.getpid(), *(worker.pid for worker in self._view.totals().workers if worker.up)]
        values: dict[str, list[float]] = {}
        metrics: dict[str, Metric] = {}
        for pid in pids:
            for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]  # mypy infers no defaults of lambdas
                metrics.setdefault(metric.name, metric)
                values.setdefault(metric.name, []).extend(sample.value for sample in metric.samples)
        for name, metric in metrics.items():
            add = min if name in _NOT_SUMMED else sum
            metric.samples = [metric.samples[0]._replace(value=add(values[name]))]
            yield metric

    def describe(self) -> list[Metric]:
        """See `GatewayCollector`."""
        return []


def make_registry(view: GatewayView) -> CollectorRegistry:
    """A registry of its own with the gateway's metrics and those of its processes (memory, file descriptors, CPU)."""
    registry = CollectorRegistry()
    registry.register(GatewayCollector(view))
    registry.register(ProcessesCollector(view))
    return registry


def _workers(workers: tuple[WorkerStatus, ...]) -> Iterator[Metric]:
    up = GaugeMetricFamily("fxgateway_worker_up", "1 while the worker process serves.", labels=["worker"])
    restarts = CounterMetricFamily("fxgateway_worker_restarts", "Times the worker process has died.", labels=["worker"])
    relays = GaugeMetricFamily("fxgateway_worker_relays", "Relays whose tunnels end at the worker.", labels=["worker"])
    connections = GaugeMetricFamily("fxgateway_worker_connections", "Clients that the worker serves.", labels=["worker"])
    for worker in workers:
        label = [str(worker.worker)]
        up.add_metric(label, float(worker.up))
        restarts.add_metric(label, worker.restarts)
        relays.add_metric(label, worker.relays)
        connections.add_metric(label, worker.connections)
    if workers:
        yield from (up, restarts, relays, connections)


def _daemon(totals: Totals) -> Iterator[Metric]:
    info = GaugeMetricFamily("fxgateway_info", "Always 1; the labels say what runs.", labels=["version", "gateway"])
    info.add_metric([totals.version, totals.gateway_id], 1)
    yield info
    yield GaugeMetricFamily("fxgateway_uptime_seconds", "Seconds since start.", value=totals.uptime_s)
    yield GaugeMetricFamily("fxgateway_streams", "Open streams.", value=totals.streams)
    yield CounterMetricFamily("fxgateway_streams_opened", "Streams opened.", value=totals.streams_opened)
    yield CounterMetricFamily("fxgateway_links_resumed", "Data links that were cut and continued.", value=totals.resumed)
    yield GaugeMetricFamily("fxgateway_memory_bytes", "Resident memory of all processes.", value=totals.memory_bytes)
    yield GaugeMetricFamily("fxgateway_memory_limit_bytes", "limits.memory_bytes.", value=totals.memory_limit_bytes)
    windows = GaugeMetricFamily("fxgateway_window_bytes", "Promised to streams, as first windows and as grown ones.", labels=["kind"])
    for kind, size in totals.window_bytes.items():
        windows.add_metric([kind], size)
    yield windows
    yield GaugeMetricFamily(
        "fxgateway_certificate_expires_timestamp_seconds",
        "When the tunnel port's certificate ends, in Unix time.",
        value=totals.certificate_expires_unix,
    )
    yield CounterMetricFamily("fxgateway_access_log_dropped", "Lines of the access log that were not written.", value=totals.access_dropped)
    refused = CounterMetricFamily("fxgateway_relays_refused", "Relays turned away.", labels=["reason"])
    for reason, count in sorted(totals.relays_refused.items()):
        refused.add_metric([reason], count)
    yield refused


def _doors(doors: list[DoorStatus]) -> Iterator[Metric]:
    connections = GaugeMetricFamily("fxgateway_door_connections", "Clients that are in.", labels=_DOOR)
    accepted = CounterMetricFamily("fxgateway_door_accepted", "Clients let in.", labels=_DOOR)
    refused = CounterMetricFamily("fxgateway_door_refused", "Clients turned away.", labels=(*_DOOR, "reason"))
    received = CounterMetricFamily("fxgateway_door_received_bytes", "Bytes received from clients that have left.", labels=_DOOR)
    sent = CounterMetricFamily("fxgateway_door_sent_bytes", "Bytes sent to clients that have left.", labels=_DOOR)
    for door in doors:
        labels = (door.name, door.service)
        connections.add_metric(labels, door.connections)
        accepted.add_metric(labels, door.accepted)
        received.add_metric(labels, door.bytes_in)
        sent.add_metric(labels, door.bytes_out)
        for reason, count in sorted(door.refused.items()):
            refused.add_metric((*labels, reason), count)
    yield from (connections, accepted, refused, received, sent)


def _relays(relays: list[RelayStatus]) -> Iterator[Metric]:
    # Bytes of single relays are left out: they are known per session, and a sum that falls when a session ends misleads rate().
    total = GaugeMetricFamily("fxgateway_relays", "Relays that are here or held.", labels=["state"])
    for state in ("up", "held", "draining", "connecting"):
        total.add_metric([state], sum(relay.state == state for relay in relays))
    up = GaugeMetricFamily("fxgateway_relay_up", "1 while the relay has a working data link.", labels=["relay"])
    epoch = GaugeMetricFamily("fxgateway_relay_epoch", "Rises with each take-over of the relay's name.", labels=["relay"])
    links = GaugeMetricFamily("fxgateway_relay_links", "Data links by whether they work now.", labels=["relay", "state"])
    streams = GaugeMetricFamily("fxgateway_relay_streams", "Open streams.", labels=["relay"])
    rtt = GaugeMetricFamily("fxgateway_relay_rtt_seconds", "Shortest round trip over the relay's data links.", labels=["relay"])
    for relay in relays:
        working = sum(link.up for link in relay.links)
        up.add_metric([relay.relay_id], float(working > 0))
        epoch.add_metric([relay.relay_id], relay.epoch)
        links.add_metric([relay.relay_id, "up"], working)
        links.add_metric([relay.relay_id, "held"], len(relay.links) - working)
        streams.add_metric([relay.relay_id], sum(link.streams for link in relay.links))
        measured = [link.rtt_ms for link in relay.links if link.rtt_ms is not None]
        if measured:
            rtt.add_metric([relay.relay_id], min(measured) / 1000)
    yield from (total, up, epoch, links, streams, rtt)
