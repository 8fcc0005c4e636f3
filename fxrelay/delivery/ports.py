"""Port: who chooses the node for a stream of a pool, and what delivery needs to know about the node chosen."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fxtunnel.codes import Code
from fxtunnel.model import GatewayId, RelayId, ServiceName
from fxtunnel.protocol.mux import Stream
from fxtunnel.protocol.opening import Opening

if TYPE_CHECKING:
    from fxrelay.delivery.services import AnyService
    from fxtunnel.engine.session import Session


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream that needs a node. `client` is the client's ip:port as the gateway saw it, or empty; `node` the only node that will do."""

    service: ServiceName
    client: str
    gateway_id: GatewayId
    trace_id: str
    node: RelayId | None = None


class Claim(Protocol):
    """A place on a node, counted from now on. `release` or `hand_over` exactly once, whatever happens; `connected` once at most before."""

    def connected(self) -> None:
        """The service was reached: the node will count the session itself in an update that it measures later than now."""

    def release(self) -> None:
        """The stream came to nothing, or has ended."""

    def hand_over(self) -> None:
        """Another relay carries the stream from here on: the place counts until the node counts it, or by itself expires."""


@dataclass(frozen=True, slots=True)
class Node:
    """The node chosen. `address` is an IP address for a direct connection, empty where that is not allowed (this relay's configuration
    decides, not the store). `can_redirect`: it has a tunnel of its own to the stream's gateway.
    """

    server_id: RelayId
    is_local: bool
    address: str
    can_redirect: bool
    claim: Claim


@dataclass(frozen=True, slots=True)
class NoNode:
    """Nobody can take it. `text` goes to the gateway's log; it names no user and no other server. `name` and `message` are the chain's
    words for a user, if there are any.
    """

    code: Code
    text: str
    name: str = ""
    message: str = ""


class Chooser(Protocol):
    """Decides. Safe to cancel: a claim that was not handed over is released by the chooser."""

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        """A node for the stream, none of `excluded`: which could not be reached before. Raises nothing."""


class StreamTaker(Protocol):
    """Who serves the streams of services that are looked into. Called from the reactor: no waiting."""

    @property
    def streams(self) -> int:
        """Streams in hand, without those that were given back to the pump."""

    def services_in_use(self) -> Iterable[ServiceName]:
        """The service of each of them."""

    def take(self, session: "Session", stream: Stream, service: "AnyService", opening: Opening, gateway_id: GatewayId) -> None:
        """Serve the stream: it is accepted or refused at once."""

    def abort_all(self) -> None:
        """End every stream, with RST."""
