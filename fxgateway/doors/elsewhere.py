"""Port: a relay whose tunnel is in another process of this gateway: a client for it goes there, with all that is known of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxgateway.routing.table import Readiness
from fxtunnel.model import RelayId

if TYPE_CHECKING:
    from fxgateway.doors.client import Client

MAX_HOPS = 8
"""Times one client is passed on, at most: tables of different processes may disagree for a moment."""


@dataclass(frozen=True, slots=True)
class Journey:
    """How far a client has got on its way to a service: what it sent is `early`, and has been taken from its socket."""

    asked: tuple[RelayId, ...]
    target: RelayId | None
    avoid: tuple[RelayId, ...]
    attempts: int
    hops: int
    has_ended: bool
    early: bytes


class Elsewhere:
    """A candidate like any other, but for this: `take` instead of a session."""

    __slots__ = ()

    relay_id: RelayId
    readiness: Readiness
    open_streams: int

    def take(self, client: "Client", journey: Journey) -> bool:
        """Let the process that has this relay go on with the client, which is at its end here then. False: it does not take it."""
        raise NotImplementedError
