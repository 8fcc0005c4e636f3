"""Task: the admin address: /healthz, /readyz, /metrics and /relays. It only tells; nothing can be changed here."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict

import trio
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fxgateway.admin.metrics import make_registry
from fxgateway.admin.view import DoorStatus, GatewayView, RelayStatus, Totals, WorkerStatus
from fxtunnel.kit.pages import PAGE_HEADERS, JsonPage, pages_app

__all__ = ["DoorStatus", "GatewayView", "RelayStatus", "Totals", "WorkerStatus", "make_app"]


def make_app(view: GatewayView, look: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint) -> Starlette:
    """The pages, for `serve_pages`. GET and HEAD only; every answer is made from one look at `view`, once `look` has brought it up to date.

    /healthz: 200 while the process answers. /readyz: 200, or 503 with the reasons. /metrics: Prometheus text. /relays: JSON object with
    `gateway` (see `Totals`), `relays`, `doors` and `not_ready` (why).
    """
    registry = make_registry(view)

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=PAGE_HEADERS)

    async def readyz(request: Request) -> Response:
        await look()
        is_ready, reasons = view.ready()
        return JsonPage({"ready": is_ready, "reasons": reasons}, status_code=200 if is_ready else 503, headers=PAGE_HEADERS)

    async def metrics(request: Request) -> Response:
        await look()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4, headers=PAGE_HEADERS)

    async def relays(request: Request) -> Response:
        await look()
        return JsonPage(
            {
                "gateway": asdict(view.totals()),
                "relays": [asdict(relay) for relay in sorted(view.relays(), key=lambda relay: relay.relay_id)],
                "doors": [asdict(door) for door in view.doors()],
                "not_ready": view.ready()[1],
            },
            headers=PAGE_HEADERS,
        )

    return pages_app(
        [
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/relays", relays, methods=["GET"]),
        ]
    )
