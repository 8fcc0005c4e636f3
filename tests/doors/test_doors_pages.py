"""Pages of a door's own: one word a person can look up, what RFC 9110 asks for, and no echo of a client's bytes in the log."""

import json
import logging

import pytest
import trio
from peers import connect, receive_all
from plane import Contexts, open_plane

from fxgateway.routing.hosts import HostTable
from fxgateway.routing.preread_router import DoorKind, PrereadRouter
from fxtunnel.model import ServiceName

STREAM = b"GET /.fx/stream/ssh%s HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: fx-stream\r\n\r\n"


async def ask(port: int, request: bytes) -> tuple[bytes, bytes]:
    async with await connect(port) as stream:
        await stream.send_all(request)
        with trio.fail_after(5):
            head, _, body = (await receive_all(stream)).partition(b"\r\n\r\n")
            return head, body


@pytest.mark.parametrize(
    ("request_", "status", "name"),
    [
        (STREAM % b"" + b"\r\n", 426, "UpgradeRequired"),
        (STREAM.replace(b"ssh", b"db") % b"" + UPGRADE, 404, "NoRoute"),
        (STREAM % b"?node=a%%20b" + UPGRADE, 400, "BadRequest"),
        (STREAM % b"?node=a&node=b" + UPGRADE, 400, "BadRequest"),
        (STREAM % b"?nod=a" + UPGRADE, 400, "BadRequest"),
        (STREAM % b"?node=" + UPGRADE, 400, "BadRequest"),
        (STREAM % b"?node=n9" + UPGRADE, 503, "NoRelay"),
        (b"GET / HTTP/1.1\r\nHost: nobody.test\r\nAccept: application/json\r\n\r\n", 404, "NoRoute"),
    ],
)
async def test_a_page_has_one_word_for_what_is_wrong(contexts: Contexts, request_: bytes, status: int, name: str) -> None:
    async with open_plane(contexts) as plane:
        preread_router = PrereadRouter(DoorKind.HTTP, HostTable([]), None, None, frozenset({ServiceName("ssh")}))
        head, body = await ask(plane.add_door(service=ServiceName(""), preread_router=preread_router), request_)
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(body)["error"]["name"] == name
        assert body.endswith(b"}\n")
        assert (b"\r\nUpgrade: fx-stream" in head) is (status == 426)
        await plane.quiet()


async def test_what_is_no_request_is_not_repeated(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        port = plane.add_door(service=ServiceName(""), preread_router=PrereadRouter(DoorKind.HTTP, HostTable([]), None))
        with caplog.at_level(logging.INFO):
            head, body = await ask(port, b"forged\x1b[31m line\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"Illegal request line." in body
        assert not any("forged" in record.getMessage() for record in caplog.records)
