"""Task: background work for reservations: leases are renewed, ended logins taken out of the store, records read and swept."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from fxrelay.balance.reservations import Granted, Record, Rejected
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.event_reporter import LOST, REASSERTED, RELEASED
from fxrelay.reserving.kept import adopt_kept, learn_kept
from fxrelay.reserving.leases import Hold, Leases
from fxrelay.reserving.ledger import Written
from fxrelay.reserving.record_updates import RecordUpdate
from fxrelay.reserving.reservation_cache import AT_ONCE, ReservationCache
from fxtunnel.errors import StoreError
from fxtunnel.kit.process import keep_going
from fxtunnel.model import RelayId, is_name

logger = logging.getLogger(__name__)

SLICE: Final = 64
OVERDUE: Final = 0.9


class Upkeep:
    """The leases of this relay's logins, and what the others have. `run` it once."""

    def __init__(self, cache: ReservationCache, leases: Leases, view: ClusterView) -> None:
        self.may_have_sessions: Callable[[RelayId, str, int], bool] = lambda server_id, user, since_ms: False
        """Whether a user has sessions on a server, or has not told since (the store's clock): for `LeaseTerms.hold_while_sessions`."""
        self.has_read = False
        """Whether all records have been read once."""
        self._cache = cache
        self._leases = leases
        self._view = view

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; started when the store has been looked at, or has not answered."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, "giving servers back", self._keep_releasing)
            looked = trio.Event()
            nursery.start_soon(keep_going, "renewing reservations", partial(self._keep_renewing, looked))
            await looked.wait()
            nursery.start_soon(keep_going, "reading reservations", self._keep_reading)
            if self._cache.config.on_lost_lease == "end":
                nursery.start_soon(keep_going, "ending overdue reservations", self._end_overdue)
            task_status.started()

    async def _keep_renewing(self, has_looked: trio.Event) -> None:
        # Five times per lease: after an outage too short to be noticed, every holder renews before its lease is over (settling.py).
        every_s = self._cache.config.lease_s / 5
        warned_of = doubt = ""
        while True:
            try:
                looked = await self._cache.look()
            finally:
                has_looked.set()
            if isinstance(looked, StoreError):
                await trio.sleep(every_s / 3)
                continue
            if looked.mark.epoch != warned_of and looked.settles_in_ms(looked.seen_ms):
                warned_of = looked.mark.epoch
                logger.warning(
                    "the store is new, or has forgotten who has which server: none is given out for %.1f s",
                    looked.settles_in_ms(looked.seen_ms) / 1000,
                )
            doubt, doubted = self._cache.ledger.doubt, doubt
            if doubt and doubt != doubted:
                logger.warning("%s", doubt)
            began = trio.current_time()
            limiter = trio.CapacityLimiter(AT_ONCE)
            async with trio.open_nursery() as nursery:
                for hold in self._leases.holds() + self._forgotten():
                    nursery.start_soon(self._renew, hold, limiter)
            await trio.sleep(max(every_s / 3, every_s - (trio.current_time() - began)))

    def _forgotten(self) -> list[Hold]:
        """Logins that the store kept, before it forgot."""
        return [hold for hold in self._leases.kept() if hold.token.epoch != self._cache.ledger.epoch and hold.ends_ms > self._view.now_ms]

    async def _renew(self, hold: Hold, limiter: trio.CapacityLimiter) -> None:
        async with limiter, hold.lock:
            if hold.is_ending or hold.is_lost:
                return
            began = self._leases.now
            ttl_ms = max(1, hold.ends_ms - self._view.now_ms) if hold.is_kept else 0
            outcome = await self._cache.do(self._renewing(hold, ttl_ms))
            if isinstance(outcome, StoreError):
                return
            granted, written = outcome
            self._cache.learn(hold.server_id, written)
            if isinstance(granted, Granted):
                if granted.token.epoch != hold.token.epoch:
                    self._cache.reporter.happened(REASSERTED, hold.server_id, hold.user, hold.login_id, granted.record)
                hold.token, hold.confirmed_at = granted.token, began
            else:
                self._lose(hold, f"it was given to {granted.holder or 'somebody else'} since")

    async def _end_overdue(self) -> None:
        """Give up logins that could not be renewed, a little before anybody else can be let in."""
        while True:
            for hold in self._leases.holds():
                if self._leases.now - hold.confirmed_at > OVERDUE * self._cache.config.lease_s:
                    self._lose(hold, "it could not be renewed in time")
            await trio.sleep(self._cache.config.lease_s / 50)

    def _lose(self, hold: Hold, why: str) -> None:
        if not (hold.is_lost or hold.is_ending):
            logger.warning("%s is lost to %s: %s", hold.server_id, hold.user, why)
            self._cache.reporter.happened(LOST, hold.server_id, hold.user, hold.login_id)
            self._leases.lose(hold)

    async def _keep_releasing(self) -> None:
        while True:
            if not self._leases.has_ending:
                await self._leases.something_ends.wait()
            self._leases.something_ends = trio.Event()
            await self.release_all()
            if self._leases.has_ending and self._cache.last_error:
                await trio.sleep(1.0)
            elif self._leases.has_ending:
                # What has ended meanwhile is told at once; what could not be told, or may not be yet, is tried again.
                with trio.move_on_after(0.1):
                    await self._leases.something_ends.wait()

    async def release_all(self) -> None:
        """Tell the store of every login that has ended, once."""
        ending = self._leases.ending()
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for start in range(0, len(ending), AT_ONCE):
                # Looked at when its turn comes: a renewal that was under way when the login ended may have begun to hold it meanwhile.
                some = ending[start : start + AT_ONCE]
                at_once = [hold for hold in some if not (hold.lock.locked() or hold.terms.hold_while_sessions)]
                for hold in set(some).difference(at_once):
                    nursery.start_soon(self._release, hold, limiter)
                if at_once:
                    await self._release_together(at_once)

    async def _release_together(self, holds: list[Hold]) -> None:
        """Holds that nobody is renewing. One task does for all: they are many."""
        for hold in holds:
            hold.lock.acquire_nowait()
        try:
            outcomes = await self._cache.do_all([self._releasing(hold) for hold in holds])
        finally:
            for hold in holds:
                hold.lock.release()
        for hold, outcome in zip(holds, outcomes, strict=True):
            self._released(hold, outcome)

    async def _release(self, hold: Hold, limiter: trio.CapacityLimiter) -> None:
        async with limiter, hold.lock:
            if hold.terms.hold_while_sessions:
                hold.ended_ms = hold.ended_ms or self._view.now_ms
                if self.may_have_sessions(hold.server_id, hold.user, hold.ended_ms):
                    await self._put_off(hold)
                    return
            self._released(hold, await self._cache.do(self._releasing(hold)))

    async def _put_off(self, hold: Hold) -> None:
        """His sessions keep the server. This is written down, so that other relays see to it should this one go (`_keep_for_sessions`)."""
        hold.not_before = self._leases.now + self._cache.config.lease_s / 5
        if hold.token.epoch != self._cache.ledger.epoch:  # the store has forgotten
            again = await self._cache.do(self._renewing(hold, 0))
            if not isinstance(again, StoreError) and isinstance(again[0], Granted):
                hold.token = again[0].token
        outcome = await self._cache.do(self._cache.updates.put_off(hold.server_id, hold.login_id, hold.user))
        if isinstance(outcome, StoreError):
            return
        record, written = outcome
        if all(login.login_id != hold.login_id for login in record.logins):  # another one of his is there for it, or an administrator was
            self._released(hold, outcome)
        else:
            self._cache.learn(hold.server_id, written)

    def _renewing(self, hold: Hold, ttl_ms: int) -> RecordUpdate[Granted | Rejected]:
        is_for_sessions = hold.terms.hold_while_sessions and not ttl_ms
        return self._cache.updates.renew(hold.server_id, hold.login_id, hold.user, hold.token, hold.since_ms, ttl_ms, is_for_sessions)

    def _releasing(self, hold: Hold) -> RecordUpdate[Record]:
        if hold.is_unseen:
            return self._cache.updates.give_up(hold.server_id, hold.attempt.attempt_id, hold.login_id, hold.user)
        return self._cache.updates.release(hold.server_id, hold.login_id, hold.user, hold.terms.linger_ms)

    def _released(self, hold: Hold, outcome: tuple[Record, Written] | Exception) -> None:
        if isinstance(outcome, StoreError):
            is_long_ago = self._leases.now - hold.confirmed_at > 2 * self._cache.config.lease_s
            if hold.ends_ms <= self._view.now_ms if hold.is_kept else is_long_ago:
                self._leases.ended(hold)  # by its lease, or by its time
            return
        if isinstance(outcome, Exception):
            raise outcome
        _, written = outcome
        self._leases.ended(hold)
        self._cache.learn(hold.server_id, written)
        if not hold.is_unseen:
            self._cache.reporter.happened(RELEASED, hold.server_id, hold.user, hold.login_id, written.record)

    async def _keep_reading(self) -> None:
        """What was not heard, and what expired."""
        while True:
            known = frozenset(self._cache.holders.standings())
            found = await self._cache.ask(lambda: list(self._cache.ledger.records()))
            if not isinstance(found, StoreError) and not known <= {server_id for server_id, _ in found}:
                # Before anybody sees that they are gone: has the store forgotten them?
                looked = await self._cache.look()
                found = looked if isinstance(looked, StoreError) else found
            if not isinstance(found, StoreError):
                for start in range(0, len(found), SLICE):
                    for server_id, record in found[start : start + SLICE]:
                        if is_name(server_id):
                            self._cache.know(RelayId(server_id), record)
                            adopt_kept(self._leases, self._cache.config.relay_id, RelayId(server_id), record, self._cache.ledger.lease_ms)
                    await trio.lowlevel.checkpoint()
                # What was learned while it was read may not have been there yet.
                self._cache.holders.forget(known - {server_id for server_id, _ in found})
                records = {server_id: standing.record for server_id, standing in self._cache.holders.standings().items()}
                learn_kept(self._leases, self._cache.reporter, records, self._view.now_ms)
                self.has_read = True
                await self._keep_for_sessions()
                await self._sweep()
            await trio.sleep(self._cache.config.lease_s / 3)

    async def _keep_for_sessions(self) -> None:
        """Keep servers for users who still have sessions there, if the relay that let them in is gone."""
        soon_ms = self._view.now_ms + self._cache.ledger.lease_ms // 2  # a relay that lives has renewed before that
        for server_id, standing in list(self._cache.holders.standings().items()):
            for login in standing.record.logins:
                is_ours = self._leases.is_ending(login.login_id) or self._leases.get(login.login_id) is not None
                if is_ours or not login.is_for_sessions or login.expires_ms > soon_ms:
                    continue
                if self.may_have_sessions(server_id, login.user, login.expires_ms - login.ttl_ms):
                    outcome = await self._cache.do(self._cache.updates.put_off(server_id, login.login_id, login.user))
                    if isinstance(outcome, StoreError):
                        return
                    self._cache.learn(server_id, outcome[1])

    async def _sweep(self) -> None:
        now_ms = self._view.now_ms
        standings = self._cache.holders.standings()
        over = {
            (server_id, standing.record.holder)
            for server_id, standing in standings.items()
            if any(login.expires_ms < now_ms for login in standing.record.logins)
        }
        untidied, self._cache.untidied = self._cache.untidied, set()
        for server_id, user in over | untidied:
            outcome = await self._cache.do(self._cache.updates.sweep(server_id, user))
            if isinstance(outcome, StoreError):
                return
            self._cache.learn(server_id, outcome[1])
