"""Pure: the order in which a service's addresses are tried, and how the time for connecting is divided among them."""

from typing import Final

from fxrelay.delivery.services import Endpoint

AVOIDED_S: Final = 30.0
"""For this long an address that let a connection time out is tried last. Host names are resolved anew as often (`RESOLVE_EVERY_S`)."""


def share_s(left_s: float, addresses: int) -> float:
    """How long the first of `addresses` remaining addresses may take: one whose packets are dropped must leave time for others."""
    return left_s / max(1, addresses)


class Addresses:
    """The addresses of all services. `now` is monotonic seconds, by the same clock in all calls."""

    def __init__(self) -> None:
        self._late: dict[Endpoint, float] = {}

    def was_late(self, endpoint: Endpoint, now: float) -> None:
        """This address has let a connection time out, and its service has others."""
        self._late = {other: at for other, at in self._late.items() if now - at < AVOIDED_S}
        self._late[endpoint] = now

    def in_order(self, endpoints: tuple[Endpoint, ...], now: float) -> tuple[Endpoint, ...]:
        """The addresses of a service as they are to be tried."""
        if not self._late or len(endpoints) < 2:
            return endpoints
        return tuple(sorted(endpoints, key=lambda each: now - self._late.get(each, now - AVOIDED_S) < AVOIDED_S))
