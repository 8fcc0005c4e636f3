"""Port: what an uplink needs of the rest of the relay, and what it tells about itself."""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from fxrelay.uplink.dial import Proxy
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionStatistics
from fxtunnel.errors import TunnelClosed
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.model import GatewayId, SessionId
from fxtunnel.protocol.hello import CAP_RESUME

FINAL_CODES: Final = frozenset({Code.FENCED, Code.REVOKED})
"""Goodbyes after which dialling again would be wrong: somebody decided that this process must not come back."""


class LinkSession(Protocol):
    """The part of a `Session` that an uplink handles. It begins without a link."""

    @property
    def id(self) -> SessionId:
        """As the gateway named it."""

    @property
    def received(self) -> int:
        """Bytes of the gateway's sequence that have arrived; stands still only while no link is attached."""

    def detach(self, reason: str) -> None:
        """Retire the current link, if there is one."""

    def forgo_resumption(self) -> None:
        """The gateway keeps nothing for a repeat: do not either. Before the first `attach`."""

    def attach(self, link: LinkSocket, peer_received: int) -> None:
        """Run on `link` from now on, and own it. Raises RemoteProtocolError, and then does not take it."""

    def close(self, code: Code, text: str = "") -> None:
        """Say goodbye and reset all streams; calls the owner's `on_closed` unless the session was closed before."""

    @property
    def has_delivered(self) -> bool:
        """Whether the gateway has acknowledged all that was sent on streams which have ended, or the session is over."""

    def press(self) -> None:
        """Have the gateway acknowledge soon what was sent so far."""

    def statistics(self) -> SessionStatistics:
        """Counters now."""


class UplinkSessionOwner(Protocol):
    """Who hears of a session's fate. Called from the engine: no waiting."""

    def on_link_down(self, session: LinkSession, reason: str) -> None:
        """The link is lost and the session is held."""

    def on_closed(self, session: LinkSession, code: Code, text: str) -> None:
        """The session is over; its streams have been reset."""


class SessionFactory(Protocol):
    """Makes the sessions of an uplink: the relay's application knows the engine and the services."""

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """A session that the gateway has just begun, without a link."""


class GatewayClosing(TunnelClosed):
    """The gateway said goodbye on the control link. Dial again after `retry_after_s`, unless the code is one of FINAL_CODES."""

    def __init__(self, code: Code, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(code, message, by_peer=True)


@dataclass(frozen=True, slots=True)
class UplinkConfig:
    """How an uplink behaves. Times in seconds. `dead_after_s` bounds what the gateway asks for; the rest of the timing is the gateway's."""

    links: int = 1
    proxy: Proxy | None = None
    dial_timeout_s: float = 10.0
    min_backoff_s: float = 0.25
    max_backoff_s: float = 30.0
    dead_after_s: float = 10.0
    caps: tuple[str, ...] = (CAP_RESUME,)


class UplinkState(Enum):
    """Where an uplink stands. Data sessions may live in any state but STOPPED."""

    CONNECTING = "connecting"
    ENROLLING = "enrolling"
    UP = "up"
    WAITING = "waiting"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class UplinkStatistics:
    """A snapshot of an uplink. `since_unix` is when `state` began; `epoch` counts take-overs of the name, 0 before the first welcome.

    `attempts` counts the times the gateway was dialled for a control link; `next_try_unix` is when it will be again, while WAITING.
    """

    gateway_id: GatewayId
    url: str
    state: UplinkState
    since_unix: float
    last_error: str
    epoch: int
    is_draining: bool
    sessions: tuple[SessionStatistics, ...]
    attempts: int = 0
    next_try_unix: float = 0.0

    @property
    def has_tunnel(self) -> bool:
        """Whether clients of this gateway can be served."""
        return any(session.is_up for session in self.sessions)

    @property
    def has_tried(self) -> bool:
        """Whether there is a tunnel, or the first attempt at one has failed."""
        has_failed = self.attempts > 1 or (self.attempts == 1 and self.state in (UplinkState.WAITING, UplinkState.STOPPED))
        return has_failed or self.has_tunnel
