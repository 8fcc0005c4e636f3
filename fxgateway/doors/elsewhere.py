"""Port: a relay whose tunnel is in another process of this gateway: a client for it goes there, with all that is known of it."""

from typing import TYPE_CHECKING, ClassVar, Literal

from fxgateway.routing.offers import Readiness
from fxtunnel.model import RelayId

if TYPE_CHECKING:
    from fxgateway.doors.client import Client


class Elsewhere:
    """A candidate like any other, but for this: `take` instead of a session."""

    is_far: ClassVar[Literal[True]] = True

    __slots__ = ()

    relay_id: RelayId
    readiness: Readiness
    open_streams: int

    def take(self, client: "Client", early: bytes) -> bool:
        """Let the process that has this relay go on with the client, which is at its end here then. False: it does not take it.

        What the client sent first is `early`, and has been taken from its socket.
        """
        raise NotImplementedError
