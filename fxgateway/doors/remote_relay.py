"""Port: a relay whose tunnel is in another process of this gateway. A client for it moves there, with everything known about it."""

from typing import TYPE_CHECKING, ClassVar, Literal

from fxgateway.routing.offers import Readiness
from fxtunnel.model import RelayId

if TYPE_CHECKING:
    from fxgateway.doors.client import Client


class RemoteRelay:
    """A candidate like any other, except that it has `take` instead of a session."""

    is_remote: ClassVar[Literal[True]] = True

    __slots__ = ()

    relay_id: RelayId
    readiness: Readiness
    open_streams: int

    def take(self, client: "Client", early: bytes) -> bool:
        """Pass the client to the process that has this relay; here it has then ended. False: that process does not take it.

        `early` are the client's first bytes, which have already been read from its socket.
        """
        raise NotImplementedError
