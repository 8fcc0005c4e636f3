"""Port: a worker's status as a message to the parent, and the view of the whole gateway that is merged from these."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxgateway.admin.view import DoorStatus, GatewayView, RelayStatus, Totals, WorkerStatus
from fxgateway.settings import GatewaySettings
from fxtunnel import __version__
from fxtunnel.engine.status import LinkStatus
from fxtunnel.kit.process import memory_bytes
from fxtunnel.model import ServiceName

_SERVING = frozenset({"up", "held"})


def snapshot(view: GatewayView, far_relays: int = 0) -> dict[str, Any]:
    """The status of this worker, as a message."""
    return {
        "pid": os.getpid(),
        "far_relays": far_relays,
        "totals": asdict(view.totals()),
        "relays": [asdict(relay) for relay in view.relays()],
        "doors": [asdict(door) for door in view.doors()],
    }


@dataclass(slots=True)
class Facts:
    """What the parent itself knows."""

    settings: GatewaySettings
    wanted: Callable[[], Mapping[str, frozenset[ServiceName]]]
    """All services that each door leads to, by the doors' labels."""
    listening: tuple[str, ...] = ()
    is_draining: bool = False
    pids: dict[int, int] = field(default_factory=dict)
    restarts: Counter[int] = field(default_factory=Counter)


class MergedView:
    """Implements `GatewayView` for several workers, from what each last reported."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._started = time.monotonic()
        self._latest: dict[int, dict[str, Any]] = {}
        self._answering: frozenset[int] = frozenset()
        self._counted: Counter[tuple[str, ...]] = Counter()
        """The counts of workers that have died: a counter of the gateway must not fall because a process is gone."""

    def heard(self, snapshots: Mapping[int, dict[str, Any]]) -> None:
        """These workers have answered, the others have not."""
        self._latest.update(snapshots)
        self._answering = frozenset(snapshots)

    def died(self, worker: int) -> None:
        """A worker has died; its counts stay in the sums as last reported."""
        last = self._latest.pop(worker, None)
        if last is not None:
            self._counted += _counts(last)

    def relays(self) -> list[RelayStatus]:
        """See `GatewayView`. A relay that two workers report is the one with the higher epoch."""
        found: dict[str, RelayStatus] = {}
        for status in self._latest.values():
            for entry in status["relays"]:
                relay = _relay(entry)
                if relay.relay_id not in found or found[relay.relay_id].epoch < relay.epoch:
                    found[relay.relay_id] = relay
        return list(found.values())

    def doors(self) -> list[DoorStatus]:
        """See `GatewayView`."""
        counts = self._sums()
        found: dict[str, DoorStatus] = {}
        for status in self._latest.values():
            for entry in status["doors"]:
                name = entry["name"]
                before = found[name].connections if name in found else 0
                refused = {key[3]: count for key, count in counts.items() if key[:3] == ("door", name, "refused")}
                found[name] = DoorStatus(
                    name,
                    entry["listen"],
                    entry["service"],
                    before + entry["connections"],
                    counts["door", name, "accepted"],
                    refused,
                    counts["door", name, "bytes_in"],
                    counts["door", name, "bytes_out"],
                )
        return list(found.values())

    def ready(self) -> tuple[bool, list[str]]:
        """See `GatewayView`."""
        if self._facts.is_draining:
            return False, ["the gateway is draining"]
        served = {service for relay in self.relays() if relay.state in _SERVING for service in relay.services}
        wanted = self._facts.wanted()
        reasons = [
            f"no relay for service {service} of door {door}" for door, services in wanted.items() for service in sorted(services - served)
        ]
        if not self._answering:
            reasons = ["no worker answers"]
        return not reasons, reasons

    def totals(self) -> Totals:
        """See `GatewayView`."""
        counts, facts = self._sums(), self._facts
        totals = [status["totals"] for status in self._latest.values()]
        return Totals(
            gateway_id=facts.settings.tunnel.gateway_id,
            version=__version__,
            uptime_s=round(time.monotonic() - self._started, 1),
            listening=facts.listening,
            streams=sum(entry["streams"] for entry in totals),
            streams_opened=counts["streams_opened",],
            resumed=counts["resumed",],
            memory_bytes=memory_bytes() + sum(entry["memory_bytes"] for entry in totals),
            memory_limit_bytes=facts.settings.limits.memory_bytes,
            relays_refused={key[1]: count for key, count in counts.items() if key[0] == "relays_refused"},
            window_bytes={kind: sum(entry["window_bytes"][kind] for entry in totals) for kind in ("first", "grown")},
            certificate_expires_unix=min((entry["certificate_expires_unix"] for entry in totals), default=0.0),
            access_dropped=counts["access_dropped",],
            workers=tuple(self._worker(number) for number in range(1, facts.settings.tunnel.workers + 1)),
        )

    def _worker(self, number: int) -> WorkerStatus:
        status = self._latest.get(number, {"relays": (), "doors": ()})
        return WorkerStatus(
            number,
            self._facts.pids.get(number, 0),
            number in self._answering and number in self._latest,
            self._facts.restarts[number],
            len(status["relays"]),
            sum(door["connections"] for door in status["doors"]),
            status.get("far_relays", 0),
        )

    def _sums(self) -> Counter[tuple[str, ...]]:
        sums = Counter(self._counted)
        for status in self._latest.values():
            sums.update(_counts(status))
        return sums


def _counts(status: Mapping[str, Any]) -> Counter[tuple[str, ...]]:
    """The counters in a worker's status, as opposed to its gauges."""
    totals = status["totals"]
    counts: Counter[tuple[str, ...]] = Counter({(name,): totals[name] for name in ("streams_opened", "resumed", "access_dropped")})
    for reason, count in totals["relays_refused"].items():
        counts["relays_refused", reason] += count
    for door in status["doors"]:
        for what in ("accepted", "bytes_in", "bytes_out"):
            counts["door", door["name"], what] += door[what]
        for reason, count in door["refused"].items():
            counts["door", door["name"], "refused", reason] += count
    return counts


def _relay(entry: Mapping[str, Any]) -> RelayStatus:
    links = tuple(LinkStatus(**link) for link in entry["links"])
    return RelayStatus(**{**entry, "services": tuple(entry["services"]), "links": links})
