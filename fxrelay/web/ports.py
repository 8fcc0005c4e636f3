"""Port: what an HTTP service is made of, what bounds it, and who is asked about its requests."""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fxrelay.delivery.ports import Chooser, Node, NoNode, Wanted
from fxrelay.web.affinity import Affinity
from fxrelay.web.heads import Field
from fxrelay.web.passes import Passes
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId, ServiceName


@dataclass(frozen=True, slots=True)
class WebLimits:
    """Bounds of HTTP connections. Times in seconds."""

    head_timeout_s: float = 10.0
    """For a request's head once it has begun, the first one from the connection's beginning; and for a TLS handshake."""
    keep_alive_s: float = 75.0
    stall_timeout_s: float = 60.0
    """For the next byte of a request's body, and for a client to take more of a response."""
    idle_timeout_s: float = 86_400.0
    """For the next byte of a response's body."""


@dataclass(frozen=True, slots=True)
class WebRules:
    """What the configuration says about one HTTP service. No `tls`: the stream carries HTTP as it is. No `affinity`: each request is placed
    anew. `max_body_bytes` 0: bodies have no bound.
    """

    name: ServiceName
    hosts: tuple[str, ...] = ()
    trusts_forwarded: bool = False
    node_paths: bool = False
    affinity: Affinity | None = None
    response_timeout_s: float = 60.0
    max_body_bytes: int = 0
    tls: ssl.SSLContext | None = None
    is_guarded: bool = False
    """Whether every request has to be admitted first."""
    passes: Passes | None = None
    """What tickets are changed for. None: each request needs one."""
    takes_bearers: bool = False
    """Whether a token in Authorization is a ticket."""


class NodeChooser(Chooser, Protocol):
    """Chooses nodes, and finds those that a request names."""

    async def named(self, wanted: Wanted, server_id: RelayId) -> Node | NoNode:
        """The node with this id, if it belongs to the service's pool, also when it takes no new sessions. Its claim counts nothing: what is
        named was placed before. Raises nothing.
        """


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """A request as a gate sees it. `path` is in origin form with its query; `node` is the one that it names, or was at before."""

    service: ServiceName
    trace: str
    client: str
    method: bytes
    path: bytes
    host: str
    fields: Sequence[Field]
    node: RelayId | None
    is_named: bool = False
    """Whether path or stream name `node`: no other will do."""
    inner_path: bytes = b""
    """The path without the node that it names."""
    is_secure: bool = False
    """Whether the client's side is TLS."""
    user: str = ""
    """The ticket's user; empty where there is none."""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A response that was received to its end. `status` and `fields` are its head's, `body` is its payload."""

    status: int
    reason: bytes
    fields: tuple[Field, ...]
    body: bytes


class Sender(Protocol):
    """Sends one request, whole, to one node after the other."""

    async def send(self, node: Node, most_bytes: int) -> WholeAnswer:
        """The node's answer, of which at most `most_bytes` are taken. Releases the node's claim when it has come. Safe to cancel.

        Raises:
            NodeError: the node cannot be reached; it has got nothing of the request.
            Refused: it gave no valid answer, or none in time.
        """


@dataclass(frozen=True, slots=True)
class Reply:
    """What the client gets: an answer, and fields to add to it. `undone` is called if the client could not be given it."""

    answer: WholeAnswer
    extra: tuple[bytes, ...] = ()
    undone: Callable[[], None] = lambda: None


class Unable(Refused):
    """What this relay cannot tell, and another one may. No service has been asked."""


class HeldRequest(Protocol):
    """A request that is not passed on as it comes, but held until it is decided: one of a login."""

    max_body_bytes: int

    async def run(self, body: bytes, sender: Sender) -> Reply:
        """The answer to it. Safe to cancel.

        Raises:
            Refused: there is none but this.
        """


@dataclass(frozen=True, slots=True)
class Allow:
    """Go on. With `node`: to that one, whatever path and affinity say. Never to those of `closed`: affinity to one of them is forgotten,
    a path that names one is refused. `held`: it is held, and this decides about it. `watch` gets what is to be called when what the request
    leads to has to end.
    """

    node: RelayId | None = None
    closed: frozenset[RelayId] = frozenset()
    held: HeldRequest | None = None
    watch: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    """Returns what takes the watcher away again."""
    user: str = ""
    """Whose login the request shows, where connections of users are counted; empty for what must not be refused."""


class RequestGate(Protocol):
    """Who is asked about every request of HTTP services: before it is sent on, and when its response's head is there. Either may raise
    `Refused`, which is then the answer. Safe to cancel.
    """

    def concerns(self, service: ServiceName) -> bool:
        """Whether it asks anything of this service's requests. Others are not shown to it."""

    async def admit(self, request: RequestFacts) -> Allow:
        """Before anything is sent to a node."""

    async def answered(self, request: RequestFacts, node: RelayId | None, status: int, fields: Sequence[Field]) -> Sequence[bytes]:
        """The final response's head has arrived and nothing of it is sent yet: the fields to add to it. `node` None: the service has one
        address.
        """
