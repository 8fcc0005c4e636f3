"""A relay that serves HTTP on a whole data plane, and services that say exactly what the test wants."""

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio
from delivery_rig import ScriptedChooser
from peers import LOOPBACK, connect
from plane import SERVICE, Plane, RelaySide

from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxrelay.delivery.services import Endpoint, PoolService, Service
from fxrelay.web.desk import WebDesk
from fxrelay.web.ports import RequestGate, WebLimits, WebRules
from fxtunnel.codes import Code
from fxtunnel.kit.settings import Address
from fxtunnel.model import RelayId

Handler = Callable[[trio.SocketStream, bytes], Awaitable[None]]
QUICK = WebLimits(head_timeout_s=0.6, keep_alive_s=2.0, stall_timeout_s=0.6, idle_timeout_s=2.0)


class NamingChooser(ScriptedChooser):
    """Also knows the nodes by name."""

    def __init__(self, *nodes: object) -> None:
        super().__init__(*nodes)
        self.named_asked: list[RelayId] = []

    async def named(self, wanted: Wanted, server_id: RelayId) -> Node | NoNode:
        await trio.lowlevel.checkpoint()
        self.named_asked.append(server_id)
        for spec in self.nodes:
            if spec.name == server_id:
                return Node(server_id, spec.is_local, spec.address, spec.can_redirect, _Nothing())
        return NoNode(Code.NO_SERVICE, "no such node")


class _Nothing:
    def connected(self) -> None: ...
    def release(self) -> None: ...
    def hand_over(self) -> None: ...


async def add_web_relay(
    plane: Plane,
    port: int,
    rules: WebRules | None = None,
    *,
    chooser: NamingChooser | None = None,
    host: str = LOOPBACK,
    limits: WebLimits = QUICK,
    gate: RequestGate | None = None,
    is_pool: bool = False,
    delivery: DeliveryLimits | None = None,
    name: str = "a",
) -> tuple[RelaySide, WebDesk]:
    """A relay whose SERVICE is HTTP at `port`."""
    relay = await plane.add_relay(name=name, limits=delivery)
    endpoints = (Endpoint(2, (host, port), is_local=True),)
    service = PoolService(SERVICE, host, port, endpoints, "http") if is_pool else Service(SERVICE, Address(host, port), endpoints, "http")
    relay.table.replace([service])
    relay.desk.web = web = WebDesk(relay.desk, chooser or NamingChooser(), RelayId("a"), limits, gate)
    web.reconfigure({SERVICE: rules or WebRules(SERVICE)})
    await plane.nursery.start(web.run)
    return relay, web


async def read_head(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    """A head with its empty line, and what came behind it."""
    data = bytearray()
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65_536)
        if not more:
            return bytes(data), b""
        data += more
    end = data.index(b"\r\n\r\n") + 4
    return bytes(data[:end]), bytes(data[end:])


class Canned:
    """A service that answers every request with the next of its answers, and notes the bytes it got. None: it closes."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.got: list[bytes] = []
        self.connections = 0

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        while True:
            head, _ = await read_head(stream)
            if not head:
                return
            self.got.append(head)
            answer = self.answers.pop(0) if self.answers else OK
            if answer is None:
                return
            await stream.send_all(answer)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def ask(port: int, request: bytes, *, ends: bool = False) -> bytes:
    """Everything that comes back to these bytes up to the connection's end. A reset is shown as such."""
    stream = await connect(port)
    found = bytearray()
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request)
            if ends:
                await stream.send_eof()
        try:
            with trio.fail_after(30):
                async for data in stream:
                    found += data
        except trio.BrokenResourceError:
            return bytes(found) + b"<RESET>"
    return bytes(found)


def statuses(answer: bytes) -> list[int]:
    """The statuses of all responses in there."""
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", answer)]
