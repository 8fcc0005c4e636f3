"""Port: who chooses the node for a stream of a pool, and what delivery needs to know about the node chosen."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from fxtunnel.codes import Code
from fxtunnel.model import GatewayId, RelayId, ServiceName
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    from fxrelay.delivery.services import AnyService
    from fxtunnel.engine.session import Session


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream that needs a node. `client` is the client's ip:port as the gateway saw it, or empty; `node` the only node that will do.

    `user` is whom a reserved node would belong to; empty if unknown. `is_proven`: a trusted issuer vouches for `user` and `groups`; if not,
    `user` is only the address that the stream comes from. `since` is when it was opened, in monotonic seconds. `action` is what it is for
    (`user/login`, `session/start`), empty for what the pool's streams count as. `data` came with the request. `came_back`: a node that it
    was redirected to has not taken it.
    """

    service: ServiceName
    client: str
    gateway_id: GatewayId
    trace_id: str
    node: RelayId | None = None
    user: str = ""
    since: float = 0.0
    groups: tuple[str, ...] = ()
    is_proven: bool = False
    action: str = ""
    data: Mapping[str, Any] | None = None
    came_back: bool = False


class Claim(Protocol):
    """A place on a node, which counts at once. Call `release` or `hand_over` exactly once, and `connected` at most once before that."""

    def connected(self) -> None:
        """The service was reached: updates that the node measures from now on count the session themselves."""

    def release(self) -> None:
        """The stream came to nothing, or has ended."""

    def hand_over(self) -> None:
        """Another relay carries the stream from here on. The place counts until the node counts the session itself, or it expires."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The node is the user's now, as long as the seat is kept."""


class Then(Enum):
    """What to do for a stream that did not get the node."""

    GIVE_UP = "give-up"
    """No other node would take it either."""
    ELSEWHERE = "elsewhere"
    AGAIN = "again"
    """Another user was quicker. The chooser knows by now; ask it again, it may choose this node once more."""


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The node could not be reserved. `text` goes to the gateway's log."""

    text: str
    then: Then


class Seat(Protocol):
    """A node that must be reserved for its user before a stream may go there. Call `release` once, when the stream has ended or failed."""

    async def take(self) -> Taken | NotTaken:
        """Reserve the node: steps 2 to 5 of a reservation (docs/RESERVATIONS.md). Safe to cancel. Raises nothing."""

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` when the node no longer belongs to the user, at once if that is so already. It must neither block nor raise."""

    def release(self) -> None:
        """The stream has ended."""


@dataclass(frozen=True, slots=True)
class Node:
    """The node chosen. `address` is an IP address for a direct connection, empty where that is not allowed (this relay's configuration
    decides, not the store). `can_redirect`: it has a tunnel of its own to the stream's gateway. `seat` is to be taken before anything is
    connected to; a node that is redirected to takes its own.
    """

    server_id: RelayId
    is_local: bool
    address: str
    can_redirect: bool
    claim: Claim
    seat: Seat | None = None


@dataclass(frozen=True, slots=True)
class NoNode:
    """No node can take the stream. `text` goes to the gateway's log, and names no user and no other server. `name` and `message` are what
    the chain says to the user, if anything. `position` is the place in the queue at which it waited in vain; 0 if it did not wait.
    """

    code: Code
    text: str
    name: str = ""
    message: str = ""
    position: int = 0


class Asking(Protocol):
    """A question to the chooser that has not been answered yet."""

    def cancel(self) -> None:
        """The answer is not wanted any more. May be repeated, even after the answer."""


class Chooser(Protocol):
    """Decides. Safe to cancel: a claim that was not handed over is released by the chooser. May wait until a node is free."""

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        """A node for the stream, other than the `excluded` ones, which could not be reached. Raises nothing."""

    def choose_nowait(self, wanted: Wanted) -> Node | None:
        """A node without a seat, if it can be chosen without waiting; None: ask `choose`. For the reactor. Raises nothing."""

    def choose_soon(self, wanted: Wanted, then: Callable[[Node | NoNode | None], None]) -> Asking | None:
        """As `choose_nowait`, for choices that take a moment. `then` is called later, in the reactor's thread, with the node, why there
        is none, or with None: ask `choose`. Returns None, and does not call `then`, if that is clear from the beginning. Raises nothing.
        """


class StreamTaker(Protocol):
    """Serves the streams of services whose protocol this relay reads (HTTP). Called from the reactor: never blocks."""

    @property
    def streams(self) -> int:
        """Open streams, without those that were given back to the pump."""

    def services_in_use(self) -> Iterable[ServiceName]:
        """The service of each of them."""

    def take(self, session: "Session", stream: Stream, service: "AnyService", opening: Opening, gateway_id: GatewayId) -> None:
        """Serve the stream: it is accepted or refused at once."""

    def abort_all(self) -> None:
        """End every stream, with RST."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A stream that may be served. `user` is empty where nobody said who it is; `node` is the only one that it may go to."""

    user: str = ""
    groups: tuple[str, ...] = ()
    node: RelayId | None = None


@dataclass(frozen=True, slots=True)
class NotAdmitted:
    """A stream that is not served. `text` goes to the gateway, and names no user."""

    code: Code
    text: str


class Entry(Protocol):
    """One stream of a service that not everybody may have. `release` once, whatever happens."""

    def admit(self) -> Admitted | NotAdmitted:
        """Check what the stream shows, before a node is chosen. Does not use a ticket up."""

    async def use(self, node: RelayId | None) -> NotAdmitted | None:
        """Before connecting to anything at `node` (None: this one): may the user have it, and is the ticket unused? Uses the ticket up.

        May be repeated, for other nodes as well. Raises nothing. May be cancelled; a ticket that was just being used then counts as used,
        and `give_back` does nothing for it, since it might undo somebody else's use.
        """

    async def give_back(self) -> None:
        """The stream came to nothing, and may be tried at another relay. Does nothing if nothing was used."""

    def release(self) -> None:
        """The stream has ended."""


class Entries(Protocol):
    """Who is asked about the streams of guarded services."""

    def entry(self, service: ServiceName, opening: Opening, trace: str) -> Entry:
        """For one stream."""


class Seats(Protocol):
    """What streams need that were redirected to this node."""

    def seat_here(self, wanted: Wanted) -> Seat | None:
        """The seat of this node that the stream has to take first; None: it may come in as it is."""
