"""Task: the relay's status socket: /healthz, /status, /nodes/NAME and /metrics, which only tell, and /drain, for planned work."""

import secrets
from collections.abc import Callable
from dataclasses import asdict

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fxrelay.admin.metrics import RelayCollector
from fxrelay.admin.view import RelayView
from fxtunnel.kit.pages import PAGE_HEADERS, JsonPage, pages_app


def make_app(view: RelayView, drain: Callable[[], None] | None = None) -> Starlette:
    """The pages, for `serve_pages`. Every answer is made from one look at `view`.

    /healthz: 200 while the process answers. /status: JSON object with `relay` (see `Totals`), `uplinks`, `services`, `cluster` and
    `reservations`. /nodes/NAME: JSON object, see `NodeStatus`; 404 for a node that this relay has not heard of.
    /metrics: Prometheus text. POST /drain calls `drain`, if there is one, and tells how many streams are left, and which process
    says so. All others: GET and HEAD.
    """
    process = secrets.token_hex(8)  # not the pid, which the next process may have, too
    registry = CollectorRegistry()
    registry.register(RelayCollector(view))
    ProcessCollector(registry=registry)

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n", headers=PAGE_HEADERS)

    async def status(request: Request) -> Response:
        return JsonPage(
            {
                "relay": asdict(view.totals()),
                "uplinks": [asdict(uplink) for uplink in view.uplinks()],
                "services": [asdict(service) for service in view.services()],
                "cluster": asdict(view.cluster()),
                "reservations": asdict(view.reservations()),
            },
            headers=PAGE_HEADERS,
        )

    async def node(request: Request) -> Response:
        found = view.node(request.path_params["name"])
        if found is None:
            return PlainTextResponse("no such node has been heard of\n", 404, headers=PAGE_HEADERS)
        return JsonPage(asdict(found), headers=PAGE_HEADERS)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4, headers=PAGE_HEADERS)

    async def planned(request: Request) -> Response:
        if drain is not None and request.method == "POST":
            drain()
        return JsonPage({"left": view.totals().streams, "process": process}, headers=PAGE_HEADERS)

    return pages_app(
        [
            Route("/drain", planned, methods=["GET", "POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/status", status, methods=["GET"]),
            Route("/nodes/{name}", node, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ]
    )
