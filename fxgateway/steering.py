"""Task: what `fxgateway drain` asks of the running gateway, on a socket in the state directory that only its user may open (mode 0600)."""

import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fxgateway.doors.doors import Doors
from fxgateway.tunnels.registry import Registry
from fxtunnel.errors import FxError
from fxtunnel.kit.listeners import Inherited, ListenError
from fxtunnel.kit.pages import JsonPage, pages_app, serve_pages
from fxtunnel.kit.settings import MAX_SOCKET_PATH_BYTES, Address
from fxtunnel.model import RelayId

logger = logging.getLogger(__name__)

UNKNOWN: Final = -1
"""What is left at a relay that is not here."""
LOOK: Final = "GET"
DRAIN: Final = "POST"
UNDO: Final = "DELETE"

HANG_UP_S: Final = 1.0
"""For open pages to be hung up on; a successor waits for the addresses."""

Steer = Callable[[str, RelayId | None], Awaitable[int]]
"""Do LOOK, DRAIN or UNDO for a relay or, with None, for the whole gateway (which has no UNDO).
Returns what is left: the gateway's clients, the relay's streams, or UNKNOWN."""


class Steering:
    """Carries out `fxgateway drain`: this process takes no more clients, or gives one relay nothing new. Either ends with a restart."""

    def __init__(self, registry: Registry, doors: Doors, on_drain: Callable[[], None]) -> None:
        self._registry = registry
        self._doors = doors
        self._on_drain = on_drain

    async def ask(self, method: str, relay_id: RelayId | None) -> int:
        """See `Steer`."""
        await trio.lowlevel.checkpoint()
        return self.act(method, relay_id)

    def act(self, method: str, relay_id: RelayId | None) -> int:
        """See `Steer`. A drain of a relay also holds if the relay connects only later."""
        if relay_id is None:
            return self._drain(method)
        if method == DRAIN:
            self._registry.drain(relay_id)
            logger.info("relay %s gets nothing new, as an administrator wished", relay_id)
        elif method == UNDO:
            self._registry.undrain(relay_id)
            logger.info("relay %s gets streams again", relay_id)
        relay = next((relay for relay in self._registry.relays() if relay.relay_id == relay_id), None)
        instances = (*self._registry.leaving(relay_id), *([relay] if relay is not None else []))
        return sum(instance.open_streams for instance in instances) if instances else UNKNOWN

    def _drain(self, method: str) -> int:
        if method == DRAIN:
            logger.info("draining, as an administrator wished: no more clients until the next restart")
            self._doors.close()
            self._on_drain()
        return self._doors.clients


def steering_app(steer: Steer) -> Starlette:
    """The pages. POST /drain: take no more clients. POST /drain/RELAY_ID: give that relay nothing new; DELETE undoes it. GET only looks.

    All answer with the number of clients or streams that are left, and with which process says so: a drain ends with it. 503 while a
    worker does not say how many it has.
    """

    process = secrets.token_hex(8)  # not the pid, which the next process may have, too

    async def drain(request: Request) -> Response:
        relay_id = request.path_params.get("relay_id")
        try:
            left = await steer(request.method, None if relay_id is None else RelayId(relay_id))
            return JsonPage({"left": left, "process": process})
        except FxError as exc:
            logger.warning("what is left is not known: %s", exc)
            return JsonPage({"error": str(exc)}, 503)

    return pages_app(
        [
            Route("/drain", drain, methods=[DRAIN, LOOK]),
            Route("/drain/{relay_id}", drain, methods=[DRAIN, LOOK, UNDO]),
        ]
    )


class AdminPages:
    """Serves the status pages and the steering socket, until a successor takes them over."""

    def __init__(self, app: Starlette, admin: Address, steer: Steer, steering: Address, inherited: Inherited) -> None:
        self._app = app
        self._admin = admin
        self._steer = steer
        self._steering = steering
        self._inherited = inherited
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[Address]) -> None:
        """Serve until `end`, or until cancelled. `started()` tells where the status pages are.

        Raises:
            ListenError: the address of the status pages cannot be listened on.
        """
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_steering, self._steer, self._steering, self._inherited)
                task_status.started(await nursery.start(serve_pages, self._app, self._admin, self._inherited))
        self._ended.set()

    async def end(self) -> None:
        """Let go of both addresses, and hang up on whoever is reading an answer. Only while `run` runs."""
        self._scope.cancel()
        with trio.move_on_after(HANG_UP_S):
            await self._ended.wait()


async def serve_steering(steer: Steer, address: Address, inherited: Inherited | None = None) -> None:
    """Serve them until cancelled. A gateway that cannot be steered serves its clients all the same: that is only logged."""
    if len(os.fsencode(str(address.path))) > MAX_SOCKET_PATH_BYTES:
        logger.warning("the path is too long for a socket, `fxgateway drain` will not work: %s", address)
        return
    try:
        await serve_pages(steering_app(steer), address, inherited)
    except ListenError as exc:
        logger.warning("`fxgateway drain` will not work: %s", exc)
