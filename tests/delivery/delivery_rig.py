"""Relays with a pool: a chooser that says what the test wants, claims that are counted, and one service port on several addresses."""

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio
from peers import Serve, receive_all
from plane import SERVICE, Plane, RelaySide

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.placing import ALL_PATHS, Placer
from fxrelay.delivery.ports import Asking, Node, NoNode, Wanted
from fxrelay.delivery.services import PoolService, resolve
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import Reactor
from fxtunnel.kit.proxy_header import ProxyVersion
from fxtunnel.kit.settings import Address
from fxtunnel.model import GatewayId, RelayId

GATEWAY = GatewayId("gw-test")
NOBODY = "127.0.0.99"
"""Where no service listens."""


@dataclass
class CountedClaim:
    """What a node was told."""

    server_id: str
    connected_at: list[int] = field(default_factory=list)
    released: int = 0
    handed_over: int = 0

    def connected(self) -> None:
        assert not self.released
        self.connected_at.append(1)

    def release(self) -> None:
        self.released += 1

    def hand_over(self) -> None:
        self.handed_over += 1
        self.released += 1


@dataclass(frozen=True)
class Spec:
    """A node as the chooser describes it."""

    name: str
    is_local: bool = False
    address: str = ""
    can_redirect: bool = False


class ScriptedChooser:
    """Answers with the first node that is not excluded; at once where it `is_instant`, from the reactor where it `is_soon`."""

    is_instant = False
    is_soon = False

    def __init__(self, *nodes: Spec) -> None:
        self.reactor: Reactor | None = None
        self.nodes = nodes
        self.asked: list[tuple[Wanted, frozenset[RelayId]]] = []
        self.claims: list[CountedClaim] = []
        self.cancelled = 0
        self.hangs = False
        self.fails = False
        self.refusal = NoNode(Code.CONNECT_FAILED, "NoServerSelected")
        self.on_choice: Callable[[], None] = lambda: None

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        self.asked.append((wanted, excluded))
        try:
            if self.hangs:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if self.fails:
            raise ValueError("a bug of the chooser's")
        return self._first(excluded)

    def choose_nowait(self, wanted: Wanted) -> Node | None:
        if not self.is_instant or self.hangs or self.fails:
            return None
        answer = self._first(frozenset())
        if isinstance(answer, NoNode):
            return None
        self.asked.append((wanted, frozenset()))
        return answer

    def choose_soon(self, wanted: Wanted, then: Callable[[Node | NoNode | None], None]) -> Asking | None:
        if not self.is_soon or self.fails or self.reactor is None:
            return None
        self.asked.append((wanted, frozenset()))
        asking = Soon(self, then)
        if not self.hangs:
            self.reactor.call_soon(asking.tell)
        return asking

    def _first(self, excluded: frozenset[RelayId]) -> Node | NoNode:
        for spec in self.nodes:
            if RelayId(spec.name) not in excluded:
                claim = CountedClaim(spec.name)
                self.claims.append(claim)
                self.on_choice()
                return Node(RelayId(spec.name), spec.is_local, spec.address, spec.can_redirect, claim)
        return self.refusal

    async def settled(self) -> None:
        """Wait until every claim has been given back; each exactly once."""
        with trio.fail_after(10):
            while not all(claim.released for claim in self.claims):
                await trio.sleep(0.01)
        assert [claim.released for claim in self.claims] == [1] * len(self.claims)


class Soon:
    """Implements `Asking`."""

    def __init__(self, chooser: ScriptedChooser, then: Callable[[Node | NoNode | None], None]) -> None:
        self._chooser = chooser
        self._then: Callable[[Node | NoNode | None], None] | None = then

    def tell(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(self._chooser._first(frozenset()))

    def cancel(self) -> None:
        if self._then is not None:
            self._then = None
            self._chooser.cancelled += 1


async def add_pool_relay(
    plane: Plane,
    name: str,
    chooser: ScriptedChooser,
    port: int,
    *,
    host: str = NOBODY,
    paths: tuple[PathKind, ...] = ALL_PATHS,
    limits: DeliveryLimits | None = None,
    proxy_protocol: ProxyVersion | None = None,
    wait_s: float = 0.0,
) -> RelaySide:
    """A relay that serves SERVICE as a pool at `port`; `host` is where this node itself has it."""
    relay = await plane.add_relay(name=name, limits=limits)
    pool = PoolService(SERVICE, host, port, resolve(Address(host, port)), proxy_protocol=proxy_protocol, wait_s=wait_s)
    relay.table.replace([pool])
    chooser.reactor = relay.desk.reactor
    relay.desk.placer = placer = Placer(chooser, paths)
    relay.session.mux._on_open = lambda stream, opening: relay.desk.on_open(relay.session, stream, opening, GATEWAY)
    await plane.nursery.start(placer.run)
    return relay


def listen_everywhere(*hosts: str) -> dict[str, socket.socket]:
    """Listeners at these addresses, all at the same port."""
    while True:
        listeners: dict[str, socket.socket] = {}
        port = 0
        try:
            for host in hosts:
                listeners[host] = socket.create_server((host, port))
                port = listeners[host].getsockname()[1]
        except OSError:
            for listener in listeners.values():
                listener.close()
        else:
            return listeners


def serve_on(plane: Plane, listener: socket.socket, handler: Serve) -> None:
    """Serve until the test ends."""

    async def one(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await handler(stream)
        await trio.aclose_forcefully(stream)

    listener.setblocking(False)
    wrapped = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    plane.nursery.start_soon(trio.serve_listeners, one, [wrapped])


@dataclass
class Nodes:
    """Services of one pool, and what each of them got."""

    port: int
    got: dict[str, list[bytes]]


def serve_nodes(plane: Plane, *hosts: str) -> Nodes:
    """A service at each address; it answers with its address to everything that it got up to the end of file."""
    listeners = listen_everywhere(*hosts)
    nodes = Nodes(next(iter(listeners.values())).getsockname()[1], {host: [] for host in hosts})

    def answering(host: str) -> Serve:
        async def serve(stream: trio.SocketStream) -> None:
            nodes.got[host].append(await receive_all(stream))
            await stream.send_all(host.encode())

        return serve

    for host, listener in listeners.items():
        serve_on(plane, listener, answering(host))
    return nodes
