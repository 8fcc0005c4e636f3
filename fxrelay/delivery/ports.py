"""Port: who chooses the node for a stream of a pool, and what delivery needs to know about the node chosen."""

from dataclasses import dataclass
from typing import Protocol

from fxtunnel.codes import Code
from fxtunnel.model import GatewayId, RelayId, ServiceName


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
    """Nobody can take it. `text` goes to the gateway's log; it names no user and no other server."""

    code: Code
    text: str


class Chooser(Protocol):
    """Decides. Safe to cancel: a claim that was not handed over is released by the chooser."""

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        """A node for the stream, none of `excluded`: which could not be reached before. Raises nothing."""
