"""Task: this relay's part in reservations: a login enters, commits, is refused, or ends.

While the store does not answer nobody is let in; who is in stays (`upkeep.py`).
"""

import logging
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from fxrelay.balance.login_attempt import Attempt, AttemptEvent
from fxrelay.balance.reservations import ENTRY_TTL_MS, Granted, OwnerRelogin, Reason, Record, Rejected
from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.event_reporter import COMMITTED, ENTERED, read_events, refusal_text
from fxrelay.reserving.kept import find_login, hold_of, tell_cleared
from fxrelay.reserving.leases import Hold, Leases, LeaseTerms
from fxrelay.reserving.ledger import Written
from fxrelay.reserving.record_updates import RecordUpdate, T, WouldDo
from fxrelay.reserving.reservation_cache import CALL_S, ReservationCache, ReservingConfig
from fxrelay.reserving.upkeep import Upkeep
from fxtunnel.errors import StoreError
from fxtunnel.kit.process import keep_going
from fxtunnel.model import RelayId

logger = logging.getLogger(__name__)

NO_STORE: Final = "no-store"


@dataclass(frozen=True, slots=True)
class NotEntered:
    """A login is not let in. `reason` is one of `Reason`, or NO_STORE; `is_final`: no other server would let it in now.

    `text` may be shown to the client; `holder`, the user who has the server if that is the reason, may not.
    """

    reason: str
    text: str
    is_final: bool
    attempt: Attempt
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Entered:
    """A login that is being authenticated on a server."""

    server_id: RelayId
    attempt: Attempt


class Reservations:
    """One relay's part. `run` it once; nobody is let in before it has looked at the store."""

    def __init__(self, config: ReservingConfig, store: Store, transporter: Transporter, view: ClusterView) -> None:
        self._cache = cache = ReservationCache(config, store, transporter)
        cache.store_failed = view.store_doubted
        self.holders = cache.holders
        self.reporter = cache.reporter
        self.leases = Leases()
        self.upkeep = Upkeep(cache, self.leases, view)
        self._view = view

    @property
    def changed(self) -> trio.Event:
        """Set when who has which server may have changed; another one each time."""
        return self._cache.changed

    @property
    def last_error(self) -> str:
        """Why the store did not answer last; empty if it did."""
        return self._cache.last_error

    @property
    def store_doubt(self) -> str:
        """Why the store may forget who has which server; empty if nothing speaks for that."""
        return self._cache.ledger.doubt

    @property
    def is_settled(self) -> bool:
        """Whether a login that is in no record has ended; see `ReservationCache`."""
        return self._cache.is_settled

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is held and follow the others until cancelled. Logins that are held then are left to their leases; see `close`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, "telling of reservations", self.reporter.run)
            nursery.start_soon(keep_going, "asking the store", self._cache.run)
            await nursery.start(self.upkeep.run)
            task_status.started()

    async def enter(self, server_id: RelayId, user: str, address: str) -> Entered | NotEntered:
        """Step 2: a login begins to be authenticated on a server. Safe to cancel: an entry that was made all the same is taken out."""
        attempt = Attempt(new_id())
        silence = await self._silence()
        if silence is not None:
            return self._without_store(server_id, user, attempt, silence)
        with self._unseen(server_id, "", attempt, ENTRY_TTL_MS) as outcomes:
            outcomes.append(await self._cache.do_soon(self._cache.updates.enter(server_id, attempt.attempt_id, user, address)))
        (outcome,) = outcomes
        if isinstance(outcome, StoreError):
            return self._without_store(server_id, user, attempt, outcome)
        entered, written = outcome
        self._cache.learn(server_id, written)
        if isinstance(entered, Rejected):
            return self._refused(server_id, user, attempt, entered)
        self.reporter.happened(ENTERED, server_id, user, attempt.attempt_id)
        return Entered(server_id, attempt.after(AttemptEvent.ENTER))

    async def go_on(self, entered: Entered, user: str) -> Entered | NotEntered:
        """Step 4: one more request of a login whose entry must still be there."""
        server_id, attempt = entered.server_id, entered.attempt
        outcome = await self._do(self._cache.updates.go_on(server_id, attempt.attempt_id))
        if isinstance(outcome, StoreError):
            return self._without_store(server_id, user, attempt, outcome)
        gone_on, written = outcome
        self._cache.learn(server_id, written)
        if isinstance(gone_on, Rejected):
            return self._refused(server_id, user, attempt, gone_on)
        return Entered(server_id, attempt.after(AttemptEvent.REQUEST))

    async def commit(
        self, entered: Entered, user: str, terms: LeaseTerms, relogin: OwnerRelogin = OwnerRelogin.PREFER, known_as: str = ""
    ) -> Hold | NotEntered:
        """Step 5: let an authenticated login in, or not. `user` is who it has proved to be. The attempt must be AUTHENTICATED.

        `known_as` is the id of the login, where it is not the attempt's. Safe to cancel. Whatever comes of it, its entry is taken out.
        """
        server_id, attempt = entered.server_id, entered.attempt
        entry_id, login_id = attempt.attempt_id, known_as or attempt.attempt_id
        ask = self._cache.updates.commit(server_id, entry_id, login_id, user, relogin, terms.lifetime_ms)
        with ExitStack() as unless_granted:
            unless_granted.callback(self.reject, entered, AttemptEvent.REJECT)
            answer = await self._granted(server_id, user, terms, attempt, ask, known_as)
            if isinstance(answer, Hold) or not answer.is_final:  # the store has cleared it in the same step
                unless_granted.pop_all()
        return answer

    async def take(
        self,
        server_id: RelayId,
        user: str,
        address: str,
        terms: LeaseTerms,
        relogin: OwnerRelogin = OwnerRelogin.PREFER,
        would_do: WouldDo | None = None,
    ) -> Hold | NotEntered:
        """All steps at once, for a login that is made by coming in: a stream of a TCP service. If the user has another server that would
        do, he is refused (`elsewhere`), and this relay has learnt which one. `would_do` is called in a worker thread.
        """
        attempt = Attempt(new_id())
        for happening in (AttemptEvent.ENTER, AttemptEvent.FORWARD, AttemptEvent.SUCCESS):
            attempt = attempt.after(happening)
        self.reporter.happened(ENTERED, server_id, user, attempt.attempt_id)
        ask = self._cache.updates.take(server_id, attempt.attempt_id, user, address, relogin, would_do, terms.hold_while_sessions)
        answer = await self._granted(server_id, user, terms, attempt, ask)
        if isinstance(answer, NotEntered) and answer.reason == Reason.ELSEWHERE:
            await self.find_homes(user)
        return answer

    async def find_homes(self, user: str) -> None:
        """Read from the store which servers a user has: a grant by another relay may not have been heard of yet."""
        silence = self._cache.silence()
        if silence is not None:
            await trio.lowlevel.checkpoint()
            return
        homes = await self._cache.ask_soon(lambda: self._cache.ledger.homes(user))
        for server_id in homes if not isinstance(homes, StoreError) else ():
            await self.look_at(RelayId(server_id), user)

    def reject(self, entered: Entered, why: AttemptEvent) -> None:
        """The login failed, or nobody waits for it any more: its entry is taken out, as soon as the store answers. Never waits."""
        entered.attempt.after(why)
        # Without room for it, it expires; and a commit whose answer did not come is undone with its entry.
        if self.leases.has_room and not self.leases.is_ending(entered.attempt.attempt_id):
            self.leases.end(self._ghost(entered.server_id, "", entered.attempt, ENTRY_TTL_MS))

    def release(self, hold: Hold) -> None:
        """Step 7: the login has ended. Never waits; may be repeated."""
        self.leases.end(hold)

    def end_login(self, server_id: RelayId, login_id: str, terms: LeaseTerms) -> None:
        """Step 7, for a login that the store keeps, whichever relay committed it. Never waits; may be repeated."""
        standing = self.holders.standings().get(server_id)
        login = find_login(standing.record, login_id) if standing is not None else None
        hold = self.leases.get(login_id)
        if hold is None and standing is not None and login is not None:
            hold = hold_of(server_id, standing.record, login, replace(terms, lifetime_ms=login.ttl_ms))
        if hold is not None:
            hold.terms = replace(terms, lifetime_ms=hold.terms.lifetime_ms)
            self.leases.end(hold)

    async def extend(self, server_id: RelayId, login_id: str, ttl_ms: int) -> None:
        """A login that the store keeps lasts for `ttl_ms` from now, if it has not ended. Without the store it stays as it is."""
        outcome = await self._cache.do(self._cache.updates.extend(server_id, login_id, ttl_ms))
        if not isinstance(outcome, StoreError):
            self._cache.learn(server_id, outcome[1])

    async def look_at(self, server_id: RelayId, user: str = "") -> bool:
        """Read a server's record now, and write down whether it is this user's. False: the store does not answer."""
        outcome = await self._do(self._cache.updates.sweep(server_id, user))
        if isinstance(outcome, StoreError):
            return False
        self._cache.learn(server_id, outcome[1])
        return True

    def hear(self, text: str) -> bool:
        """A message of another relay's. False: it is malformed."""
        if self.reporter.is_own(text):
            return True
        found = read_events(text)
        if found is None:
            return False
        for server_id, record in found:
            self._cache.know(server_id, record)
            tell_cleared(self.leases, self.reporter, server_id, record)
        return True

    async def close(self) -> None:
        """Release what this relay still holds, as far as the store answers within two seconds; not what the store keeps."""
        for hold in self.leases.holds():
            self.release(hold)
        with trio.move_on_after(2.0):
            await self.upkeep.release_all()

    async def _granted(
        self,
        server_id: RelayId,
        user: str,
        terms: LeaseTerms,
        attempt: Attempt,
        ask: RecordUpdate[Granted | Rejected],
        known_as: str = "",
    ) -> Hold | NotEntered:
        silence = await self._silence()
        if silence is not None:
            return self._without_store(server_id, user, attempt, silence)
        began = self.leases.now
        with self._unseen(server_id, user, attempt, terms.lifetime_ms, known_as) as outcomes:
            outcomes.append(await self._cache.do_soon(ask))
        (outcome,) = outcomes
        if isinstance(outcome, StoreError):
            return self._without_store(server_id, user, attempt, outcome)
        granted, written = outcome
        self._cache.learn(server_id, written)
        if isinstance(granted, Rejected):
            return self._refused(server_id, user, attempt, granted)
        hold = Hold(server_id, user, attempt.after(AttemptEvent.GRANT), terms, granted.token, granted.record.since_ms, began)
        hold.known_as, hold.ends_ms = known_as, self._view.now_ms + terms.lifetime_ms
        self.leases.was_granted(hold.login_id)
        self.leases.add(hold)
        self.reporter.happened(COMMITTED, server_id, user, hold.login_id, granted.record)
        return hold

    async def _do(self, ask: RecordUpdate[T]) -> tuple[T, Written] | StoreError:
        """Take a step for a client that waits, and that can be told if the store is away."""
        silence = await self._silence()
        return silence if silence is not None else await self._cache.do_soon(ask)

    async def _silence(self) -> StoreError | None:
        silence = self._cache.silence()
        if silence is not None:
            await trio.lowlevel.checkpoint()
        return silence

    @contextmanager
    def _unseen(
        self, server_id: RelayId, user: str, attempt: Attempt, lifetime_ms: int, known_as: str = ""
    ) -> Iterator[list[tuple[Any, Written] | StoreError]]:
        """Around a step of the store's, whose outcome goes into the list. If none is seen, it may have been done all the same, and nobody
        will use it: it is undone.
        """
        outcomes: list[tuple[Any, Written] | StoreError] = []
        try:
            yield outcomes
        finally:
            if not (outcomes and isinstance(outcomes[0], tuple)):
                ghost = self._ghost(server_id, user, attempt, lifetime_ms)
                ghost.known_as, ghost.not_before = known_as, self.leases.now + CALL_S
                self.leases.end(ghost)

    def _ghost(self, server_id: RelayId, user: str, attempt: Attempt, lifetime_ms: int) -> Hold:
        hold = Hold(server_id, user, attempt, LeaseTerms(lifetime_ms=lifetime_ms), Record().token, 0, self.leases.now)
        hold.ends_ms = self._view.now_ms + lifetime_ms
        return hold

    def _without_store(self, server_id: RelayId, user: str, attempt: Attempt, exc: StoreError) -> NotEntered:
        self.reporter.rejected(server_id, user, attempt.attempt_id, NO_STORE)
        text = "reserved servers cannot be given out while the cluster's store does not answer"
        logger.warning("%s: %s", text, exc)
        return NotEntered(NO_STORE, text, True, attempt)

    def _refused(self, server_id: RelayId, user: str, attempt: Attempt, rejected: Rejected) -> NotEntered:
        self.reporter.rejected(server_id, user, attempt.attempt_id, rejected.reason)
        is_final = rejected.reason in (Reason.UNSETTLED, Reason.STALE)
        return NotEntered(rejected.reason, refusal_text(rejected.reason), is_final, attempt, rejected.holder)


def new_id() -> str:
    """An id for a login or an entry."""
    return secrets.token_hex(12)
