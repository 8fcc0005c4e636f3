"""Task: what `fxgateway drain` asks of the running gateway, on a socket in the state directory that only its user may open (mode 0600)."""

import logging
import os
from collections.abc import Callable
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fxgateway.doors.doors import Doors
from fxgateway.tunnels.registry import Registry
from fxtunnel.kit.listeners import Inherited, ListenError
from fxtunnel.kit.pages import JsonPage, pages_app, serve_pages
from fxtunnel.kit.settings import MAX_SOCKET_PATH_BYTES, Address
from fxtunnel.model import RelayId

logger = logging.getLogger(__name__)

UNKNOWN: Final = -1
"""What is left at a relay that is not here."""


class Steering:
    """Planned work: the whole gateway takes no more clients, or one relay gets nothing new. A restart ends either."""

    def __init__(self, registry: Registry, doors: Doors, on_drain: Callable[[], None]) -> None:
        self._registry = registry
        self._doors = doors
        self._on_drain = on_drain

    def app(self) -> Starlette:
        """The pages. POST /drain: no more clients. POST and DELETE /drain/RELAY_ID: nothing new for a relay, and again. All answer with the
        clients or streams that are left.
        """
        return pages_app(
            [
                Route("/drain", self._drain, methods=["POST", "GET"]),
                Route("/drain/{relay_id}", self._drain_relay, methods=["POST", "GET", "DELETE"]),
            ]
        )

    async def serve(self, address: Address, inherited: Inherited) -> None:
        """Serve them until cancelled. A gateway that cannot be steered serves its clients all the same: that is only logged."""
        if len(os.fsencode(str(address.path))) > MAX_SOCKET_PATH_BYTES:
            logger.warning("the path is too long for a socket, `fxgateway drain` will not work: %s", address)
            return
        try:
            await serve_pages(self.app(), address, inherited)
        except ListenError as exc:
            logger.warning("`fxgateway drain` will not work: %s", exc)

    async def _drain(self, request: Request) -> Response:
        if request.method == "POST":
            logger.info("draining, as an administrator wished: no more clients until the next restart")
            self._doors.close()
            self._on_drain()
        return JsonPage({"left": self._doors.clients})

    async def _drain_relay(self, request: Request) -> Response:
        relay_id = RelayId(request.path_params["relay_id"])
        relay = next((relay for relay in self._registry.relays() if relay.relay_id == relay_id), None)
        leaving = self._registry.leaving(relay_id)
        if relay is None and not leaving:
            return JsonPage({"left": UNKNOWN})
        if request.method == "POST":
            self._registry.drain(relay_id)
            logger.info("relay %s gets nothing new, as an administrator wished", relay_id)
        elif request.method == "DELETE":
            self._registry.undrain(relay_id)
            logger.info("relay %s gets streams again", relay_id)
        instances = (*leaving, relay) if relay is not None else leaving
        return JsonPage({"left": sum(instance.open_streams for instance in instances)})
