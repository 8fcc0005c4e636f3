"""Port: what the tunnel port needs of the rest of the gateway."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fxtunnel.codes import Code
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.model import InstanceId, Offer, RelayId, SessionId


@dataclass(frozen=True, slots=True)
class Departure:
    """An instance drains, and will be gone within `deadline_s`. `hands_over`: until its successor serves, it takes what nobody else can."""

    deadline_s: float
    hands_over: bool = False


Departures = Mapping[InstanceId, Departure]


class ControlHandle(Protocol):
    """A relay's control link, as the registry holds it."""

    @property
    def remote_address(self) -> str:
        """Where it comes from, `ip:port`."""

    @property
    def connected_at(self) -> float:
        """Since when, on the monotonic clock."""

    def drain(self, deadline_s: float) -> None:
        """Tell the relay that this process sends it no new streams, and to look for another process of the gateway. Never blocks."""

    def relieve(self) -> None:
        """Tell an instance that makes way that its successor serves, so that it need not wait any longer. Never blocks."""

    def close(self, code: Code, text: str, retry_after_s: float = 0) -> None:
        """Tell the relay why, then end the link, soon. Never blocks; only the first call counts."""


class SessionHandle(Protocol):
    """A session, as far as giving it a link goes; see fxtunnel.engine.session.Session."""

    @property
    def id(self) -> SessionId:
        """Its name on the wire."""

    @property
    def received(self) -> int:
        """Bytes of the relay's sequence that have arrived; stands still without a link."""

    @property
    def resumes(self) -> bool:
        """Whether it outlives its link."""

    def forgo_resumption(self) -> None:
        """The relay does not resume. Before the first `attach`."""

    def detach(self, reason: str) -> None:
        """Retire the current link."""

    def attach(self, link: LinkSocket, peer_received: int) -> None:
        """Run on `link`, and own it.

        Raises:
            RemoteProtocolError: the relay wants bytes that are no longer kept. The link stays the caller's.
        """

    def close(self, code: Code, text: str = "") -> None:
        """End the session."""


class RegistryPort(Protocol):
    """Which relays are here. Nothing in it blocks."""

    @property
    def is_draining(self) -> bool:
        """Whether the gateway is going away."""

    def is_full(self, relay_id: RelayId) -> bool:
        """Whether a relay that is not here yet finds no room."""

    def enter(self, relay_id: RelayId, instance: InstanceId, offers: tuple[Offer, ...], link: ControlHandle, epoch: int = 0) -> int:
        """A control link is up; returns the epoch: the next one, if none is given. Fences other instances, replaces the same
        instance's older link.
        """

    def update_services(self, relay_id: RelayId, instance: InstanceId, offers: tuple[Offer, ...]) -> None:
        """What the relay offers from now on."""

    def knows(self, relay_id: RelayId, instance: InstanceId | None = None) -> bool:
        """Whether this instance is here, or held; without one, whether any instance of the relay is."""

    def is_up(self, relay_id: RelayId, instance: InstanceId) -> bool:
        """Whether a data link of this instance is up."""

    def mark_draining(self, relay_id: RelayId, instance: InstanceId, departure: Departure) -> None:
        """This instance goes away."""

    def note_reluctance(self, relay_id: RelayId, instance: InstanceId, *, reluctant: bool) -> None:
        """Whether other relays are better asked first, as the relay says."""

    def leave(self, relay_id: RelayId, link: ControlHandle) -> None:
        """A control link has ended."""

    def new_session(self, relay_id: RelayId, instance: InstanceId) -> SessionHandle | None:
        """A session for a new data link; None if the instance is not here or has enough."""

    def note_sessions(self, relay_id: RelayId, instance: InstanceId, kept: tuple[SessionId, ...]) -> None:
        """The sessions that the instance still has."""

    def end_given_up(self, relay_id: RelayId, instance: InstanceId) -> None:
        """A data link of the instance is up: end the sessions that it has said it has no more."""

    def find_session(self, relay_id: RelayId, instance: InstanceId, session_id: SessionId) -> SessionHandle | None:
        """The session a relay wants to resume, if it is that instance's and not over."""
