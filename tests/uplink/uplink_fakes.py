"""A gateway on loopback that does what a test tells it, and a session that only remembers what was done to it."""

import json
import random
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from pydantic import SecretStr

from fxrelay.uplink.gateway_file import Enrolment, GatewayFile, GatewayUrl
from fxrelay.uplink.identity import load_identity
from fxrelay.uplink.ports import UplinkConfig, UplinkSessionOwner
from fxrelay.uplink.uplink import Uplink, UplinkEnvironment
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import CAP_NAMED, Closing, Load, Message, Refused, Ticket, TicketRequest, encode
from fxtunnel.control.messages import Hello as ControlHello
from fxtunnel.control.messages import Welcome as ControlWelcome
from fxtunnel.control.upgrade import accept_websocket, answer, read_body, read_head, refusal_fields
from fxtunnel.engine.ports import SessionStatistics, State
from fxtunnel.errors import FxError, PeerRefused, RemoteProtocolError, TunnelError
from fxtunnel.kit.certificates import Authority, issue_server_certificate
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.link_tls import LinkContext, LinkSocket
from fxtunnel.kit.tls import HandshakeFailed, TlsStream, handshake_server, server_context
from fxtunnel.kit.tokens import public_from_text, verify_assertion
from fxtunnel.model import GatewayId, Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol.alpn import is_data, spoken_by
from fxtunnel.protocol.hello import (
    HEADER_BYTES,
    Denied,
    Hello,
    Welcome,
    decode_hello,
    encode_denied,
    encode_welcome,
    parse_header,
)
from fxtunnel.protocol.mux import MuxStatistics

GATEWAY_ID = GatewayId("gw-test")
RELAY_ID = RelayId("node-a")
OFFERS = (Offer(ServiceName("ssh")),)
QUICK = UplinkConfig(min_backoff_s=0.01, max_backoff_s=0.02, dial_timeout_s=2.0)


class LongestWaits(random.Random):
    """Chance at its most unfavourable: every wait is as long as it may be."""

    def uniform(self, a: float, b: float) -> float:
        return b


class FakeSession:
    """Remembers calls. Its counter moves only while a link is attached, and may be read only while none is."""

    def __init__(self, owner: UplinkSessionOwner, session_id: SessionId) -> None:
        self.owner = owner
        self.id = session_id
        self.link: LinkSocket | None = None
        self.calls: list[str] = []
        self.peer_received: list[int] = []
        self.closed: tuple[Code, str] | None = None
        self.counter = 0
        self.streams = 3
        self.opened = 4
        self.has_delivered = True
        self.refuses_to_attach = False

    @property
    def received(self) -> int:
        self.calls.append("received, up" if self.link else "received")
        return self.counter

    def detach(self, reason: str) -> None:
        self.calls.append("detach")
        self.link = None

    def forgo_resumption(self) -> None:
        self.calls.append("forgo")

    def attach(self, link: LinkSocket, peer_received: int) -> None:
        if self.refuses_to_attach:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the peer wants bytes that were never sent")
        self.calls.append("attach")
        self.peer_received.append(peer_received)
        self.link = link

    def close(self, code: Code, text: str = "") -> None:
        if self.closed is None:
            self.closed = (code, text)
            self._drop()
            self.owner.on_closed(self, code, text)

    def statistics(self) -> SessionStatistics:
        return SessionStatistics(self.id, State.UP if self.link else State.HELD, 0, MuxStatistics(self.streams, self.opened, 5, 6, 0.0))

    def press(self) -> None:
        self.calls.append("press")

    def cut(self) -> None:
        """The engine has found the link dead."""
        self._drop()
        self.owner.on_link_down(self, "cut")

    def _drop(self) -> None:
        if self.link is not None:
            self.link.close()
        self.link = None


class FakeFactory:
    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> FakeSession:
        self.sessions.append(FakeSession(owner, session_id))
        return self.sessions[-1]


class FakeGateway:
    """Speaks PROTOCOL.md on loopback. Set what it answers before the relay dials; look at what it saw afterwards."""

    def __init__(self, authority: Authority, context: LinkContext) -> None:
        self.authority = authority
        self.context = context
        self.port = 0
        # what it answers
        self.enrolling: list[PeerRefused] = []  # used up one by one, then yes
        self.upgrading: list[PeerRefused] = []
        self.greeting: list[Refused | Closing | ControlWelcome] = []
        self.data: Callable[[Hello], Welcome | Denied] = self._welcome_data
        self.holds_welcome: trio.Event | None = None  # no welcome before it is set
        self.is_mute = False  # never carries a control link beyond its welcome
        self.gives_tickets = True
        self.hold_s = 30.0
        self.dead_after_s = 5.0
        # what it saw
        self.keys: dict[str, str] = {}
        self.dialled_at: list[float] = []
        self.spoken: list[str] = []
        self.enrolments: list[dict[str, Any]] = []
        self.hellos: list[ControlHello] = []
        self.heard: list[Message] = []
        self.controls: list[tuple[Channel, TlsStream]] = []
        self.data_hellos: list[Hello] = []
        self.data_links: list[LinkSocket] = []
        self._sessions = 0

    @property
    def file(self) -> GatewayFile:
        url = GatewayUrl("127.0.0.1", self.port)
        return GatewayFile(Path("gateway.json"), GATEWAY_ID, (url,), self.authority.cert_pem, Enrolment(SecretStr("fxe_secret"), 2**40))

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
            self.port = listener.socket.getsockname()[1]
            task_status.started()
            await trio.serve_listeners(self._handle, [listener], handler_nursery=nursery)

    def take_name(self, process: str) -> None:
        """Be this process, and one that can be named."""
        with tempfile.TemporaryDirectory() as directory:
            self.context = make_context(Path(directory), self.authority, alpn=spoken_by(process))
        self.greeting = [self.welcome(process=process, caps=("resume", CAP_NAMED)) for _ in range(8)]

    async def wait_controls(self, count: int) -> None:
        """Wait until so many control links have been welcomed in all."""
        await until(lambda: len(self.controls) >= count)

    @property
    def loads(self) -> list[Load]:
        """What it was told so far of what the relay carries."""
        return [message for message in self.heard if isinstance(message, Load)]

    def cut_control(self) -> None:
        """Break the newest control link without a goodbye of TLS."""
        socket.socket.shutdown(self.controls[-1][1].socket, socket.SHUT_RDWR)

    async def _handle(self, stream: trio.SocketStream) -> None:
        self.dialled_at.append(trio.current_time())
        try:
            tls = await handshake_server(_plain(stream), self.context)
        except HandshakeFailed:
            return
        peer = TlsStream(tls)
        try:
            self.spoken.append(tls.selected_alpn_protocol() or "")
            if is_data(self.spoken[-1]):
                await self._data_link(peer)
            else:
                await self._http(peer)
        except (TunnelError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            if tls not in self.data_links:
                tls.close()

    async def _http(self, peer: TlsStream) -> None:
        try:
            head = await read_head(peer)
            try:
                if head.method == "POST":
                    body = json.loads(await read_body(peer, head))
                    self.enrolments.append(body)
                    if self.enrolling:
                        raise self.enrolling.pop(0)
                    key = public_from_text(body["public_key"])
                    binding = peer.socket.binding()
                    proof = verify_assertion(
                        body["assertion"], gateway_id=GATEWAY_ID, binding=binding, find_key=lambda *_: key, now_unix=_now()
                    )
                    self.keys[proof.kid] = body["public_key"]
                    await answer(peer, 200, {"relay_id": RELAY_ID, "gateway_id": GATEWAY_ID, "kid": proof.kid})
                    return
                if self.upgrading:
                    raise self.upgrading.pop(0)
                token = (head.header("authorization") or "").removeprefix("Bearer ")
                proof = verify_assertion(
                    token,
                    gateway_id=GATEWAY_ID,
                    binding=peer.socket.binding(),
                    find_key=lambda _, kid: public_from_text(self.keys[kid]),
                    now_unix=_now(),
                )
            except PeerRefused as exc:
                await answer(peer, exc.refusal.status, refusal_fields(exc, _now()))
                return
            async with trio.open_nursery() as readers:
                websocket = await accept_websocket(readers, peer, head)
                channel = Channel(websocket)
                try:
                    await self._control(channel, websocket, peer)
                except TunnelError:
                    await channel.goodbye(Closing(code=Code.NORMAL))
                finally:
                    readers.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(peer)

    async def _control(self, channel: Channel, websocket: Any, peer: TlsStream) -> None:
        hello = await channel.receive()
        assert isinstance(hello, ControlHello)
        self.hellos.append(hello)
        if self.holds_welcome is not None:
            await self.holds_welcome.wait()
        reply = self.greeting.pop(0) if self.greeting else self.welcome()
        await websocket.send_message(encode(reply))
        if not isinstance(reply, ControlWelcome):
            return
        self.controls.append((channel, peer))
        if self.is_mute:
            await trio.sleep_forever()

        def on_message(message: Message) -> None:
            self.heard.append(message)
            if isinstance(message, TicketRequest) and self.gives_tickets:
                ticket = f"{message.session or 'new'}/{message.request}"
                channel.send_nowait(Ticket(request=message.request, ticket=ticket, expires_s=10))

        await channel.run(on_message, heartbeat_s=1, dead_after_s=self.dead_after_s)

    def welcome(self, **changes: Any) -> ControlWelcome:
        fields: dict[str, Any] = {
            "version": "1.2.3",
            "gateway_id": GATEWAY_ID,
            "epoch": 7,
            "heartbeat_s": 1.0,
            "dead_after_s": self.dead_after_s,
            "hold_s": self.hold_s,
        }
        return ControlWelcome(**(fields | changes))

    async def _data_link(self, peer: TlsStream) -> None:
        head = await peer.receive_some(HEADER_BYTES)
        if len(head) < HEADER_BYTES:
            return  # the relay needs it no more
        _, length, _ = parse_header(head)
        hello = decode_hello(await peer.receive_some(length))
        self.data_hellos.append(hello)
        reply = self.data(hello)
        if isinstance(reply, Denied):
            await peer.send_all(encode_denied(reply))
            await trio.aclose_forcefully(peer)
            return
        await peer.send_all(encode_welcome(reply))
        self.data_links.append(peer.detach()[0])

    def _welcome_data(self, hello: Hello) -> Welcome:
        self._sessions += hello.session is None
        return Welcome(hello.session or session_id(self._sessions), received=1000)

    def close(self) -> None:
        for link in self.data_links:
            link.close()


def session_id(number: int) -> SessionId:
    return SessionId(f"{number:032x}")


def deny(refusal: Refusal, retry_after_s: float = 0.0) -> Denied:
    return Denied(refusal, "the fake says no", retry_after_s)


def make_context(directory: Path, authority: Authority, *hosts: str, alpn: Sequence[str] = ("http/1.1", "fx-data/1")) -> LinkContext:
    certificate, key = issue_server_certificate(authority, hosts or ("127.0.0.1",))
    (directory / "server.pem").write_text(certificate)
    write_secret(directory / "server.key", key)
    return server_context(directory / "server.pem", directory / "server.key", alpn)


class Running:
    """An uplink that runs against a fake gateway, and how it ended."""

    def __init__(self, uplink: Uplink, gateway: FakeGateway, factory: FakeFactory) -> None:
        self.uplink = uplink
        self.gateway = gateway
        self.factory = factory
        self.started = trio.Event()
        self.ended = trio.Event()
        self.error: BaseException | None = None

    @property
    def session(self) -> FakeSession:
        return self.factory.sessions[-1]

    @property
    def is_carrying(self) -> bool:
        return bool(self.factory.sessions) and self.session.link is not None

    async def run(self) -> None:
        outer = self

        class Status:
            def started(self, value: None = None) -> None:
                outer.started.set()

        try:
            await self.uplink.run(task_status=Status())
        except FxError as exc:
            self.error = exc
        finally:
            self.ended.set()


@asynccontextmanager
async def running(
    gateway: FakeGateway, state_dir: Path, config: UplinkConfig = QUICK, environment: UplinkEnvironment | None = None
) -> AsyncIterator[Running]:
    """The gateway and an uplink to it; both are gone at the end of the block."""
    try:
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                await nursery.start(gateway.serve)
                factory = FakeFactory()
                identity = await load_identity(state_dir, RELAY_ID)
                environment = environment or UplinkEnvironment(LongestWaits())
                it = Running(Uplink(gateway.file, identity, OFFERS, factory, config, environment), gateway, factory)
                nursery.start_soon(it.run)
                yield it
                nursery.cancel_scope.cancel()
    finally:
        gateway.close()


async def until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    """Wait for something that real sockets bring about."""
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.005)


def _plain(stream: trio.SocketStream) -> Any:
    return socket.socket(fileno=stream.socket.detach())


def _now() -> float:
    return time.time()
