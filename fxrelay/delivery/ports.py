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

    `user` is whom a reserved node would belong to; empty if that is not known. `since` is monotonic seconds. `is_proven`: somebody we know
    says that it is this user, of these `groups`; otherwise `user` is just where the stream comes from. `action` is what it is wanted
    for (`user/login`, `session/start`) where that differs from what the pool's streams count as. `data` came with the request.
    `came_back`: a node that it was redirected to has not taken it.
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
    """A place on a node, counted from now on. `release` or `hand_over` exactly once, whatever happens; `connected` once at most before."""

    def connected(self) -> None:
        """The service was reached: the node will count the session itself in an update that it measures later than now."""

    def release(self) -> None:
        """The stream came to nothing, or has ended."""

    def hand_over(self) -> None:
        """Another relay carries the stream from here on: the place counts until the node counts it, or by itself expires."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The node is the user's now, as long as the seat is kept."""


class Then(Enum):
    """What to do for a stream that did not get the node."""

    GIVE_UP = "give-up"
    """No other node would take it either."""
    ELSEWHERE = "elsewhere"
    AGAIN = "again"
    """Somebody was quicker. The chooser knows, and may come back to this node."""


@dataclass(frozen=True, slots=True)
class NotTaken:
    """It is not. `text` goes to the gateway's log."""

    text: str
    then: Then


class Seat(Protocol):
    """A node that has to be its user's alone before a stream may go there. `release` when the stream ends, or comes to nothing; once."""

    async def take(self) -> Taken | NotTaken:
        """Make it the user's: steps 2 to 5 of a reservation (docs/RESERVATIONS.md). Safe to cancel. Raises nothing."""

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` when the node is the user's no more, at once if that is so already. It must not wait, nor raise."""

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
    """Nobody can take it. `text` goes to the gateway's log; it names no user and no other server. `name` and `message` are the chain's
    words for a user, if there are any. `position` is the place in a line at which waiting came to nothing; 0: nobody waited.
    """

    code: Code
    text: str
    name: str = ""
    message: str = ""
    position: int = 0


class Asking(Protocol):
    """A node that was asked for and is not told yet."""

    def cancel(self) -> None:
        """The stream needs none any more. May be repeated, also after it was told."""


class Chooser(Protocol):
    """Decides. Safe to cancel: a claim that was not handed over is released by the chooser. May wait until a node is free."""

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        """A node for the stream, none of `excluded`: which could not be reached before. Raises nothing."""

    def choose_nowait(self, wanted: Wanted) -> Node | None:
        """A node without a seat, if it can be told without waiting; None: ask `choose`. From the reactor. Raises nothing."""

    def choose_soon(self, wanted: Wanted, then: Callable[[Node | NoNode | None], None]) -> Asking | None:
        """As `choose_nowait`, where it takes a moment: `then` is called later, in the reactor's thread, with a node, why there is none, or
        None: ask `choose`. If that is clear from the beginning, None is returned. Raises nothing.
        """


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
        """Look at what the stream shows, before a node is chosen. Uses nothing up."""

    async def use(self, node: RelayId | None) -> NotAdmitted | None:
        """Before anything is connected to at `node` (None: this one): may the user have it, and was his ticket not used before? May be
        repeated, also for other nodes. Raises nothing. Safe to cancel; a ticket that was being used then counts as used, and `give_back`
        does nothing for it: it might undo somebody else's use.
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
