"""A relay that the gateway trusts as far as an enrolled relay goes, and that says what no honest relay says."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from fxrelay.uplink.control_link import ControlLink, control_hello, open_control_link
from fxrelay.uplink.datalink import open_data_link
from fxrelay.uplink.dial import Dialler
from fxrelay.uplink.enrol import enrol
from fxrelay.uplink.gateway_file import GatewayFile, GatewayUrl, load_gateway_file
from fxrelay.uplink.identity import Identity, load_identity
from fxrelay.uplink.ports import UplinkConfig
from fxtunnel.control.messages import Hello as ControlHello
from fxtunnel.control.messages import Load, encode
from fxtunnel.control.upgrade import CONTROL_PATH, open_websocket
from fxtunnel.kit.tls import TlsStream
from fxtunnel.model import Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol import frames
from fxtunnel.protocol.alpn import ALPN_HTTP
from fxtunnel.protocol.hello import Hello, Welcome
from tests.protocol.recording import CollectingSink, Frame
from tests.system.stack import Stack

PATIENCE_S = 20.0


@dataclass
class Line:
    """A data link whose other end is the gateway's; what arrives is parsed, and nothing is ever answered by itself."""

    stream: TlsStream
    welcome: Welcome
    sink: CollectingSink = field(default_factory=CollectingSink)
    received_bytes: int = 0
    is_closed: bool = False

    async def send(self, *raw: bytes) -> None:
        """Frames, or what is none."""
        await self.stream.send_all(b"".join(raw))

    async def listen(self) -> None:
        """Take what comes until the gateway ends the link."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.stream.receive_some():
                self.received_bytes += len(data)
                self.sink.feed(data)
        self.is_closed = True

    async def wait_for(self, kind: int, number: int = 1) -> Frame:
        """The `number`th frame of that kind."""
        with trio.fail_after(PATIENCE_S):
            while len(found := [frame for frame in self.sink.whole_frames() if frame[0] == kind]) < number:
                assert not self.is_closed, "the gateway ended the link"
                await trio.sleep(0.01)
        return found[number - 1]

    async def wait_closed(self) -> int | None:
        """Until the gateway has ended the link; the code of its GOAWAY, if it said one."""
        with trio.fail_after(PATIENCE_S):
            while not self.is_closed:
                await trio.sleep(0.01)
        codes = [frames.decode_u16(payload) for kind, _, payload in self.sink.frames if kind == frames.GOAWAY]
        return codes[-1] if codes else None


@dataclass
class Liar:
    """An enrolled relay. It offers `services`, whoever else does."""

    dialler: Dialler
    url: GatewayUrl
    gateway: GatewayFile
    identity: Identity
    hello: ControlHello

    def bearer(self, binding: str) -> str:
        """A fresh assertion."""
        return self.identity.assertion(self.gateway.gateway_id, binding, time.time())

    @asynccontextmanager
    async def control(self) -> AsyncIterator[ControlLink]:
        """A control link that behaves, for tickets."""
        async with (
            open_control_link(self.dialler, self.url, self.gateway, self.hello, self.bearer, UplinkConfig()) as link,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(link.run, lambda: Load(streams=0), lambda deadline_s: None)
            yield link
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def raw_control(self, hello: ControlHello | None = None) -> AsyncIterator[tuple[object, TlsStream]]:
        """A control link after its hello that answers nothing: its WebSocket, and the TLS stream beneath it."""
        stream = TlsStream(await self.dialler.dial(self.url, ALPN_HTTP))
        try:
            async with trio.open_nursery() as nursery:
                headers = {"Authorization": f"Bearer {self.bearer(stream.socket.binding())}"}
                websocket = await open_websocket(nursery, stream, self.url.authority, CONTROL_PATH, headers)
                await websocket.send_message(encode(hello or self.hello))
                yield websocket, stream
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(stream)

    @asynccontextmanager
    async def data_link(self, link: ControlLink, session: SessionId | None = None, received: int = 0) -> AsyncIterator[Line]:
        """A data link that was welcomed; it is listened to."""
        sock, welcome = await open_data_link(
            self.dialler, self.url, Hello(await link.ticket(session), session, received, caps=self.hello.caps)
        )
        line = Line(TlsStream(sock), welcome)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(line.listen)
                yield line
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(line.stream)


async def enrolled_liar(stack: Stack, name: str, *services: str) -> Liar:
    """A relay of its own key that the stack's gateway takes for one of its relays."""
    gateway = load_gateway_file(stack.directory / "gateway.json")
    identity = await load_identity(stack.directory / name, RelayId(name))
    dialler = Dialler(gateway.ca_pem, None, timeout_s=PATIENCE_S, dead_after_s=PATIENCE_S)
    await enrol(dialler, gateway.urls[0], gateway, identity, time.time)
    hello = control_hello(identity, tuple(Offer(ServiceName(service)) for service in services), ("resume",))
    return Liar(dialler, gateway.urls[0], gateway, identity, hello)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll, letting the liar's tasks run."""
    with trio.move_on_after(PATIENCE_S) as scope:
        while not condition():
            await trio.sleep(0.02)
    assert not scope.cancelled_caught, f"{what} did not come true in {PATIENCE_S:g} s"
