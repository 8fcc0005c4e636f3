"""A whole data plane in one thread: door, registry, TLS links over real loopback TCP that can be cut, relays, services."""

import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import trio
from peers import LOOPBACK, Serve, reset

from fxgateway.doors.door import Door, DoorConfig
from fxgateway.routing.admission import Admission, AdmissionLimits
from fxgateway.tunnels.registry import Registry, RegistryLimits
from fxrelay.delivery.delivery import DeliveryDesk, DeliveryLimits
from fxrelay.delivery.services import Endpoint, Service, ServiceTable
from fxtunnel.codes import Code
from fxtunnel.engine import session
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.session import Session
from fxtunnel.kit.link_tls import LinkContext, LinkSocket
from fxtunnel.kit.settings import Address
from fxtunnel.kit.tls import handshake_client, handshake_server
from fxtunnel.model import InstanceId, Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol.credit import WindowBudget

SERVICE = ServiceName("s")
OPEN_LIMITS = AdmissionLimits(exempt=(ipaddress.ip_network("127.0.0.0/8"),))
QUICK = SessionConfig(hold_s=5.0, heartbeat_s=0.1, dead_after_s=0.4)


@dataclass(frozen=True)
class Contexts:
    """TLS for the two ends of a link."""

    server: LinkContext
    client: LinkContext


class Wire:
    """What lies between the two ends of a link: forwards bytes, until told otherwise."""

    def __init__(self, left: trio.SocketStream, right: trio.SocketStream) -> None:
        self.ends = (left, right)
        self.delay_s = 0.0
        self.forwarded = 0
        self.cut_at: int | None = None
        self._open = trio.Event()
        self._open.set()

    def cut(self) -> None:
        """RST to both ends."""
        for end in self.ends:
            with suppress(OSError):
                reset(end)

    def silence(self) -> None:
        """Forward nothing and read nothing any more; the connections stay."""
        self._open = trio.Event()

    def speak(self) -> None:
        """Forward again."""
        self._open.set()

    async def run(self) -> None:
        left, right = self.ends
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, left, right)
                nursery.start_soon(self._forward, right, left)
        finally:
            self.cut()

    async def _forward(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            while True:
                await self._open.wait()
                data = await source.receive_some(65_536)
                await self._open.wait()
                if self.delay_s:
                    await trio.sleep(self.delay_s)
                if self.cut_at is not None and self.forwarded + len(data) >= self.cut_at:
                    await sink.send_all(data[: max(0, self.cut_at - self.forwarded)])
                    break
                self.forwarded += len(data)
                if not data:
                    await sink.send_eof()
                    return
                await sink.send_all(data)
        self.cut()


@dataclass
class ControlLink:
    """A control link as the registry sees it."""

    remote_address: str = "192.0.2.1:1"
    connected_at: float = 0.0
    closed: list[Code] = field(default_factory=list)
    drained: list[float] = field(default_factory=list)
    relieved: int = 0

    def drain(self, deadline_s: float) -> None:
        self.drained.append(deadline_s)

    def relieve(self) -> None:
        self.relieved += 1

    def close(self, code: Code, text: str, retry_after_s: float = 0) -> None:
        self.closed.append(code)


class RelaySide:
    """A relay: its services and its one session, which is dialled again when its link is lost."""

    def __init__(self, plane: "Plane", name: str, limits: DeliveryLimits, config: SessionConfig) -> None:
        self.plane = plane
        self.id = RelayId(name)
        self.instance = InstanceId(f"{name}-1")
        self.control = ControlLink()
        self.table = ServiceTable()
        self.desk = DeliveryDesk(plane.reactor, self.table, limits)
        self.budget = WindowBudget(64 << 20)
        self.session = Session(plane.reactor, SessionId(name), self, config, self.budget, self.desk.on_open)
        self.far: Session | None = None
        self.wire: Wire | None = None
        self.redials = True
        self.dialled = 0
        self.closed_with: tuple[Code, str] | None = None
        self._down = trio.Event()

    @property
    def far_session(self) -> Session:
        """The gateway's end of the session."""
        assert self.far is not None
        return self.far

    def serves(self, *ports_or_paths: int | str, name: ServiceName = SERVICE) -> None:
        """Serve `name` at these loopback ports or unix paths, in order."""
        endpoints = tuple(
            Endpoint(socket.AF_UNIX, at) if isinstance(at, str) else Endpoint(socket.AF_INET, (LOOPBACK, at)) for at in ports_or_paths
        )
        self.table.replace([*self.table.services(), Service(name, Address.parse("127.0.0.1:1"), endpoints)])

    def on_link_down(self, session: Session, reason: str) -> None:
        self._down.set()

    def on_closed(self, session: Session, code: Code, text: str) -> None:
        self.closed_with = (code, text)
        self._down.set()

    async def link_up(self) -> None:
        """Dial: as relay and gateway do it, hello included, without tickets."""
        if self.far is None:
            self.far = self.plane.registry.new_session(self.id, self.instance)
        assert self.far is not None
        near_link, far_link, self.wire = await self.plane.tls_pair()
        self._down = trio.Event()
        if State.CLOSED in (self.session.state, self.far.state):
            near_link.close()
            far_link.close()
            return
        self.session.detach("dialling")
        self.far.detach("the relay dials")
        near_received, far_received = self.session.received, self.far.received
        self.far.attach(far_link, near_received)
        self.session.attach(near_link, far_received)
        self.dialled += 1

    async def keep_up(self) -> None:
        """Dial again whenever the link is lost."""
        while True:
            await self._down.wait()
            if self.session.state is State.CLOSED or self.far is None or self.far.state is State.CLOSED:
                return
            if not self.redials:
                await trio.sleep(0.01)
                continue
            await self.link_up()


class Plane:
    """Everything. Made by `open_plane`."""

    def __init__(self, nursery: trio.Nursery, contexts: Contexts, config: SessionConfig) -> None:
        self.nursery = nursery
        self.contexts = contexts
        self.config = config
        self.reactor = Reactor()
        self.budget = WindowBudget(64 << 20)
        self.registry = Registry(self.reactor, config, self.budget, RegistryLimits())
        self.relays: list[RelaySide] = []
        self.doors: list[Door] = []

    async def tls_pair(self) -> tuple[LinkSocket, LinkSocket, Wire]:
        """A link's two ends, and what lies between them."""
        with socket.create_server((LOOPBACK, 0)) as inner, socket.create_server((LOOPBACK, 0)) as outer:
            near = socket.create_connection(outer.getsockname())
            far = socket.create_connection(inner.getsockname())
            left, right = outer.accept()[0], inner.accept()[0]
        for end in (left, right):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)  # what waits in between must soon be felt at the ends
        ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (left, right)]
        wire = Wire(*ends)
        self.nursery.start_soon(wire.run)
        links: dict[str, LinkSocket] = {}

        async def answer() -> None:
            links["far"] = await handshake_server(far, self.contexts.server)

        for sock in (near, far):
            sock.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            links["near"] = await handshake_client(near, self.contexts.client, "gateway.test")
        return links["near"], links["far"], wire

    async def add_relay(
        self,
        *ports_or_paths: int | str,
        name: str = "a",
        limits: DeliveryLimits | None = None,
        config: SessionConfig | None = None,
        linked: bool = True,
        run: int = 1,
    ) -> RelaySide:
        """A relay that serves SERVICE; each `run` of it is another instance."""
        relay = RelaySide(self, name, limits or DeliveryLimits(), config or self.config)
        relay.instance = InstanceId(f"{name}-{run}")
        self.relays.append(relay)
        relay.serves(*ports_or_paths)
        self.registry.enter(relay.id, relay.instance, (Offer(SERVICE),), relay.control)
        if linked:
            await relay.link_up()
            self.nursery.start_soon(relay.keep_up)
        return relay

    def add_door(self, limits: AdmissionLimits = OPEN_LIMITS, **changes: float | str) -> int:
        """A door to SERVICE; returns its port."""
        config = replace(DoorConfig("d", Address.parse("127.0.0.1:1"), SERVICE), **changes)
        door = Door(self.reactor, config, self.registry, Admission(limits))
        listener = socket.create_server((LOOPBACK, 0), backlog=512)
        listener.setblocking(False)
        door.open(listener)
        self.doors.append(door)
        port: int = listener.getsockname()[1]
        return port

    async def serve(self, handler: Serve) -> int:
        """A TCP service; returns its port. Its connections are closed when `handler` returns, unless it did so."""
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK, backlog=512)
        self.nursery.start_soon(self._serve_all, listener, handler)
        port: int = listener.socket.getsockname()[1]
        return port

    async def _serve_all(self, listener: trio.SocketListener, handler: Serve) -> None:
        async def one(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await handler(stream)
            await trio.aclose_forcefully(stream)

        await trio.serve_listeners(one, [listener])

    @property
    def is_quiet(self) -> bool:
        """Nothing open, nothing promised."""
        sessions = [relay.session for relay in self.relays] + [relay.far for relay in self.relays if relay.far is not None]
        budgets = [self.budget, *(relay.budget for relay in self.relays)]
        return (
            not any(door.clients or door.opening or door.admission.connections for door in self.doors)
            and not any(relay.desk.deliveries or relay.desk.connecting for relay in self.relays)
            and not any(session.mux.streams for session in sessions)
            and not any(budget.promised_bytes or budget.grown_bytes for budget in budgets)
        )

    async def quiet(self, within_s: float = 10.0) -> None:
        """Wait until every stream has ended and everything it held has been given back."""
        with trio.fail_after(within_s):
            while not self.is_quiet:
                await trio.sleep(0.01)

    def close(self) -> None:
        for door in self.doors:
            door.close()
            door.abort_all()
        self.registry.close_all(Code.SHUTDOWN, "the test ends", 0)
        for relay in self.relays:
            relay.session.close(Code.SHUTDOWN)


@asynccontextmanager
async def open_plane(contexts: Contexts, config: SessionConfig = QUICK) -> AsyncIterator[Plane]:
    """Afterwards every stream must have ended by itself: budgets, admission and streams are counted."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            plane = Plane(nursery, contexts, config)
            nursery.start_soon(plane.reactor.run_in_task)
            try:
                yield plane
                await plane.quiet()
            finally:
                plane.close()
                said = trio.Event()
                plane.reactor.call_later(session.GOODBYE_S + 0.02, said.set)  # behind the timers of the goodbyes, however late those are
                with trio.move_on_after(10, shield=True):
                    await said.wait()
                nursery.cancel_scope.cancel()
        plane.reactor.close()
