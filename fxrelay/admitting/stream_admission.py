"""Task: everything that is checked before a client gets a stream: its ticket, the service's owner, how many streams the user has already.

The relay asks, never the gateway: it is the gateway that may be in wrong hands, and it has nothing here that it could make a ticket with.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from fxrelay.admitting.memory import TicketMemory, Use
from fxrelay.admitting.owner import Owner, OwnerQuery
from fxrelay.admitting.quotas import NO_LIMITS, Quotas, StreamLimits
from fxrelay.admitting.ticket import BadTicket, Caller, Ticket, TicketProblem, TicketRules, read_ticket
from fxrelay.delivery.identity import identity_of
from fxrelay.delivery.ports import NotAdmitted
from fxtunnel.codes import Code
from fxtunnel.kit.signed_claims import TokenProblem
from fxtunnel.kit.sources import source_of
from fxtunnel.model import RelayId, ServiceName

logger = logging.getLogger(__name__)

OWNER_REMEMBERED_S: Final = 60.0
"""How long the owner's yes holds for the requests of one connection."""
MAX_REMEMBERED: Final = 16
OWNER_WAIT_S: Final = 7.0
"""For a script process to become free and answer. Less than the 10 s that gateways wait for a stream."""
_UNUSABLE: Final = {
    Use.AGAIN: (TicketProblem.USED, "it was used before"),
    Use.FORGOTTEN: (TicketProblem.FORGOTTEN, "it was made before the memory of this relay begins"),
    Use.UNKNOWABLE: (TicketProblem.UNKNOWABLE, "the store is away, so whether it was used before cannot be told"),
}


@dataclass(frozen=True, slots=True)
class EntryRules:
    """What a service asks of those who want it."""

    ticket: TicketRules | None = None
    owner: Owner | None = None
    limits: StreamLimits = NO_LIMITS


class StreamAdmission:
    """Knows the rules of all guarded services, and who is in."""

    def __init__(self, memory: TicketMemory, own_id: RelayId, clock: Callable[[], float] = time.time) -> None:
        self.memory = memory
        self.own_id = own_id
        self.clock = clock
        self.quotas = Quotas()
        self._rules: Mapping[ServiceName, EntryRules] = {}

    def reconfigure(self, rules: Mapping[ServiceName, EntryRules]) -> None:
        """Rules from now on; who is in stays in."""
        self._rules = rules

    def receive(self, service: ServiceName, client: str, trace: str) -> "ClientAdmission":
        """A connection of `client` (ip:port) that wants the service."""
        return ClientAdmission(self, service, self._rules.get(service), identity_of(client), trace)


class ClientAdmission:
    """One client connection. `release` it when it ends."""

    def __init__(self, admission: StreamAdmission, service: ServiceName, rules: EntryRules | None, address: str, trace: str) -> None:
        self._admission = admission
        self._service = service
        self._rules = rules
        self._address = address
        self._trace = trace
        self._user: str | None = None
        self._places: dict[str, tuple[str, str, str]] = {}
        self._used: Ticket | None = None
        self._allowed: dict[tuple[str, str], float] = {}

    def identify(self, token: str) -> Caller | NotAdmitted:
        """Who shows this ticket; an empty text means no ticket."""
        if self._rules is None:
            return self.refuse(Code.NO_SERVICE, "no-rules", "this relay does not know yet who may have it")
        rules = self._rules.ticket
        if rules is None:
            return Caller()
        if not token:
            return self.refuse(Code.BAD_TICKET, TicketProblem.MISSING, "it shows none") if rules.is_required else Caller()
        try:
            ticket = read_ticket(token, rules, self._service, self._admission.clock())
        except BadTicket as exc:
            return self.refuse(Code.BAD_TICKET, exc.why, str(exc))
        return Caller(ticket.user, ticket.groups, ticket.node, ticket)

    def take_place(self, caller: Caller) -> NotAdmitted | None:
        """Count the connection as one of this caller's, and of its address'."""
        if self._rules is None:
            return NotAdmitted(Code.NO_SERVICE, "not served here")
        limits = self._rules.limits
        if limits.per_address and self._address and not self._take("address", source_of(self._address), limits.per_address):
            return self.refuse(Code.OVER_LIMIT, "address-full", f"its address has {limits.per_address} streams already")
        if self._user != caller.user:
            self._give_back("user")  # a connection that somebody else's requests come by as well
            self._user = caller.user
        if limits.per_user and caller.user and not self._take("user", caller.user, limits.per_user):
            return self.refuse(Code.OVER_LIMIT, "user-full", f"its user has {limits.per_user} streams already")
        return None

    async def use(self, caller: Caller, node: str) -> NotAdmitted | None:
        """Ask the owner whether the caller may have `node`, and use its ticket up. May be repeated. For cancelling see `TicketMemory`."""
        rules = self._rules
        if rules is None:
            return NotAdmitted(Code.NO_SERVICE, "not served here")
        if rules.owner is not None and not self._is_allowed(caller.user, node):
            question = OwnerQuery(caller.user, caller.groups, self._service, node, self._address, self._trace)
            reason: str | None = "the owner script did not answer in time"
            with trio.move_on_after(OWNER_WAIT_S):
                reason = await rules.owner.why_not(question)
            if reason is not None:
                return self.refuse(Code.FORBIDDEN, "owner", reason, caller)
            self._remember(caller.user, node)
        ticket = caller.ticket
        if ticket is None or rules.ticket is None or ticket is self._used:
            await trio.lowlevel.checkpoint()
            return None
        memory = self._admission.memory
        use = await memory.spend(ticket)
        if use is Use.UNKNOWABLE and not rules.ticket.refuses_without_store:
            use = memory.spend_here(ticket)
        if use is not Use.FIRST:
            # Nothing was used, and another relay may have its store: that one is not to be asked only after a no that is about the ticket.
            code = Code.BUSY if use is Use.UNKNOWABLE else Code.BAD_TICKET
            return self.refuse(code, *_UNUSABLE[use], caller)
        self._used = ticket
        return None

    async def give_back(self) -> None:
        """What was used came to nothing."""
        ticket, self._used = self._used, None
        if ticket is not None:
            await self._admission.memory.give_back(ticket)

    def refuse(self, code: Code, why: TicketProblem | TokenProblem | str, text: str, caller: Caller | None = None) -> NotAdmitted:
        """Say in the log why, and in the answer that."""
        ticket = caller.ticket if caller is not None else None
        extra = {
            "service": self._service,
            "client": self._address,
            "trace": self._trace,
            "refused": code.label,
            "why": str(why),
            "user": caller.user if caller is not None else "",
            "ticket": ticket.use_id if ticket is not None else "",
        }
        logger.warning("%s for service %s: %s (trace %s)", _WHAT[code], self._service, text, self._trace, extra=extra)
        return NotAdmitted(code, f"{why} (trace {self._trace})")

    def release(self) -> None:
        """The connection has ended. May be repeated."""
        for what in list(self._places):
            self._give_back(what)

    def _take(self, what: str, who: str, most: int) -> bool:
        if what in self._places:
            return True
        key = (self._service, what, who)
        if not self._admission.quotas.take(key, most):
            return False
        self._places[what] = key
        return True

    def _give_back(self, what: str) -> None:
        key = self._places.pop(what, None)
        if key is not None:
            self._admission.quotas.give_back(key)

    def _is_allowed(self, user: str, node: str) -> bool:
        since = self._allowed.get((user, node))
        return since is not None and trio.current_time() - since < OWNER_REMEMBERED_S

    def _remember(self, user: str, node: str) -> None:
        self._allowed.pop((user, node), None)
        while len(self._allowed) >= MAX_REMEMBERED:
            self._allowed.pop(next(iter(self._allowed)))
        self._allowed[user, node] = trio.current_time()


_WHAT: Final = {
    Code.NO_SERVICE: "a stream was refused",
    Code.BUSY: "a ticket was not looked at",
    Code.BAD_TICKET: "a ticket was refused",
    Code.FORBIDDEN: "a user was refused",
    Code.OVER_LIMIT: "a stream beyond its limit was refused",
}
