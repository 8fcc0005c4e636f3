"""Task: who a client of a guarded HTTP service is, request by request: a ticket in it, a pass, or the ticket of the whole stream."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from fxrelay.admitting.stream_admission import ClientAdmission
from fxrelay.admitting.ticket import Caller, TicketProblem
from fxrelay.delivery.ports import NotAdmitted
from fxrelay.web.heads import RequestHead
from fxrelay.web.passes import Passes, bearer_of, split_ticket
from fxtunnel.codes import Code
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId

_PAGES: Final = {
    Code.BAD_TICKET: (401, "BadTicket", "This needs a fresh ticket that is meant for it; open it from where you get tickets."),
    Code.FORBIDDEN: (403, "Forbidden", "You may not have this."),
    Code.OVER_LIMIT: (429, "TooMany", "You have too many connections to this service."),
}
_RETRY_AFTER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A request and who asks. `head` and `path` are as the service gets them: without ticket and pass. `is_new`: a pass is due."""

    caller: Caller
    head: RequestHead
    path: bytes
    is_new: bool = False


class RequestAuth:
    """Belongs to one client connection. `ticket` is the one that came with the stream's OPEN; `takes_bearers`: a token in Authorization
    is a ticket, since everybody needs one.
    """

    def __init__(
        self, client_admission: ClientAdmission, passes: Passes | None, ticket: str, count: Callable[[Code], None], *, takes_bearers: bool
    ) -> None:
        self._client_admission = client_admission
        self._passes = passes
        self._ticket = ticket
        self._count = count
        self._takes_bearers = takes_bearers
        self._streams_caller: Caller | None = None
        self._logged_in = ""

    def identify(self, head: RequestHead, path: bytes, now_unix: float) -> Shown:
        """Who asks, and what for.

        Raises:
            Refused: nobody who may, or too often.
        """
        path, tickets = split_ticket(path)
        passes = self._passes
        known = passes.caller_of(head, now_unix) if passes is not None else None
        if passes is not None:
            head = passes.without(head)
        if len(tickets) > 1:
            raise Refused(400, "BadRequest", "There is more than one ticket.")
        if self._ticket and not tickets:
            self._streams_caller = caller = self._streams_caller or self._identified(self._ticket)
            shown = Shown(caller, head, path)
        elif tickets:
            shown = Shown(self._identified(tickets[0].decode("latin-1")), head, path, is_new=True)
        elif known is not None:
            shown = Shown(known, head, path)
        else:
            token = bearer_of(head) if self._takes_bearers else b""
            caller = self._identified(token.decode("latin-1"))
            if token:
                head = replace(head, fields=tuple(found for found in head.fields if found.name != b"authorization"))
            shown = Shown(caller, head, path, is_new=bool(token))
        self._checked(self._client_admission.take_place(shown.caller if shown.caller.user else Caller(self._logged_in)))
        return shown

    def count_for(self, user: str) -> None:
        """Count the connection as one of this user's, who is known by a login and not by a ticket; empty: as nobody's.

        Raises:
            Refused: he has too many.
        """
        if user != self._logged_in:
            self._logged_in = ""
            self._checked(self._client_admission.take_place(Caller(user)))
            self._logged_in = user

    def bind(self, caller: Caller, wanted: RelayId | None) -> RelayId | None:
        """The node that a request may go to, if only one will do. `wanted` is the one that it names itself.

        Raises:
            Refused: these are two.
        """
        if caller.node is not None and wanted not in (None, caller.node):
            text = f"the ticket is for {caller.node}, asked for is {wanted}"
            self._checked(self._client_admission.refuse(Code.FORBIDDEN, TicketProblem.WRONG_NODE, text, caller))
        return caller.node or wanted

    async def use(self, caller: Caller, node: str) -> None:
        """Before the request goes to that node. Raises Refused: it must not."""
        self._checked(await self._client_admission.use(caller, node))

    def close(self) -> None:
        """The connection has ended."""
        self._client_admission.release()

    def _identified(self, token: str) -> Caller:
        found = self._client_admission.identify(token)
        if isinstance(found, NotAdmitted):
            raise self._refused(found)
        return found

    def _checked(self, answer: NotAdmitted | None) -> None:
        if answer is not None:
            raise self._refused(answer)

    def _refused(self, answer: NotAdmitted) -> Refused:
        self._count(answer.code)
        status, name, message = _PAGES.get(answer.code, (503, "NoService", "The service is not available at the moment."))
        return Refused(status, name, message, retry_after_s=_RETRY_AFTER_S if status in (429, 503) else 0.0, detail=answer.text)
