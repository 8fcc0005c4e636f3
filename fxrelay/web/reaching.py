"""Task: from a request to a connection with the service that is to answer it: which node, by which way, and what is tried next."""

import random
from dataclasses import dataclass, replace
from typing import Final, Self

import trio

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.delivery import DeliveryDesk
from fxrelay.delivery.ports import Claim, Node, NoNode, Wanted
from fxrelay.delivery.services import AnyService, Endpoint, PoolService
from fxrelay.web.link import ServiceLink, open_link
from fxrelay.web.ports import NodeChooser
from fxtunnel.codes import Code
from fxtunnel.errors import NodeError
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.proxy_header import encode_proxy_header
from fxtunnel.model import RelayId
from fxtunnel.protocol.opening import Opening

MAX_NODES: Final = 4
"""Nodes tried for one request."""
MAX_IDLE_LINKS: Final = 4
"""Idle connections kept for one client connection."""
RETRY_AFTER_S: Final = (2.0, 8.0)
"""Clients that were turned away together should not come back together."""


class Held:
    """The claim of the request that is being answered: released by `with`."""

    def __init__(self) -> None:
        self._claim: Claim | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.take(None)

    def take(self, claim: Claim | None) -> None:
        """Hold this one from now on; the one before is released."""
        before, self._claim = self._claim, claim
        if before is not None:
            before.release()

    def connected(self) -> None:
        """The node was reached."""
        if self._claim is not None:
            self._claim.connected()


@dataclass(frozen=True, slots=True)
class NodePreference:
    """Which node a request should go to. `must`: named by its path or by the stream, nobody else will do. `may`: where it was before.

    `is_repeatable`: the request may be sent again, should an idle connection turn out to be dead.
    """

    must: RelayId | None = None
    may: RelayId | None = None
    is_repeatable: bool = False


class Reacher:
    """Opens the links of one client connection, and keeps those that are idle."""

    def __init__(self, desk: DeliveryDesk, chooser: NodeChooser, service: AnyService, opening: Opening, wanted: Wanted) -> None:
        self._desk = desk
        self._chooser = chooser
        self._service = service
        self._wanted = wanted
        self._idle: dict[RelayId | None, ServiceLink] = {}
        self._greeting = encode_proxy_header(service.proxy_protocol, opening.client, opening.door) if service.proxy_protocol else b""

    def for_user(self, user: str, groups: tuple[str, ...]) -> None:
        """Whose requests come from here on, as a ticket says."""
        self._wanted = replace(self._wanted, user=user, groups=groups, is_proven=bool(user))

    async def reach(self, wish: NodePreference, held: Held) -> tuple[ServiceLink, bool]:
        """A link to the service, idle or new; and whether its node was chosen just now. `held` gets the claim.

        Raises:
            Refused: there is no node, or no way to it.
        """
        is_pool = isinstance(self._service, PoolService)
        if not is_pool or wish.must is not None or wish.may is not None:
            idle = self._take_idle((wish.must or wish.may) if is_pool else None, wish)
            if idle is not None:
                return idle, False
        with trio.move_on_after(self._desk.limits.place_timeout_s):
            if not is_pool:
                return await self._open_target(), False
            if wish.must is not None:
                link = await self._named(wish.must, held)
                if isinstance(link, ServiceLink):
                    return link, False
                raise _no_such_node() if link.code is Code.NO_SERVICE else _unreachable(link.text)
            if wish.may is not None:
                link = await self._named(wish.may, held)
                if isinstance(link, ServiceLink):
                    return link, False
            return await self._chosen(wish, held), True
        raise Refused(504, "Timeout", "No node could be reached in time.", detail="placing timed out")

    def take_idle(self, node: RelayId | None) -> ServiceLink | None:
        """The idle link to that node, if there is one: the caller's. For a request that may be repeated."""
        return self._idle.pop(node, None)

    def keep(self, link: ServiceLink) -> None:
        """The link is idle: the next request to its node may have it."""
        before = self._idle.pop(link.node, None)
        if before is not None:
            before.close()
        while len(self._idle) >= MAX_IDLE_LINKS:
            self._idle.pop(next(iter(self._idle))).close()
        self._idle[link.node] = link
        link.on_readable = self._look
        link.watch(self._desk.reactor)

    def _look(self) -> None:
        """From the reactor: a service has closed an idle link, or says something unasked there."""
        for node, link in list(self._idle.items()):
            if link.is_stale():
                del self._idle[node]
                link.close()

    def close(self) -> None:
        """Close what is idle."""
        for link in self._idle.values():
            link.close()
        self._idle.clear()

    def _take_idle(self, node: RelayId | None, wish: NodePreference) -> ServiceLink | None:
        link = self._idle.pop(node, None)
        if link is not None:
            link.on_readable = None
        if link is not None and not (wish.is_repeatable and not link.scanner.rest) and link.is_stale():
            link.close()
            return None
        return link

    async def _open_target(self) -> ServiceLink:
        service = self._service
        if not service.endpoints:
            raise _unreachable("the service's host name does not resolve")
        try:
            return await self._open(service.endpoints, None, "local")
        except NodeError as exc:
            raise _unreachable(str(exc)) from exc

    async def _named(self, server_id: RelayId, held: Held) -> ServiceLink | NoNode:
        node = await self._chooser.named(self._wanted, server_id)
        if isinstance(node, NoNode):
            return node
        held.take(node.claim)
        return await self.to_node(node, held)

    async def _chosen(self, wish: NodePreference, held: Held) -> ServiceLink:
        excluded = frozenset() if wish.may is None else frozenset({wish.may})
        problem: NoNode | None = None
        for _ in range(MAX_NODES):
            node = await self._chooser.choose(self._wanted, excluded)
            if isinstance(node, NoNode):
                raise _unreachable(problem.text) if problem is not None else _nobody(node)
            held.take(node.claim)
            if node.seat is not None:
                raise _nobody(NoNode(Code.CONNECT_FAILED, f"{node.server_id} is for one user only, whom a request over HTTP does not tell"))
            link = self._take_idle(node.server_id, wish) or await self.to_node(node, held)
            if isinstance(link, ServiceLink):
                return link
            held.take(None)
            problem = link
            excluded |= {node.server_id}
        raise _unreachable(problem.text if problem is not None else "no node")

    async def to_node(self, node: Node, held: Held) -> ServiceLink | NoNode:
        """A new link to this node, by the first way that works, or why there is none. `held` has the node's claim."""
        problem = "no way to the node"
        for way, endpoints in self._ways(node):
            try:
                link = await self._open(endpoints, node.server_id, way)
            except NodeError as exc:
                problem = str(exc)
                continue
            held.connected()
            self._desk.count_path(self._service, way)
            return link
        return NoNode(Code.CONNECT_FAILED, f"{node.server_id}: {problem}")

    def _ways(self, node: Node) -> list[tuple[PathKind, tuple[Endpoint, ...]]]:
        """A request cannot be redirected: the stream carries others behind it, for other nodes."""
        service, placer = self._service, self._desk.placer
        found: list[tuple[PathKind, tuple[Endpoint, ...]]] = []
        for path in placer.paths if placer is not None else ("local", "direct"):
            if path == "local" and node.is_local and service.endpoints:
                found.append(("local", service.endpoints))
            elif path == "direct" and node.address and isinstance(service, PoolService):
                endpoint = service.endpoint_at(node.address)
                if endpoint is not None:
                    found.append(("direct", (endpoint,)))
        return found

    async def _open(self, endpoints: tuple[Endpoint, ...], node: RelayId | None, way: PathKind) -> ServiceLink:
        with trio.move_on_after(self._desk.limits.connect_timeout_s):
            return await open_link(self._desk, endpoints, self._greeting, node, way)
        raise NodeError("no answer in time")


def _nobody(answer: NoNode) -> Refused:
    name, message = answer.name or "NoNode", answer.message or "No node can take this request now."
    return Refused(503, name, message, retry_after_s=random.uniform(*RETRY_AFTER_S), detail=answer.text)  # noqa: S311 - only spreads load


def _no_such_node() -> Refused:
    return Refused(404, "NoSuchNode", "This service has no node of that name.")


def _unreachable(why: str) -> Refused:
    return Refused(502, "Unreachable", "The service cannot be reached.", detail=why)
