"""Task: reservations as this relay takes part in them: enter, commit, keep, release; and what the other relays have.

Every call to the store is made in a worker thread and has a deadline. While the store does not answer nobody is let in; who is in stays.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeVar

import trio

from fxrelay.balance.holders import Holders
from fxrelay.balance.login_attempt import Attempt, Happening
from fxrelay.balance.reservations import Granted, OwnerRelogin, Reason, Record, Rejected
from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.kept import adopt_kept, find_login, hold_of, learn_kept, tell_cleared
from fxrelay.reserving.leases import Hold, Leases, Terms
from fxrelay.reserving.ledger import Ledger, Written
from fxrelay.reserving.tidings import COMMITTED, ENTERED, EXPIRED, LOST, REASSERTED, RELEASED, Tidings, read_tidings, refusal_text
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId, is_name

logger = logging.getLogger(__name__)
T = TypeVar("T")

CALL_S: Final = 4.0
"""For one call to the store, its own deadlines and the wait for a thread included."""
NO_STORE: Final = "no-store"
AT_ONCE: Final = 6
"""Renewals and releases at once: as many as there are threads."""
SLICE: Final = 64
OVERDUE: Final = 0.9


@dataclass(frozen=True, slots=True)
class ReservingConfig:
    """`lease_s` must be the same at all relays. `on_lost_lease`: what to do with logins that could not be renewed for so long."""

    relay_id: RelayId
    lease_s: float = 15.0
    on_lost_lease: Literal["keep", "end"] = "keep"


@dataclass(frozen=True, slots=True)
class Refused:
    """A login is not let in. `reason` is one of `Reason`, or NO_STORE; `is_final`: no other server would let it in now.

    `text` may be shown to whoever wanted in; `holder`, who has the server if that is the reason, may not.
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
        self.holders = Holders()
        self.leases = Leases()
        self._threads = Threads()
        self.tidings = Tidings(transporter, self._threads)
        self.changed = trio.Event()
        """Set when who has which server may have changed; made anew each time."""
        self.has_sessions: Callable[[RelayId, str], bool] = lambda server_id, user: False
        """Whether a user has sessions on a server, for `Terms.hold_while_sessions`."""
        self.last_error = ""
        self.has_read = False
        """Whether all records have been read once."""
        self._config = config
        self._store = store
        self._view = view
        self._ledger = Ledger(store, config.relay_id, config.lease_s)
        view.hear_reservation = self.hear

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is held and follow the others until cancelled. Logins that are held then are left to their leases; see `close`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.tidings.run)
            nursery.start_soon(self._keep_releasing)
            await nursery.start(self._keep_renewing)
            nursery.start_soon(self._keep_reading)
            if self._config.on_lost_lease == "end":
                nursery.start_soon(self._end_overdue)
            task_status.started()

    async def enter(self, server_id: RelayId, user: str, address: str, attempt_id: str = "") -> Entered | Refused:
        """Step 2: a login begins to be authenticated on a server; with the id of an earlier one, it goes on (step 4)."""
        attempt = Attempt(attempt_id or new_id())
        outcome = await self._ask(lambda: self._ledger.enter(server_id, attempt.attempt_id, user, address))
        if isinstance(outcome, StoreError):
            return self._without_store(server_id, user, attempt, outcome)
        entered, written = outcome
        self._learn(server_id, written)
        if isinstance(entered, Rejected):
            return self._refused(server_id, user, attempt, entered)
        if not attempt_id:
            self.tidings.happened(ENTERED, server_id, user, attempt.attempt_id)
        return Entered(server_id, attempt.after(Happening.ENTER))

    async def go_on(self, entered: Entered, user: str) -> Entered | Refused:
        """Step 4: one more request of a login whose entry must still be there."""
        server_id, attempt = entered.server_id, entered.attempt
        outcome = await self._ask(lambda: self._ledger.go_on(server_id, attempt.attempt_id))
        if isinstance(outcome, StoreError):
            return self._without_store(server_id, user, attempt, outcome)
        gone_on, written = outcome
        self._learn(server_id, written)
        if isinstance(gone_on, Rejected):
            return self._refused(server_id, user, attempt, gone_on)
        return Entered(server_id, attempt.after(Happening.REQUEST))

    async def commit(
        self, entered: Entered, user: str, terms: Terms, relogin: OwnerRelogin = OwnerRelogin.PREFER, known_as: str = ""
    ) -> Hold | Refused:
        """Step 5: let an authenticated login in, or not. `user` is who it has proved to be. The attempt must be AUTHENTICATED.

        `known_as` is the id of the login, where it is not the attempt's.
        """
        server_id, attempt = entered.server_id, entered.attempt
        entry_id, login_id = attempt.attempt_id, known_as or attempt.attempt_id
        return await self._granted(
            server_id,
            user,
            terms,
            attempt,
            lambda: self._ledger.commit(server_id, entry_id, login_id, user, relogin, terms.lifetime_ms),
            known_as,
        )

    async def take(
        self, server_id: RelayId, user: str, address: str, terms: Terms, relogin: OwnerRelogin = OwnerRelogin.PREFER
    ) -> Hold | Refused:
        """All steps at once, for a login that is made by coming in: a stream of a TCP service."""
        attempt = Attempt(new_id())
        for happening in (Happening.ENTER, Happening.FORWARD, Happening.SUCCESS):
            attempt = attempt.after(happening)
        self.tidings.happened(ENTERED, server_id, user, attempt.attempt_id)
        return await self._granted(
            server_id, user, terms, attempt, lambda: self._ledger.take(server_id, attempt.attempt_id, user, address, relogin)
        )

    async def reject(self, entered: Entered, why: Happening) -> None:
        """The login failed, or nobody waits for it any more: its entry is taken out. What cannot be taken out expires."""
        entered.attempt.after(why)
        outcome = await self._ask(lambda: self._ledger.abandon(entered.server_id, entered.attempt.attempt_id))
        if not isinstance(outcome, StoreError):
            self._learn(entered.server_id, outcome)

    def release(self, hold: Hold) -> None:
        """Step 7: the login has ended. Never waits; may be repeated."""
        self.leases.end(hold)

    def end_login(self, server_id: RelayId, login_id: str, terms: Terms) -> None:
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
        outcome = await self._ask(lambda: self._ledger.extend(server_id, login_id, ttl_ms))
        if not isinstance(outcome, StoreError):
            self._learn(server_id, outcome)

    async def look_at(self, server_id: RelayId) -> bool:
        """Read a server's record now. False: the store does not answer."""
        outcome = await self._ask(lambda: self._ledger.sweep(server_id))
        if isinstance(outcome, StoreError):
            return False
        self._learn(server_id, outcome)
        return True

    def hear(self, text: str) -> bool:
        """A message of another relay's. False: it is malformed."""
        found = read_tidings(text)
        if found is None:
            return False
        self._know(*found)
        tell_cleared(self.leases, self.tidings, *found)
        return True

    async def close(self) -> None:
        """Release what this relay still holds, as far as the store answers within two seconds; not what the store keeps."""
        for hold in self.leases.holds():
            self.release(hold)
        with trio.move_on_after(2.0):
            await self._release_all()

    async def _granted(
        self,
        server_id: RelayId,
        user: str,
        terms: Terms,
        attempt: Attempt,
        call: Callable[[], tuple[Granted | Rejected, Written]],
        known_as: str = "",
    ) -> Hold | Refused:
        began = self.leases.now
        hold: Hold | None = None
        outcome: tuple[Granted | Rejected, Written] | StoreError | None = None
        try:
            outcome = await self._ask(call)
        finally:
            if not isinstance(outcome, tuple):
                # It may have been let in all the same, and nobody will use it.
                unseen = Terms(lifetime_ms=terms.lifetime_ms)
                ghost = Hold(server_id, user, attempt, unseen, Record().token, 0, began, not_before=self.leases.now + CALL_S)
                ghost.known_as, ghost.ends_ms = known_as, self._view.now_ms + terms.lifetime_ms
                self.leases.end(ghost)
        if isinstance(outcome, StoreError):
            return self._without_store(server_id, user, attempt, outcome)
        granted, written = outcome
        self._learn(server_id, written)
        if isinstance(granted, Rejected):
            return self._refused(server_id, user, attempt, granted)
        hold = Hold(server_id, user, attempt.after(Happening.GRANT), terms, granted.token, granted.record.since_ms, began)
        hold.known_as, hold.ends_ms = known_as, self._view.now_ms + terms.lifetime_ms
        self.leases.add(hold)
        self.tidings.happened(COMMITTED, server_id, user, hold.login_id, granted.record)
        return hold

    async def _ask(self, call: Callable[[], T]) -> T | StoreError:
        """What `call` returns in a thread, or why there is no answer."""
        try:
            with trio.move_on_after(CALL_S):
                result = await self._threads.run(call)
                self.last_error = ""
                return result
        except StoreError as exc:
            self.last_error = str(exc)
            return exc
        self.last_error = f"no answer within {CALL_S:g} s"
        return StoreError(self.last_error)

    def _without_store(self, server_id: RelayId, user: str, attempt: Attempt, exc: StoreError) -> Refused:
        self.tidings.rejected(server_id, user, attempt.attempt_id, NO_STORE)
        text = "reserved servers cannot be given out while the cluster's store does not answer"
        logger.warning("%s: %s", text, exc)
        return Refused(NO_STORE, text, True, attempt)

    def _refused(self, server_id: RelayId, user: str, attempt: Attempt, rejected: Rejected) -> Refused:
        self.tidings.rejected(server_id, user, attempt.attempt_id, rejected.reason)
        is_final = rejected.reason in (Reason.UNSETTLED, Reason.STALE)
        return Refused(rejected.reason, refusal_text(rejected.reason), is_final, attempt, rejected.holder)

    async def _keep_renewing(self, *, task_status: trio.TaskStatus[None]) -> None:
        # Five times a lease: after an outage that nobody notices, every holder is back before his lease is over (settling.py).
        every_s = self._config.lease_s / 5
        is_started = False
        while True:
            looked = await self._ask(self._ledger.look)
            if not is_started:
                is_started = True
                task_status.started()
            if isinstance(looked, StoreError):
                await trio.sleep(every_s / 3)
                continue
            began = trio.current_time()
            limiter = trio.CapacityLimiter(AT_ONCE)
            async with trio.open_nursery() as nursery:
                for hold in self.leases.holds() + self._forgotten():
                    nursery.start_soon(self._renew, hold, limiter)
            await trio.sleep(max(every_s / 3, every_s - (trio.current_time() - began)))

    def _forgotten(self) -> list[Hold]:
        """Logins that the store kept, before it forgot."""
        return [hold for hold in self.leases.kept() if hold.token.epoch != self._ledger.epoch and hold.ends_ms > self._view.now_ms]

    async def _renew(self, hold: Hold, limiter: trio.CapacityLimiter) -> None:
        async with limiter, hold.lock:
            if hold.is_ending or hold.is_lost:
                return
            began = self.leases.now
            ttl_ms = max(1, hold.ends_ms - self._view.now_ms) if hold.is_kept else 0
            outcome = await self._ask(
                lambda: self._ledger.renew(hold.server_id, hold.login_id, hold.user, hold.token, hold.since_ms, ttl_ms)
            )
            if isinstance(outcome, StoreError):
                return
            granted, written = outcome
            self._learn(hold.server_id, written)
            if isinstance(granted, Granted):
                if granted.token.epoch != hold.token.epoch:
                    self.tidings.happened(REASSERTED, hold.server_id, hold.user, hold.login_id, granted.record)
                hold.token, hold.confirmed_at = granted.token, began
            else:
                self._lose(hold, f"it was given to {granted.holder or 'somebody else'} since")

    async def _end_overdue(self) -> None:
        """Give up what could not be renewed, a little before anybody else can be let in."""
        while True:
            for hold in self.leases.holds():
                if self.leases.now - hold.confirmed_at > OVERDUE * self._config.lease_s:
                    self._lose(hold, "it could not be renewed in time")
            await trio.sleep(self._config.lease_s / 50)

    def _lose(self, hold: Hold, why: str) -> None:
        if not (hold.is_lost or hold.is_ending):
            logger.warning("%s is lost to %s: %s", hold.server_id, hold.user, why)
            self.tidings.happened(LOST, hold.server_id, hold.user, hold.login_id)
            self.leases.lose(hold)

    async def _keep_releasing(self) -> None:
        while True:
            if not self.leases.has_ending:
                self.leases.something_ends = trio.Event()
                await self.leases.something_ends.wait()
            await self._release_all()
            if self.leases.has_ending:
                await trio.sleep(0.1 if not self.last_error else 1.0)

    async def _release_all(self) -> None:
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for hold in self.leases.ending():
                nursery.start_soon(self._release, hold, limiter)

    async def _release(self, hold: Hold, limiter: trio.CapacityLimiter) -> None:
        async with limiter, hold.lock:
            if hold.terms.hold_while_sessions and self.has_sessions(hold.server_id, hold.user):
                hold.not_before = self.leases.now + self._config.lease_s / 5
                await self._ask(lambda: self._ledger.renew(hold.server_id, hold.login_id, hold.user, hold.token, hold.since_ms))
                return
            outcome = await self._ask(lambda: self._ledger.release(hold.server_id, hold.login_id, hold.terms.linger_ms))
            if isinstance(outcome, StoreError):
                is_long_ago = self.leases.now - hold.confirmed_at > 2 * self._config.lease_s
                if hold.ends_ms <= self._view.now_ms if hold.is_kept else is_long_ago:
                    self.leases.ended(hold)  # by its lease, or by its time
                return
            self.leases.ended(hold)
            self._learn(hold.server_id, outcome)
            if hold.token.fence:
                self.tidings.happened(RELEASED, hold.server_id, hold.user, hold.login_id, outcome.record)

    async def _keep_reading(self) -> None:
        """What was not heard, and what expired."""
        while True:
            found = await self._ask(lambda: list(self._ledger.records()))
            if not isinstance(found, StoreError):
                for start in range(0, len(found), SLICE):
                    for server_id, record in found[start : start + SLICE]:
                        if is_name(server_id):
                            self._know(RelayId(server_id), record)
                            adopt_kept(self.leases, self._config.relay_id, RelayId(server_id), record, self._ledger.lease_ms)
                    await trio.lowlevel.checkpoint()
                self.holders.forget_unless(frozenset(server_id for server_id, _ in found))
                records = {server_id: standing.record for server_id, standing in self.holders.standings().items()}
                learn_kept(self.leases, self.tidings, records, self._view.now_ms)
                self.has_read = True
                await self._sweep()
            await trio.sleep(self._config.lease_s / 3)

    async def _sweep(self) -> None:
        now_ms = self._view.now_ms
        for server_id, standing in list(self.holders.standings().items()):
            if any(login.expires_ms < now_ms for login in standing.record.logins):
                outcome = await self._ask(lambda server_id=server_id: self._ledger.sweep(server_id))  # type: ignore[misc]
                if isinstance(outcome, StoreError):
                    return
                self._learn(server_id, outcome)

    def _learn(self, server_id: RelayId, written: Written) -> None:
        """What this relay has just read or written itself."""
        for login in written.expired:
            self.tidings.happened(EXPIRED, server_id, login.user, login.login_id, written.record)
        if self._know(server_id, written.record):
            self.tidings.publish(server_id, written.record)

    def _know(self, server_id: RelayId, record: Record) -> bool:
        is_news = self.holders.learn(server_id, record)
        if is_news:
            changed, self.changed = self.changed, trio.Event()
            changed.set()
        return is_news


def new_id() -> str:
    """An id for a login or an entry."""
    return secrets.token_hex(12)
