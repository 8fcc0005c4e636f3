"""Pump: addresses of services that cannot be connected to: logged once when that begins, and once when it is over."""

import logging
from typing import Final

from fxrelay.delivery.services import Endpoint
from fxtunnel.kit.settings import Address

logger = logging.getLogger(__name__)

MAX_ADDRESSES: Final = 1_024
"""Of which it is remembered; failures of more are not told."""


class AddressOutages:
    """Belongs to one relay. However many streams ask for a service that is down, its outage makes two lines."""

    def __init__(self) -> None:
        self._failed: dict[Endpoint, int] = {}

    def note(self, endpoint: Endpoint, why: str) -> None:
        """An attempt has failed."""
        if endpoint not in self._failed:
            if len(self._failed) >= MAX_ADDRESSES:
                return
            logger.warning("a service cannot be reached at %s: %s", _text(endpoint), why)
        self._failed[endpoint] = self._failed.get(endpoint, 0) + 1

    def note_reached(self, endpoint: Endpoint) -> None:
        """A connection stands. Cheap as long as nothing is down."""
        if self._failed and (count := self._failed.pop(endpoint, 0)):
            logger.warning("the service at %s is reached again; attempts that failed: %d", _text(endpoint), count)


def _text(endpoint: Endpoint) -> str:
    address = endpoint.address
    return address if isinstance(address, str) else str(Address(address[0], address[1]))
