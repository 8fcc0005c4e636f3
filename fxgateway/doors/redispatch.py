"""Pump: clients whose OPEN waits for a lost link although they could be served another way."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fxgateway.routing.offers import Forward, Readiness
from fxtunnel.model import RelayId, ServiceName

if TYPE_CHECKING:
    from fxgateway.doors.client import Client
    from fxgateway.doors.door import DoorRelays


def redispatch_held(opening: "Iterable[Client]", relays: "DoorRelays") -> None:
    """Open their streams again where a relay could take them now, perhaps the same one over another link. Call every second or so.

    When a path, or this process, has been stuck for longer than sessions are held, relays make new sessions: nobody will then resume the
    one that a client was put on just before.
    """
    found: dict[object, bool] = {}
    for client in [client for client in opening if client.waits_for_link]:
        route_key = client.route_key
        if route_key not in found:  # many clients may wait for the same thing: look once for all of them
            found[route_key] = _is_served_now(relays, *route_key)
        if found[route_key]:
            client.redispatch()


def _is_served_now(relays: "DoorRelays", service: ServiceName, tried: tuple[RelayId, ...], target: RelayId | None) -> bool:
    if target is not None:
        relay = relays.named(target)
        return relay is not None and relay.readiness < Readiness.HELD
    decision = relays.offers.decide(service, tried)
    return isinstance(decision, Forward) and decision.relay.readiness < Readiness.HELD
