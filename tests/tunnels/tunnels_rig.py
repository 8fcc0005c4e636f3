"""A tunnel port on loopback with real TLS, a registry and sessions that only remember, and a relay's side to try it with."""

import contextlib
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fxgateway.tunnels.control import ControlConfig
from fxgateway.tunnels.identities import Identities
from fxgateway.tunnels.port import PortLimits, TunnelPort
from fxgateway.tunnels.ports import Departure
from fxtunnel.codes import Code
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import Hello, Message, Ticket, TicketRequest, encode
from fxtunnel.control.upgrade import CONTROL_PATH, ENROL_PATH, open_websocket, post_json
from fxtunnel.errors import PeerRefused, RemoteProtocolError
from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.kit.tls import TlsStream, client_context, handshake_client, server_context
from fxtunnel.kit.tokens import new_enrolment_token, new_key, public_to_text, sign_assertion
from fxtunnel.model import GatewayId, InstanceId, Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol import hello as wire

GATEWAY = GatewayId("gw.example")
NODE = RelayId("node-a")
SSH = (Offer(ServiceName("ssh")),)
LIMITS = PortLimits(hello_timeout_s=60.0, pending=256, pending_per_source=64)


Prove: TypeAlias = Callable[[TlsStream], str]


@dataclass
class FakeSession:
    """Remembers its links; `refuses` makes attach find the relay at fault."""

    id: SessionId = field(default_factory=lambda: SessionId(secrets.token_hex(16)))
    received: int = 0
    links: list[tuple[LinkSocket, int]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    refuses: bool = False

    @property
    def resumes(self) -> bool:
        return "forgo_resumption" not in self.log

    def forgo_resumption(self) -> None:
        self.log.append("forgo_resumption")

    def detach(self, reason: str) -> None:
        self.log.append("detach")

    def attach(self, link: LinkSocket, peer_received: int) -> None:
        if self.refuses:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "resume at 9, kept 0 to 3")
        self.log.append("attach")
        self.links.append((link, peer_received))

    def close(self, code: Code, text: str = "") -> None:
        self.log.append(f"close {code.label}")


@dataclass
class FakeRegistry:
    """One entry per relay, as the real one; `boom` raises from the named call."""

    is_draining: bool = False
    full: bool = False
    here: dict[RelayId, tuple[InstanceId, Any]] = field(default_factory=dict)
    sessions: dict[SessionId, FakeSession] = field(default_factory=dict)
    calls: list[tuple[object, ...]] = field(default_factory=list)
    boom: dict[str, BaseException] = field(default_factory=dict)
    epoch: int = 0

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if (exc := self.boom.get(str(call[0]))) is not None:
            raise exc

    def is_full(self, relay_id: RelayId) -> bool:
        return self.full

    def enter(self, relay_id: RelayId, instance: InstanceId, offers: tuple[Offer, ...], link: Any, epoch: int = 0) -> int:
        self._note("enter", relay_id, instance, offers)
        if relay_id in self.here:
            older_instance, older = self.here[relay_id]
            older.close(Code.FENCED if older_instance != instance else Code.NORMAL, "a newer one is here")
        self.here[relay_id] = (instance, link)
        self.epoch += 1
        return self.epoch

    def update_services(self, relay_id: RelayId, instance: InstanceId, offers: tuple[Offer, ...]) -> None:
        self._note("services", relay_id, instance, offers)

    def knows(self, relay_id: RelayId, instance: InstanceId | None = None) -> bool:
        return relay_id in self.here and instance in (None, self.here[relay_id][0])

    def is_up(self, relay_id: RelayId, instance: InstanceId) -> bool:
        return bool(self.sessions)

    def mark_draining(self, relay_id: RelayId, instance: InstanceId, departure: Departure) -> None:
        self._note("draining", relay_id, instance)

    def note_reluctance(self, relay_id: RelayId, instance: InstanceId, *, reluctant: bool) -> None:
        self._note("reluctance", relay_id, instance, reluctant)

    def leave(self, relay_id: RelayId, link: Any) -> None:
        if self.here.get(relay_id, (None, None))[1] is link:
            del self.here[relay_id]
        self._note("leave", relay_id)

    def new_session(self, relay_id: RelayId, instance: InstanceId) -> FakeSession | None:
        self._note("new_session", relay_id, instance)
        if self.here.get(relay_id, (None, None))[0] != instance:
            return None
        session = FakeSession()
        self.sessions[session.id] = session
        return session

    def note_sessions(self, relay_id: RelayId, instance: InstanceId, kept: tuple[SessionId, ...]) -> None:
        self._note("note_sessions", relay_id, instance, kept)

    def end_given_up(self, relay_id: RelayId, instance: InstanceId) -> None:
        self._note("end_given_up", relay_id, instance)

    def find_session(self, relay_id: RelayId, instance: InstanceId, session_id: SessionId) -> FakeSession | None:
        self._note("find_session", relay_id, instance)
        return self.sessions.get(session_id)

    def revoke(self, relay_id: RelayId) -> None:
        if relay_id in self.here:
            self.here[relay_id][1].close(Code.REVOKED, "revoked")


@dataclass
class Rig:
    """The port, and how to knock at it."""

    port: TunnelPort
    identities: Identities
    registry: FakeRegistry
    path: Path
    address: tuple[str, int]
    ca_pem: str
    token: str
    key: Ed25519PrivateKey = field(default_factory=new_key)
    stop: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def connect(self, source: str = "127.0.0.1") -> socket.socket:
        sock = trio.socket.socket()
        await sock.bind((source, 0))
        await sock.connect(self.address)
        return socket.socket(fileno=sock.detach())

    async def dial(self, alpn: str = "http/1.1", source: str = "127.0.0.1") -> TlsStream:
        return TlsStream(await handshake_client(await self.connect(source), client_context(self.ca_pem, [alpn]), "127.0.0.1"))

    def assertion(self, *, skew_s: float = 0, relay_id: RelayId = NODE, key: Ed25519PrivateKey | None = None) -> Prove:
        """Makes assertions for the streams it is given."""
        return lambda stream: sign_assertion(key or self.key, relay_id, GATEWAY, stream.socket.binding(), time.time() + skew_s)

    async def enrol(self, relay_id: RelayId = NODE, key: Ed25519PrivateKey | None = None, **changed: object) -> tuple[int, dict[str, Any]]:
        key = key or self.key
        body: dict[str, object] = {
            "v": 1,
            "token": self.token,
            "relay_id": relay_id,
            "assertion": self.assertion(relay_id=relay_id, key=key),
            "public_key": public_to_text(key.public_key()),
        }
        stream = await self.dial()
        try:
            said = {name: value(stream) if callable(value) else value for name, value in (body | changed).items()}
            return await post_json(stream, "gw.example", ENROL_PATH, said)
        finally:
            await stream.aclose()

    @asynccontextmanager
    async def websocket(self, prove: Prove | None = None) -> AsyncIterator[Any]:
        stream = await self.dial()
        headers = {"Authorization": f"Bearer {(prove or self.assertion())(stream)}"}
        try:
            async with trio.open_nursery() as nursery:
                yield await open_websocket(nursery, stream, "gw.example", CONTROL_PATH, headers)
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(stream)

    @asynccontextmanager
    async def control(self, instance: str = "i1") -> AsyncIterator[tuple[Channel, Message]]:
        """A channel after its hello, and what the gateway answered."""
        async with self.websocket() as ws:
            channel = Channel(ws)
            await ws.send_message(encode(hello(instance)))
            with trio.fail_after(20):
                answered = await channel.receive()
            yield channel, answered

    @asynccontextmanager
    async def tickets(self, instance: str = "i1") -> AsyncIterator[Any]:
        """A function that gets a ticket over a control link which stays up meanwhile."""
        async with self.websocket() as ws:
            channel = Channel(ws)
            await ws.send_message(encode(hello(instance)))
            await channel.receive()

            async def get(session: SessionId | None = None, sessions: tuple[SessionId, ...] | None = None) -> str:
                await ws.send_message(encode(TicketRequest(request=7, session=session, sessions=sessions)))
                with trio.fail_after(20):
                    while not isinstance(message := await channel.receive(), Ticket):
                        pass
                assert message.request == 7
                return message.ticket

            yield get

    async def data_link(self, ticket: str, **fields: Any) -> tuple[TlsStream, wire.Welcome | wire.Denied]:
        stream = await self.dial("fx-data/1")
        await stream.send_all(wire.encode_hello(wire.Hello(ticket, **fields)))
        return stream, await reply(stream)


def hello(instance: str = "i1", **changed: Any) -> Hello:
    return Hello(**({"version": "0.1.0", "instance": InstanceId(instance), "services": SSH, "caps": ("resume",)} | changed))


async def reply(stream: TlsStream) -> wire.Welcome | wire.Denied:
    with trio.fail_after(20):
        kind, length, _ = wire.parse_header(await exactly(stream, wire.HEADER_BYTES))
        return wire.decode_reply(kind, await exactly(stream, length))


async def exactly(stream: TlsStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, "closed early"
        data += more
    return data


@asynccontextmanager
async def running(path: Path, limits: PortLimits = LIMITS, config: ControlConfig | None = None) -> AsyncIterator[Rig]:
    """A port that is up; on the way out it must still be."""
    authority = new_authority("test")
    cert_pem, key_pem = issue_server_certificate(authority, ["127.0.0.1"])
    (path / "server.pem").write_text(cert_pem)
    write_secret(path / "server.key", key_pem)
    identities, registry, token = Identities(path / "relays.json"), FakeRegistry(), new_enrolment_token()
    identities.add_token(token, int(time.time()) + 3600)
    context = server_context(path / "server.pem", path / "server.key", ["fx-data/1", "http/1.1"])
    port = TunnelPort(context, GATEWAY, identities, registry, limits, config or ControlConfig(hello_timeout_s=60.0))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
    address = listeners[0].socket.getsockname()
    async with trio.open_nursery() as nursery:
        rig = Rig(port, identities, registry, path, address, authority.cert_pem, token)

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            with rig.stop:
                await port.run(listeners, task_status=task_status)

        await nursery.start(serve)
        yield rig
        registry.boom.clear()
        if not rig.stop.cancel_called:
            with trio.fail_after(20):
                await (await rig.dial()).aclose()
        nursery.cancel_scope.cancel()
    for session in registry.sessions.values():
        for link, _ in session.links:
            link.close()


def warnings_of(caplog: Any) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


async def refused(rig: Rig, prove: Prove | None = None) -> PeerRefused:
    stream = await rig.dial()
    headers = {"Authorization": f"Bearer {(prove or rig.assertion())(stream)}"}
    async with trio.open_nursery() as nursery:
        with pytest.raises(PeerRefused) as caught:
            await open_websocket(nursery, stream, "gw.example", CONTROL_PATH, headers)
    await stream.aclose()
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def raw_answer(rig: Rig, data: bytes) -> bytes:
    stream = await rig.dial()
    answered = b""
    with trio.fail_after(20):
        await stream.send_all(data)
        try:
            while more := await stream.receive_some():
                answered += more
        except trio.BrokenResourceError:
            answered += b"<broken>"
    await trio.aclose_forcefully(stream)
    return answered


async def ended(stream: TlsStream) -> None:
    """Until the gateway has closed the connection."""
    with trio.fail_after(20):
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
    await trio.aclose_forcefully(stream)
