"""Pump: clients whose OPEN has no answer although they could be served another way: it waits for a lost link, or was taken back."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from fxgateway.routing.offers import Forward, Readiness
from fxtunnel.model import RelayId, ServiceName

if TYPE_CHECKING:
    from fxgateway.doors.client import Client
    from fxgateway.doors.door import DoorRelays

CONFIRM_S: Final = 2.0
"""For a relay to confirm, which takes it a round trip if it is there at all. A client has waited for `open_timeout_s` by then."""


def go_on_confirmed(taken_back: "Mapping[Client, tuple[float, int]]", now: float) -> None:
    """Ask another relay where the one that was too late has confirmed that it does not serve them. Call every second or so."""
    for client, (since, mark) in list(taken_back.items()):
        if client.has_confirmed(mark):
            client.go_on_confirmed()
        elif since < now - CONFIRM_S:
            client.end_unanswered()


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
