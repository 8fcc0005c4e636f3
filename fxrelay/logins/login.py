"""Task: one request of a login, from its body to the answer that the client gets: steps 1 to 5 of a reservation (docs/RESERVATIONS.md)."""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

from fxrelay.balance.login_attempt import Attempt, AttemptEvent
from fxrelay.balance.model import Action
from fxrelay.balance.reservations import ENTRY_HARD_MS, Reason, is_daemon
from fxrelay.delivery.identity import identity_of
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxrelay.logins.attempts import Ongoing
from fxrelay.logins.gate import LoginGate, LoginService, unanswered, unavailable
from fxrelay.logins.passes import Pass
from fxrelay.logins.recognising import Failed, GoesOn, Parameters, Succeeded, is_user, judge, login_id_of, read_parameters
from fxrelay.logins.rules import Retry
from fxrelay.reserving.leases import Hold
from fxrelay.reserving.reservations import NO_STORE, Entered, NotEntered, Reservations, new_id
from fxrelay.web.ports import Reply, RequestFacts, Sender, WholeAnswer
from fxtunnel.errors import NodeError
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.jwt_verifying import BadToken
from fxtunnel.model import GatewayId, RelayId

logger = logging.getLogger(__name__)

MAX_SERVERS: Final = 8
"""Servers at which one login is tried."""


@dataclass(frozen=True, slots=True)
class Proven:
    """The user who has logged in. `lasts_s`: how long the login is valid, in seconds."""

    user: str
    lasts_s: float
    is_daemon: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """Another user has the server."""

    refused: NotEntered


class HeldLogin:
    """Implements `HeldRequest` for one request of a login."""

    def __init__(self, gate: LoginGate, service: LoginService, request: RequestFacts) -> None:
        assert gate.reservations is not None
        self.max_body_bytes = service.rules.bounds.max_body_bytes
        self._gate = gate
        self._service = service
        self._request = request
        self._reservations: Reservations = gate.reservations
        self._address = identity_of(request.client)
        self._said = Parameters()

    async def run(self, body: bytes, sender: Sender) -> Reply:
        """See `HeldRequest`."""
        request, service = self._request, self._service
        self._said = said = read_parameters(service.rules, request.path, request.fields, body)
        if said.is_ambiguous:
            raise Refused(400, "BadLogin", "This login names more than one user, or cannot be read.")
        with self._gate.quota.place(self._address, service.rules.bounds.per_address):
            key, ongoing = self._ongoing()
            if ongoing is not None:
                return await self._go_on(key, ongoing, sender)
            if said.repeats:
                raise _lost("This login is not known here, or took too long. Please log in again.")
            return await self._begin(sender)

    async def _begin(self, sender: Sender) -> Reply:
        """Find a server, and another one if somebody else is quicker."""
        service, request = self._service, self._request
        attempt_id = new_id()
        user = self._said.user or (f"unknown {attempt_id}" if service.verifier is not None else "")
        if not user:
            raise Refused(400, "NoUser", "This login does not say whose it is.")
        wanted = Wanted(
            request.service,
            request.client,
            GatewayId(""),
            request.trace,
            request.node if request.is_named else None,
            user,
            time.monotonic(),
            action=Action.LOGIN,
            data=self._said.data,
        )
        excluded: frozenset[RelayId] = frozenset()
        problem, lost = "", False
        for _ in range(MAX_SERVERS):
            node = await self._gate.chooser.choose(wanted, excluded)
            if isinstance(node, NoNode):
                raise _given_away() if lost and not node.position else self._nobody(node, problem)
            try:
                reply = await self._at(node, user, sender)
            except NodeError as exc:
                problem = str(exc)
                excluded |= {node.server_id}
                continue
            if isinstance(reply, Reply):
                return reply
            lost = True
            if service.rules.retry is Retry.TELL or reply.refused.reason not in (Reason.RESERVED, Reason.NO_ENTRY):
                excluded |= {node.server_id}
                if service.rules.retry is Retry.TELL:
                    break
        raise _given_away() if lost else self._nobody(None, problem)

    async def _at(self, node: Node, user: str, sender: Sender) -> Reply | Lost:
        """Log in at this server.

        Raises:
            NodeError: it cannot be reached; others may be.
        """
        now = time.monotonic()
        if node.seat is None:
            return await self._send("", Ongoing(node.server_id, user, self._address, now, now, None), node, sender)
        try:
            entered = await self._reservations.enter(node.server_id, user, self._address)
        except BaseException:
            node.claim.release()
            raise
        if isinstance(entered, NotEntered):
            node.claim.release()
            if entered.reason == Reason.TOO_MANY:
                raise Refused(
                    429, "TooManyLogins", "Too many logins from your address are under way. Please try again.", retry_after_s=30.0
                )
            raise _undecided(entered)
        entered = replace(entered, attempt=entered.attempt.after(AttemptEvent.FORWARD))
        return await self._send("", Ongoing(node.server_id, user, self._address, now, now, entered), node, sender)

    async def _go_on(self, key: str, ongoing: Ongoing, sender: Sender) -> Reply:
        """One more request of a login: to the server where it began, as long as its entry is there."""
        if ongoing.is_busy:
            raise Refused(409, "LoginBusy", "Another request of this login is under way.")
        ongoing.is_busy = True
        try:
            if ongoing.entered is not None:
                gone_on = await self._reservations.go_on(ongoing.entered, ongoing.user)
                if isinstance(gone_on, NotEntered):
                    self._gate.attempts.drop(key)
                    if gone_on.is_final or gone_on.reason == NO_STORE:
                        raise _undecided(gone_on)
                    text = "The server was given to another user in the meantime, or the login took too long. Please log in again."
                    raise _lost(text, self._end_try())
                ongoing.entered = gone_on
                ongoing.user = ongoing.user or self._entry_user(gone_on)
            elif ongoing.reserves:
                began = await self._reservations.enter(ongoing.server_id, ongoing.user, self._address)
                if isinstance(began, NotEntered):
                    raise _undecided(began)
                ongoing.entered = replace(began, attempt=began.attempt.after(AttemptEvent.FORWARD))
            if self._said.user and self._said.user != ongoing.user and self._service.verifier is None:
                raise Refused(400, "BadLogin", "This login was begun by another user.")
            wanted = Wanted(self._request.service, self._request.client, GatewayId(""), self._request.trace)
            node = await self._gate.chooser.named(wanted, ongoing.server_id)
            if isinstance(node, NoNode):
                self._out(ongoing, AttemptEvent.SERVER_GONE)
                raise Refused(502, "Unreachable", "The server of this login cannot be reached. Please log in again.", detail=node.text)
            try:
                reply = await self._send(key, ongoing, node, sender)
            except NodeError as exc:
                raise Refused(502, "Unreachable", "The server of this login cannot be reached. Please log in again.") from exc
        finally:
            ongoing.is_busy = False
        if isinstance(reply, Lost):
            raise _given_away()
        return reply

    async def _send(self, key: str, ongoing: Ongoing, node: Node, sender: Sender) -> Reply | Lost:
        """Steps 3 to 5: forward the request, and see what the answer means before anybody else does."""
        happened = AttemptEvent.CLIENT_GONE
        try:
            try:
                answer = await sender.send(node, self._service.rules.bounds.max_answer_bytes)
            except (NodeError, Refused):
                happened = AttemptEvent.SERVER_GONE
                raise
            verdict = judge(self._service.rules, answer.status, answer.fields, answer.body)
            happened = AttemptEvent.FAILURE
            match verdict:
                case Failed():
                    return self._failed(key, ongoing, answer)
                case GoesOn(token):
                    happened = AttemptEvent.REQUEST
                    return self._expect_more(key, ongoing, answer, token)
                case Succeeded(token):
                    proven = await self._prove(token or self._said.token, ongoing)
                    self._gate.attempts.drop(key)
                    if proven.is_daemon or ongoing.entered is None:
                        return Reply(answer, self._end_try())
                    happened = AttemptEvent.REQUEST
                    return await self._commit(ongoing.entered, proven, token or self._said.token, answer)
        finally:
            if happened is not AttemptEvent.REQUEST:
                self._out(ongoing, happened)

    def _failed(self, key: str, ongoing: Ongoing, answer: WholeAnswer) -> Reply:
        """Some services let a wrong password be corrected within the same login: it stays at its server, and enters anew."""
        if not self._service.rules.stages.returned:
            self._gate.attempts.drop(key)
            return Reply(answer, self._end_try())
        ongoing.touched = time.monotonic()
        return Reply(answer)

    def _expect_more(self, key: str, ongoing: Ongoing, answer: WholeAnswer, token: str) -> Reply:
        attempts, now = self._gate.attempts, time.monotonic()
        entry_id = ongoing.entered.attempt.attempt_id if ongoing.entered is not None else new_id()
        if key:
            attempts.drop(key)
        next_key = login_id_of(token) if token else entry_id
        attempts.keep(next_key, ongoing, now)
        began_unix = int(self._gate.wall_clock() - (now - ongoing.began))
        cookie = self._service.passes.grant_try(
            Pass(ongoing.server_id, entry_id, began_unix), ENTRY_HARD_MS // 1000, secure=self._request.is_secure
        )

        def undo() -> None:
            if not key:  # it was the first answer: nobody has anything to go on with
                attempts.drop(next_key)
                self._out(ongoing, AttemptEvent.CLIENT_GONE)

        return Reply(answer, (cookie,), undo)

    async def _prove(self, token: str, ongoing: Ongoing) -> Proven:
        """Who has logged in, as the token proves; without keys for tokens, who the client says it is.

        Raises:
            Refused: the token proves nothing.
        """
        service, now_unix = self._service, self._gate.wall_clock()
        lasts_s = service.rules.bounds.lifetime_s
        if service.verifier is None:
            if not ongoing.user:
                raise _bad_token("the login's user is not known")
            return Proven(ongoing.user, lasts_s)
        if not token:
            raise _bad_token("a success without the token that it should have")
        try:
            claims = await service.verifier.verify(token)
        except BadToken as exc:
            raise _bad_token(str(exc)) from exc
        user: Any = claims.get(service.user_claim)
        if is_daemon(claims):
            return Proven(str(user), 0.0, is_daemon=True)
        if not isinstance(user, str) or not is_user(user):
            raise _bad_token(f"the token's {service.user_claim} is not a user")
        lasts_s = min(lasts_s, claims["exp"] - now_unix)
        if lasts_s <= 0:
            raise _bad_token("the token is about to expire")
        return Proven(user, lasts_s)

    async def _commit(self, entered: Entered, proven: Proven, token: str, answer: WholeAnswer) -> Reply | Lost:
        """Step 5. The client gets its answer only if the login is granted; if it cannot get the answer, the grant is given back."""
        service, reservations = self._service, self._reservations
        idle_s = service.rules.bounds.idle_s
        first_s = min(proven.lasts_s, idle_s) if idle_s else proven.lasts_s
        entered = replace(entered, attempt=entered.attempt.after(AttemptEvent.SUCCESS))
        hold = await reservations.commit(
            entered, proven.user, service.terms(max(1, int(first_s * 1000))), service.seats.relogin, login_id_of(token) if token else ""
        )
        if not isinstance(hold, Hold):
            if hold.is_final:
                raise _undecided(hold)
            return Lost(hold)
        with ExitStack() as claim:
            claim.callback(reservations.release, hold)
            now_unix = self._gate.wall_clock()
            found = Pass(hold.server_id, hold.login_id, int(now_unix + proven.lasts_s))
            cookie = service.passes.grant(found, now_unix, secure=self._request.is_secure)
            return Reply(answer, (cookie, *self._end_try()), claim.pop_all().close)

    def _ongoing(self) -> tuple[str, Ongoing | None]:
        """The login that this request goes on with: by what it repeats, or by the browser's cookie."""
        attempts, now, now_unix = self._gate.attempts, time.monotonic(), self._gate.wall_clock()
        for repeated in self._said.repeats:
            key = login_id_of(repeated)
            found = attempts.find(key, now)
            if found is not None:
                return key, found
        rules = self._service.rules
        if rules.stages.returned and not self._said.repeats:
            return "", None  # it begins anew, whatever the browser remembers
        for shown in self._service.passes.read_tries(self._request.fields):
            found = attempts.find(shown.login_id, now)
            age_s = now_unix - shown.until_unix
            if found is None and 0 <= age_s <= ENTRY_HARD_MS / 1000:
                found = self._elsewhere_begun(shown, now - age_s, now)
            if found is not None and self._said.user in ("", found.user or self._said.user):
                return shown.login_id, found
        return "", None

    def _elsewhere_begun(self, shown: Pass, began: float, now: float) -> Ongoing:
        """A login that began at another relay: its entry is in the store, if it is still good."""
        attempt = Attempt(shown.login_id).after(AttemptEvent.ENTER).after(AttemptEvent.FORWARD)
        return Ongoing(shown.server_id, "", self._address, began, now, Entered(shown.server_id, attempt))

    def _entry_user(self, entered: Entered) -> str:
        standing = self._reservations.holders.standings().get(entered.server_id)
        entries = standing.record.entries if standing is not None else ()
        return next((entry.user for entry in entries if entry.entry_id == entered.attempt.attempt_id), "")

    def _out(self, ongoing: Ongoing, why: AttemptEvent) -> None:
        entered, ongoing.entered = ongoing.entered, None
        if entered is not None:
            ongoing.reserves = True
            self._reservations.reject(entered, why)

    def _end_try(self) -> tuple[bytes, ...]:
        passes = self._service.passes
        return (passes.withdraw_try(),) if passes.read_tries(self._request.fields) else ()

    def _nobody(self, node: NoNode | None, problem: str) -> Refused:
        """Why there is no server for this login."""
        if problem or node is None:
            return Refused(502, "Unreachable", "No server can be reached.", detail=problem)
        message = node.message or "No server is free for you at the moment. Please try again later."
        fields: tuple[bytes, ...] = ()
        if node.position:
            message = f"No server is free at the moment; you were number {node.position} of those who wait. Please try again."
            fields = (b"Fx-Queue-Position: %d\r\n" % node.position,)
        return Refused(503, node.name or "NoServerFree", message, retry_after_s=5.0 + 2.0 * node.position, detail=node.text, fields=fields)


def _undecided(refused: NotEntered) -> Refused:
    return unanswered(refused.text) if refused.reason == NO_STORE else unavailable(refused.text)


def _lost(message: str, fields: tuple[bytes, ...] = ()) -> Refused:
    return Refused(409, "Reserved", message, retry_after_s=2.0, fields=fields)


def _given_away() -> Refused:
    return _lost("The server was given to another user while you logged in. Please log in again.")


def _bad_token(why: str) -> Refused:
    return Refused(502, "BadLogin", "The service let you in, but its answer does not prove who you are.", detail=why)
