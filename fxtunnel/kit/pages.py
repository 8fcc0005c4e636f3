"""Task: HTTP pages about a daemon: serving a Starlette app on hypercorn's trio worker, and asking one from a command."""

import contextlib
import http.client
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fxtunnel.errors import FxError
from fxtunnel.kit.listeners import Inherited, bound_address, listen
from fxtunnel.kit.page_clients import PageClient, PageClients
from fxtunnel.kit.settings import Address

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 8192
IDLE_S: Final = 5
"""For the next request on a connection: a scraper's are farther apart, and it connects again."""
ERROR_S: Final = 1.0
"""For what is left of an answer after an error."""
PAUSE_S: Final = 0.25
"""Without accepting, after an error."""
# 4,096 relays in JSON are about 3 MB.
MAX_ANSWER_BYTES: Final = 64 << 20

PAGE_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""For every answer about a daemon: it is out of date at once, and holds words that peers have chosen."""


class JsonPage(JSONResponse):
    """JSON that ends with a line feed, so that after `curl` the prompt is on a line of its own."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return super().render(content) + b"\n"


def pages_app(routes: Sequence[Route]) -> Starlette:
    """An app of these pages, for `serve_pages`. An unknown page or a wrong method gets a line of plain text."""
    return Starlette(routes=routes, exception_handlers={HTTPException: _say_why})


async def _say_why(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return PlainTextResponse(f"{exc.detail}\n", exc.status_code, exc.headers)


async def serve_pages(
    app: Starlette,
    address: Address,
    inherited: Inherited | None = None,
    *,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` on `address` until cancelled: `listening_for_pages` and `serve_pages_on` in one.

    `started()` tells the address that is listened on, with the port the kernel chose for port 0.

    Raises:
        ListenError: the address is in use, not permitted, or not one of this machine.
    """
    with listening_for_pages(address, inherited) as sock:
        await serve_pages_on(app, sock, task_status=task_status)


async def serve_pages_on(app: Starlette, sock: socket.socket, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve `app` to whoever connects to the listening socket `sock`, until cancelled, which closes it.

    Whatever goes wrong in a connection is logged and ends that connection only. Cancelling hangs up at once, also on a client that does
    not read its answer. The app is not sent lifespan events.
    """
    config, context, clients = _config(), WorkerContext(None), PageClients()

    async def serve_one(stream: trio.SocketStream) -> None:
        scope = trio.CancelScope()
        asgi = wrap_app(cast(ASGIFramework, _ending_quietly(app, scope)), config.wsgi_max_body_size, "asgi")
        client = PageClient(clients, asgi, config, context, stream, scope)
        try:
            try:
                if clients.enter(client):
                    with scope:
                        await client.run()
            finally:
                clients.leave(client)
                await trio.aclose_forcefully(stream)
        except Exception:
            logger.exception("a connection to the pages failed")

    # Not hypercorn's own serve(): there, one connection's unexpected error would end all of them, and the daemon.
    with sock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients.run)
            listener = _PatientListener(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
            task_status.started(bound_address(sock))
            await trio.serve_listeners(serve_one, [listener], handler_nursery=nursery)


class _PatientListener(trio.abc.Listener[trio.SocketStream]):
    """Outlives every error of accept(2). trio takes those that it does not know for the end, as of a security module that refuses: with the
    pages it would be the daemon's.
    """

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener

    async def accept(self) -> trio.SocketStream:
        """See `trio.abc.Listener`."""
        while True:
            try:
                return await self._listener.accept()
            except OSError as exc:
                logger.warning("the pages take no connections for a moment: %s", exc.strerror or exc)
                await trio.sleep(PAUSE_S)

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self._listener.aclose()


def _ending_quietly(app: Starlette, connection: trio.CancelScope) -> ASGIApp:
    """`app`, for which a client that is gone is no error. hypercorn itself hangs up on one whose request turns out to be malformed.

    After any other error hypercorn may wait for ever, for the end of an answer that will not come; it has ERROR_S to send what it has.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (trio.BusyResourceError, trio.BrokenResourceError, trio.ClosedResourceError):
            logger.warning("a client of the pages was gone before it had its answer")
        except Exception:
            connection.deadline = trio.current_time() + ERROR_S
            raise

    return serve


def fetch_json(address: Address, path: str, timeout_s: float, method: str = "GET") -> dict[str, Any]:
    """The JSON object that `path` answers with, asked for at most `timeout_s` between two pieces of the answer. Blocks.

    Raises:
        FxError: nobody answers, or not with a JSON object; `str()` says which.
    """
    connection = _Connection(address, timeout_s)
    try:
        connection.request(method, path, headers={"Accept": "application/json", "Connection": "close"})
        response = connection.getresponse()
        body = response.read(MAX_ANSWER_BYTES)
        if response.length:
            raise http.client.IncompleteRead(body, response.length)
    except OSError as exc:
        raise FxError(f"{address}: {'no answer in time' if isinstance(exc, TimeoutError) else exc.strerror or exc}") from exc
    except http.client.HTTPException as exc:
        raise FxError(f"{address}: the answer is not HTTP, or is cut short") from exc
    finally:
        connection.close()
    if response.status != 200:
        raise FxError(f"{address}: {path} answers with status {response.status}")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise FxError(f"{address}: {path} does not answer in JSON") from exc
    if not isinstance(answer, dict):
        raise FxError(f"{address}: {path} does not answer with a JSON object")
    return answer


class _Connection(http.client.HTTPConnection):
    """Plain HTTP, over a unix socket too."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__(address.host or "localhost", address.port, timeout=timeout_s)
        self._path = address.path

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def listening_for_pages(address: Address, inherited: Inherited | None = None) -> Iterator[socket.socket]:
    """A socket for `serve_pages_on`, closed at the end of the block; whoever connects before pages are served waits.

    A unix socket has mode 0600 and is removed at the end, unless a successor has it.

    Raises:
        ListenError: the address is in use, not permitted, or not one of this machine.
    """
    # A unix socket has its mode from the moment it exists; a chmod afterwards would leave a gap.
    before = os.umask(0o177)
    try:
        sock = listen(address, inherited)
    finally:
        os.umask(before)
    with sock:
        try:
            yield sock
        finally:
            if address.path is not None and (inherited is None or not inherited.is_handed_on):
                address.path.unlink(missing_ok=True)


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.h11_max_incomplete_size = MAX_HEAD_BYTES
    config.keep_alive_timeout = IDLE_S
    config.read_timeout = IDLE_S
    return config
