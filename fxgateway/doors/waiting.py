"""Pump: clients whose OPEN waits for a link that is lost, while there is a better way."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fxgateway.routing.offers import Forward, Readiness
from fxtunnel.model import RelayId, ServiceName

if TYPE_CHECKING:
    from fxgateway.doors.client import Client
    from fxgateway.doors.door import DoorRelays


def spare_the_wait(opening: "Iterable[Client]", relays: "DoorRelays") -> None:
    """Let a relay have them that could take them now, be it the same by another link. Call now and then.

    When a path, or this process, has stood still for longer than sessions are held, relays make their links anew: then nobody will ever
    resume the session that a client was given in the moment before.
    """
    found: dict[object, bool] = {}
    for client in [client for client in opening if client.waits_for_link]:
        wish = client.wish
        if wish not in found:  # a crowd that waits for the same asks once
            found[wish] = _is_served_now(relays, *wish)
        if found[wish]:
            client.go_on_elsewhere()


def _is_served_now(relays: "DoorRelays", service: ServiceName, tried: tuple[RelayId, ...], target: RelayId | None) -> bool:
    if target is not None:
        relay = relays.named(target)
        return relay is not None and relay.readiness < Readiness.HELD
    decision = relays.offers.decide(service, tried)
    return isinstance(decision, Forward) and decision.relay.readiness < Readiness.HELD
