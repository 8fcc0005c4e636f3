"""Pump: the relays of all workers, as the doors of this one see them, and what this one reports of its own relays."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from fxgateway.doors.client import Client
from fxgateway.doors.remote_relay import RemoteRelay
from fxgateway.routing.offers import Forward, OfferTable, Readiness, Reject
from fxgateway.tunnels.live_relay import LiveRelay
from fxgateway.tunnels.registry import Registry
from fxtunnel.model import InstanceId, RelayId, ServiceName

PassOn = Callable[[int, Client, bytes], bool]
News = dict[str, Any]
"""Maps a relay id to [instance, epoch, readiness, open streams, services], without the services if those have not changed, or to None if
the relay is gone."""

_GONE: Final = None
FACTS: Final = 5


class WorkerRelay(RemoteRelay):
    """A relay whose tunnel ends at another worker."""

    __slots__ = ("_pass_on", "open_streams", "readiness", "relay_id", "worker")

    def __init__(self, relay_id: RelayId, worker: int, pass_on: PassOn) -> None:
        self.relay_id = relay_id
        self.worker = worker
        self.readiness = Readiness.NONE
        self.open_streams = 0
        """As last reported, plus the clients sent there since."""
        self._pass_on = pass_on

    def take(self, client: Client, early: bytes) -> bool:
        """See `RemoteRelay`."""
        if not self._pass_on(self.worker, client, early):
            return False
        self.open_streams += 1
        return True


class AllRelays:
    """Implements `DoorRelays`, and is its own `offers`: the best relay of all workers, one of our own if two are equally good."""

    def __init__(self, registry: Registry, pass_on: PassOn, catch_up: Callable[[], None]) -> None:
        self._registry = registry
        self._catch_up = catch_up
        self._pass_on = pass_on
        self._table: OfferTable[RemoteRelay] = OfferTable()
        self._far: dict[RelayId, WorkerRelay] = {}
        self._told: dict[RelayId, list[Any]] = {}

    @property
    def offers(self) -> "AllRelays":
        """See `Relays`."""
        return self

    @property
    def far(self) -> int:
        """How many relays can be reached at other workers."""
        return sum(far.readiness is not Readiness.NONE for far in self._far.values())

    def named(self, relay_id: RelayId) -> LiveRelay | WorkerRelay | None:
        """See `Relays`."""
        near = self._registry.named(relay_id)
        if near is not None:
            return near
        far = self._far.get(relay_id)
        return far if far is not None and far.readiness is not Readiness.NONE else None

    def decide(self, service: ServiceName, tried: Collection[RelayId] = ()) -> Forward[LiveRelay] | Forward[RemoteRelay] | Reject:
        """See `OfferTable`."""
        near, far = self._registry.offers.decide(service, tried), self._table.decide(service, tried)
        if isinstance(near, Reject) and isinstance(far, Reject):
            self._catch_up()  # read what the others have just said before a client is turned away
            far = self._table.decide(service, tried)
        if isinstance(far, Reject):
            return near
        if isinstance(near, Reject):
            return far
        is_far_better = (far.relay.readiness, far.relay.open_streams) < (near.relay.readiness, near.relay.open_streams)
        return far if is_far_better and far.relay.relay_id != near.relay.relay_id else near

    def note(self, worker: int, news: News) -> None:
        """Another worker has reported about its relays."""
        for name, facts in news.items():
            relay_id = RelayId(name)
            known = self._far.get(relay_id)
            if facts is _GONE:
                if known is not None and known.worker == worker:
                    self._drop(relay_id)
                continue
            _, _, readiness, streams, *services = facts
            if services:
                known = self._far[relay_id] = WorkerRelay(relay_id, worker, self._pass_on)
                self._table.put(known, [ServiceName(service) for service in services[0]])
            if known is not None and known.worker == worker:
                known.readiness, known.open_streams = Readiness(readiness), streams
            self._relieve(relay_id)

    def yield_name(self, relay_id: RelayId, instance: InstanceId, epoch: int, successor: InstanceId) -> None:
        """See `Registry`."""
        self._registry.yield_name(relay_id, instance, epoch, successor)
        self._relieve(relay_id)

    def forget(self, worker: int) -> None:
        """Another worker is gone, and its relays with it."""
        for relay_id in [relay_id for relay_id, far in self._far.items() if far.worker == worker]:
            self._drop(relay_id)

    def news(self) -> News:
        """What has changed about our own relays since the last call.

        A relay that cannot take streams yet is not reported: its predecessor may still serve at another worker.
        """
        now = dict(self._own())
        changed: News = {}
        for relay_id, facts in now.items():
            told = self._told.get(relay_id, [])
            if not told and facts[2] == Readiness.NONE:
                now[relay_id] = told
            elif told != facts:
                changed[relay_id] = facts[:-1] if told[-1:] == facts[-1:] else facts
        changed |= dict.fromkeys(self._told.keys() - now.keys(), _GONE)
        self._told = now
        return changed

    def expect(self, relay_id: RelayId) -> None:
        """The relay's name has been granted to us. If it does not come after all, the others have to hear that it is gone."""
        self._told.setdefault(relay_id, [])

    def everything(self) -> News:
        """Everything reported about our own relays so far, for a worker that has heard nothing yet."""
        return {relay_id: facts for relay_id, facts in self._told.items() if facts}

    def _own(self) -> Iterator[tuple[RelayId, list[Any]]]:
        for relay in self._registry.relays():
            services = [offer.name for offer in relay.offers]
            yield relay.relay_id, [relay.instance, relay.epoch, int(relay.readiness), relay.open_streams, services]

    def _relieve(self, relay_id: RelayId) -> None:
        far = self._far.get(relay_id)
        if far is not None and far.readiness <= Readiness.RELUCTANT:
            self._registry.relieve(relay_id)

    def _drop(self, relay_id: RelayId) -> None:
        self._far.pop(relay_id, None)
        self._table.remove(relay_id)


def moves(news: News) -> News:
    """The part of a report that concerns the parent: which relays came or went, not how busy they are."""
    return {name: facts for name, facts in news.items() if facts is _GONE or len(facts) == FACTS}


def holders(news: News) -> Iterator[tuple[RelayId, tuple[InstanceId, int] | None]]:
    """For the parent: which relay is held by which instance and epoch; None for one that is gone."""
    for name, facts in news.items():
        yield RelayId(name), (None if facts is _GONE else (InstanceId(facts[0]), int(facts[1])))
