"""Port: the gateway's metrics: the only place that names them. Values are read from the view when Prometheus asks.

Labels are bounded: relay ids (limits.relays), doors and services (the configuration), reasons (a fixed set of words). Client addresses,
sessions and streams are never labels.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fxgateway.admin.view import DoorStatus, GatewayView, RelayStatus, Totals

_DOOR: Final = ("door", "service")


class GatewayCollector(Collector):
    """Turns one look at the view into one exposition."""

    def __init__(self, view: GatewayView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Every metric of the gateway."""
        is_ready, _ = self._view.ready()
        yield GaugeMetricFamily("fxgateway_ready", "1 while clients would be served.", value=float(is_ready))
        yield from _daemon(self._view.totals())
        yield from _doors(self._view.doors())
        yield from _relays(self._view.relays())

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read a view that is still being put together."""
        return []


def make_registry(view: GatewayView) -> CollectorRegistry:
    """A registry of its own with the gateway's metrics and those of the process (memory, file descriptors, CPU)."""
    registry = CollectorRegistry()
    registry.register(GatewayCollector(view))
    ProcessCollector(registry=registry)
    return registry


def _daemon(totals: Totals) -> Iterator[Metric]:
    info = GaugeMetricFamily("fxgateway_info", "Always 1; the labels say what runs.", labels=["version", "gateway"])
    info.add_metric([totals.version, totals.gateway_id], 1)
    yield info
    yield GaugeMetricFamily("fxgateway_uptime_seconds", "Seconds since start.", value=totals.uptime_s)
    yield GaugeMetricFamily("fxgateway_streams", "Open streams.", value=totals.streams)
    yield CounterMetricFamily("fxgateway_streams_opened", "Streams opened.", value=totals.streams_opened)
    yield CounterMetricFamily("fxgateway_links_resumed", "Data links that were cut and continued.", value=totals.resumed)
    yield GaugeMetricFamily("fxgateway_memory_bytes", "Memory charged to the budget.", value=totals.memory_bytes)
    yield GaugeMetricFamily("fxgateway_memory_limit_bytes", "The budget.", value=totals.memory_limit_bytes)
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
