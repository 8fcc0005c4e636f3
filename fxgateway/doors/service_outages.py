"""Pump: services of a door that have no relay: logged once when clients begin to be turned away, and once when that is over."""

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from fxgateway.routing.offers import Forward
from fxtunnel.model import ServiceName

if TYPE_CHECKING:
    from fxgateway.doors.door import DoorRelays

logger = logging.getLogger(__name__)


class ServiceOutages:
    """Belongs to one door. However many clients come, an outage of a service makes two lines."""

    def __init__(self) -> None:
        self._turned_away: dict[ServiceName, int] = {}

    def note(self, door_name: str, service: ServiceName) -> None:
        """A client was turned away because no relay offers the service."""
        if service not in self._turned_away:
            logger.warning("door %s: no relay offers %s now; its clients are turned away", door_name, service)
        self._turned_away[service] = self._turned_away.get(service, 0) + 1

    def keep_only(self, services: Collection[ServiceName]) -> None:
        """Forget services that the door no longer has."""
        self._turned_away = {service: count for service, count in self._turned_away.items() if service in services}

    def look(self, door_name: str, relays: "DoorRelays") -> None:
        """Log the services that have a relay again. Call every second or so."""
        for service, count in list(self._turned_away.items()):
            if isinstance(relays.offers.decide(service), Forward):
                del self._turned_away[service]
                logger.warning("door %s: %s has a relay again; clients turned away meanwhile: %d", door_name, service, count)
