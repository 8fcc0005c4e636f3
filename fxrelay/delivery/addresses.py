"""Pure: which addresses have not answered lately, and how the time for a connection is divided among several."""

from typing import Final

from fxrelay.delivery.services import Endpoint

AVOIDED_S: Final = 30.0
"""For so long an address that let a connection time out is tried behind the others. Host names are looked up again as often."""


def share_s(left_s: float, addresses: int) -> float:
    """How long the first of so many addresses may take: a firewall that drops packets for one must leave time for the others."""
    return left_s / max(1, addresses)


class Addresses:
    """Those of all services. `now` is monotonic seconds, the same clock in all calls."""

    def __init__(self) -> None:
        self._late: dict[Endpoint, float] = {}

    def was_late(self, endpoint: Endpoint, now: float) -> None:
        """It has let a connection time out, and its service has others."""
        self._late = {other: at for other, at in self._late.items() if now - at < AVOIDED_S}
        self._late[endpoint] = now

    def in_order(self, endpoints: tuple[Endpoint, ...], now: float) -> tuple[Endpoint, ...]:
        """The addresses of a service as they are to be tried."""
        if not self._late or len(endpoints) < 2:
            return endpoints
        return tuple(sorted(endpoints, key=lambda each: now - self._late.get(each, now - AVOIDED_S) < AVOIDED_S))
