"""Task: a stream of a guarded TCP service: the ticket is the one that came with its OPEN."""

from collections.abc import Callable

import trio

from fxrelay.admitting.stream_admission import ClientAdmission, StreamAdmission
from fxrelay.admitting.ticket import Caller, TicketProblem
from fxrelay.delivery.ports import Admitted, NotAdmitted
from fxtunnel.codes import Code
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import Opening


class StreamEntries:
    """Implements `Entries`. `is_pool` tells whether a service's nodes are chosen; one that is not a pool is always served here."""

    def __init__(self, admission: StreamAdmission, is_pool: Callable[[ServiceName], bool]) -> None:
        self._admission = admission
        self._is_pool = is_pool

    def entry(self, service: ServiceName, opening: Opening, trace: str) -> "StreamEntry":
        """See `Entries`."""
        only_here = opening.via is not None or not self._is_pool(service)
        client_admission = self._admission.receive(service, opening.client, trace)
        return StreamEntry(client_admission, opening, self._admission.own_id, only_here=only_here)


class StreamEntry:
    """Implements `Entry`. `only_here`: no other node than this one can serve the stream."""

    __slots__ = ("_caller", "_client_admission", "_only_here", "_opening", "_own_id")

    def __init__(self, client_admission: ClientAdmission, opening: Opening, own_id: RelayId, *, only_here: bool) -> None:
        self._client_admission = client_admission
        self._opening = opening
        self._own_id = own_id
        self._only_here = only_here
        self._caller = Caller()

    def admit(self) -> Admitted | NotAdmitted:
        """See `Entry`."""
        caller = self._client_admission.identify(self._opening.ticket)
        if isinstance(caller, NotAdmitted):
            return caller
        asked = self._opening.node
        if caller.node is not None and asked not in (None, caller.node):
            return self._client_admission.refuse(
                Code.FORBIDDEN, TicketProblem.WRONG_NODE, f"the ticket is for {caller.node}, asked for is {asked}", caller
            )
        if caller.node is not None and self._only_here and caller.node != self._own_id:
            # One address has several relays in front of it: the gateway may try the right one next.
            code = Code.FORBIDDEN if self._opening.via is not None else Code.NO_SERVICE
            return self._client_admission.refuse(
                code, TicketProblem.WRONG_NODE, f"the ticket is for {caller.node}, and this is {self._own_id}", caller
            )
        self._caller = caller
        return self._client_admission.take_place(caller) or Admitted(caller.user, caller.groups, caller.node or asked)

    async def use(self, node: RelayId | None) -> NotAdmitted | None:
        """See `Entry`."""
        caller, found = self._caller, node or self._own_id
        if caller.node not in (None, found):
            await trio.lowlevel.checkpoint()
            return self._client_admission.refuse(
                Code.FORBIDDEN, TicketProblem.WRONG_NODE, f"the ticket is for {caller.node}, chosen is {found}", caller
            )
        return await self._client_admission.use(caller, found)

    async def give_back(self) -> None:
        """See `Entry`."""
        await self._client_admission.give_back()

    def release(self) -> None:
        """See `Entry`."""
        self._client_admission.release()
