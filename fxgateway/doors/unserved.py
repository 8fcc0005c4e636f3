"""Pump: services for which clients of a door found no relay: told once when it begins, and once when it is over."""

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from fxgateway.routing.offers import Forward
from fxtunnel.model import ServiceName

if TYPE_CHECKING:
    from fxgateway.doors.door import DoorRelays

logger = logging.getLogger(__name__)


class Unserved:
    """Belongs to one door. However many clients come, there are two lines for each time in which a service has no relay."""

    def __init__(self) -> None:
        self._turned_away: dict[ServiceName, int] = {}

    def note(self, door_name: str, service: ServiceName) -> None:
        """A client was turned away for want of a relay."""
        if service not in self._turned_away:
            logger.warning("door %s: no relay offers %s now; its clients are turned away", door_name, service)
        self._turned_away[service] = self._turned_away.get(service, 0) + 1

    def keep_only(self, services: Collection[ServiceName]) -> None:
        """These are the services of the door from now on."""
        self._turned_away = {service: count for service, count in self._turned_away.items() if service in services}

    def look(self, door_name: str, relays: "DoorRelays") -> None:
        """Say of what can be had again. Call now and then."""
        for service, count in list(self._turned_away.items()):
            if isinstance(relays.offers.decide(service), Forward):
                del self._turned_away[service]
                logger.warning("door %s: %s has a relay again; clients turned away meanwhile: %d", door_name, service, count)
