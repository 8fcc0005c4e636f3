"""Pump: one instance of a relay: its control link, its sessions, and how well it could take a stream."""

from typing import ClassVar, Final, Literal

from fxgateway.routing.failover import FailoverState
from fxgateway.routing.offers import Readiness
from fxgateway.tunnels.ports import ControlHandle
from fxtunnel.codes import Code
from fxtunnel.engine.session import Session
from fxtunnel.model import InstanceId, Offer, RelayId, SessionId
from fxtunnel.protocol.frames import WORN_STREAMS

NO_INSTANCE: Final = InstanceId("")
"""Of what stands for an instance that has gone to another process of this gateway, and does not serve there yet."""


class LiveRelay:
    """One instance of a relay, from its first control link until its last session has ended."""

    is_remote: ClassVar[Literal[False]] = False

    __slots__ = (
        "draining",
        "epoch",
        "first_step",
        "given_up",
        "hands_over",
        "has_yielded",
        "instance",
        "is_drained",
        "is_reluctant",
        "leave_by",
        "link",
        "offers",
        "predecessor",
        "relay_id",
        "sessions",
        "since",
    )

    def __init__(self, relay_id: RelayId, instance: InstanceId, epoch: int, now: float) -> None:
        self.relay_id = relay_id
        self.first_step = FailoverState.after_first_step(relay_id)
        """See `LocalCandidate`."""
        self.instance = instance
        self.epoch = epoch
        self.since = now
        self.offers: tuple[Offer, ...] = ()
        self.link: ControlHandle | None = None
        self.sessions: dict[SessionId, Session] = {}
        self.given_up: set[SessionId] = set()
        """Sessions held here that the relay no longer has: their hold time ran out there while this process, or the path, was stuck."""
        self.draining = False
        """It has said that it goes away."""
        self.hands_over = False
        """It said so to make way for a successor, and serves until that one does."""
        self.has_yielded = False
        """Its successor is at another process of this gateway, and does not serve yet."""
        self.is_drained = False
        """An administrator here wants nothing new to go there."""
        self.is_reluctant = False
        """It has said that it lacks something other relays may have, such as its store."""
        self.leave_by = 0.0
        """While it drains: when it is fenced off, on the reactor's clock."""
        self.predecessor: LiveRelay | None = None
        """The instance that makes way for this one, while it has streams."""

    @property
    def open_streams(self) -> int:
        """Streams on all its sessions."""
        return sum(len(session.mux.streams) for session in self.sessions.values())

    @property
    def is_up(self) -> bool:
        """Whether one of its data links is up."""
        return any(session.is_up for session in self.sessions.values())

    @property
    def readiness(self) -> Readiness:
        """See `Candidate`. Until its own first session is up, a predecessor stands in."""
        own, older = self._readiness, self.predecessor
        return own if older is None or own <= Readiness.RELUCTANT or self.is_drained else min(own, older.readiness)

    @property
    def _readiness(self) -> Readiness:
        if self.is_drained or not self.sessions or (self.draining and not self.hands_over):
            return Readiness.NONE
        for session in self.sessions.values():
            if session.is_up:
                return Readiness.LEAVING if self.draining else Readiness.RELUCTANT if self.is_reluctant else Readiness.UP
        return Readiness.HELD

    @property
    def link_count(self) -> int:
        """Sessions that have a link, or may have one again. Not those whose successor the relay may make."""
        return sum(not is_worn(session) for session in self.sessions.values() if session.id not in self.given_up)

    def session_for_stream(self) -> Session | None:
        """The session a new stream should go on: one that is up, carries no bulk, and has the fewest streams."""
        older = self.predecessor
        if older is not None and older.readiness < self._readiness:
            return older.session_for_stream()
        if len(self.sessions) == 1:
            (only,) = self.sessions.values()
            return only
        return min(self.sessions.values(), key=lambda s: (not s.is_up, s.is_spent, is_worn(s), s.is_bulk, len(s.mux.streams)), default=None)


def is_worn(session: Session) -> bool:
    """Whether its relay is about to make another beside it, or has: it has had half of its stream ids."""
    return session.mux.opened >= WORN_STREAMS


def why_gone(instance: InstanceId, successor: InstanceId) -> tuple[Code, str]:
    """Why `instance` ends when `successor` has its relay's name."""
    if instance == successor:
        return Code.LINK_LOST, "its control link came up at another worker"
    return Code.FENCED, "another instance has this relay's name now"
