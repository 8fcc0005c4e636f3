"""Port: a session's bounds and statistics, its owner, and what carries streams or takes turns on it."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from fxtunnel.codes import Code
from fxtunnel.model import SessionId
from fxtunnel.protocol.mux import Mux, MuxStatistics
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    from fxtunnel.engine.session import Session


class State(Enum):
    """Where a session stands."""

    HELD = "held"
    UP = "up"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Bounds of one session. Times in seconds, sizes in bytes."""

    max_streams: int = 16_384
    max_window_bytes: int = 16_777_216
    ring_bytes: int = 1_048_576
    max_ring_bytes: int = 16_777_216
    resume: bool = True
    hold_s: float = 30.0
    heartbeat_s: float = 3.0
    dead_after_s: float = 10.0
    yield_s: float = 0.0
    """How much longer than the peer this end waits before it sends PINGs on an idle link, so that only the peer does."""


class SessionOwner(Protocol):
    """Who hears of a session's fate. Called from the reactor: no waiting."""

    def on_link_down(self, session: "Session", reason: str) -> None:
        """The link is lost and the session is held; a relay dials again."""

    def on_closed(self, session: "Session", code: Code, text: str) -> None:
        """The session is over; its streams have been reset."""


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """A snapshot for status pages and metrics."""

    id: SessionId
    state: State
    resumed: int
    mux: MuxStatistics

    @property
    def is_up(self) -> bool:
        """Whether a link is attached."""
        return self.state is State.UP


class StreamSender(Protocol):
    """Something that has bytes for a session: a socket, or a task."""

    turn_bytes: int
    """What it writes in a turn, lately (`send_scheduler.lately`); 0 before the first."""

    def read_turn(self, limit_bytes: int) -> int:
        """Write at most `limit_bytes` into one DATA frame, now. Returns how many there were."""

    def on_crash(self) -> None:
        """See `Endpoint`."""


class Carrier(Protocol):
    """What carries a stream: a `Session`."""

    mux: Mux

    @property
    def is_up(self) -> bool:
        """Whether what is written is sent now; otherwise it is kept."""

    def has_told_of(self, stream: Stream) -> bool:
        """Whether the peer may have heard of a stream opened here."""

    def want_turn(self, sender: StreamSender) -> None:
        """There are bytes to send; `read_turn` is called when it is this sender's turn. Ask once."""

    def wake(self) -> None:
        """There is something to send: it leaves at the end of this turn."""

    def cancel_turn(self, sender: StreamSender) -> None:
        """The turn that was asked for is not wanted any more."""

    def has_room(self, limit_bytes: int) -> int:
        """How many of `limit_bytes` may be written at once, without a turn: nobody waits and the link takes them; else 0."""
