"""R10: an exception at every await of a connection to the status pages. The pages go on, and let in whoever comes next."""

import contextlib
import logging

import pytest
import trio
from sabotage import FAULTS, LIMIT, lines_about, sabotage
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fxtunnel.kit import pages
from fxtunnel.kit.pages import serve_pages
from fxtunnel.kit.settings import Address


async def healthz(request: Request) -> Response:
    return PlainTextResponse("ok\n")


APP = Starlette(routes=[Route("/healthz", healthz)])
ASK = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
ASK_LAST = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


async def ask(stream: trio.SocketStream, request: bytes) -> None:
    await stream.send_all(request)
    answer = b""
    while not answer.endswith(b"ok\n"):
        more = await stream.receive_some()
        if not more:
            raise trio.BrokenResourceError
        answer += more


async def test_a_fault_at_every_await_of_a_connection(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "IDLE_S", 0.3)
    monkeypatch.setattr(pages, "ERROR_S", 0.1)
    caplog.set_level(logging.WARNING)
    hits = 0
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(serve_pages, APP, Address.parse("127.0.0.1:0"))

            async def victim() -> None:
                with trio.move_on_after(2), contextlib.suppress(trio.BrokenResourceError):
                    async with await trio.open_tcp_stream("127.0.0.1", address.port) as stream:
                        await ask(stream, ASK)
                        await ask(stream, ASK_LAST)
                        await stream.receive_some()

            for nth in range(1, LIMIT):
                with sabotage(nth, "_run_handler") as done:
                    async with trio.open_nursery() as victims:
                        for _ in FAULTS:
                            victims.start_soon(victim)
                    with trio.fail_after(5):
                        while not done.is_over:
                            await trio.sleep(0.005)
                hits += len(done.hit)
                # A second line is hypercorn's own, about the application.
                assert all(len(lines_about(tree.fault, caplog)) <= 2 for tree in done.hit)
                caplog.clear()
                async with await trio.open_tcp_stream("127.0.0.1", address.port) as bystander:
                    await ask(bystander, ASK_LAST)
                if not done.hit:
                    break
            nursery.cancel_scope.cancel()
    assert hits > 5 * len(FAULTS)
