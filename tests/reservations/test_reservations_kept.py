"""Logins that the store keeps: they outlive the relay that committed them, any relay ends them, and nobody brings them back."""

import sqlite3
from pathlib import Path

from fxrelay.balance import reservations as rule
from fxrelay.balance.holders import Holders
from fxrelay.balance.reservations import ENTRY_TTL_MS, Login, Moment, Reason, Record, Rejected
from fxrelay.reserving.kept import is_kept
from fxrelay.reserving.leases import Hold, LeaseTerms
from fxrelay.reserving.ledger import Ledger
from fxrelay.reserving.reservations import Entered, NotEntered
from fxtunnel.model import RelayId
from tests.reservations.test_reservations_service import LEASE_S, S1, S2, Relay, proved, relays, until

KEPT = LeaseTerms(lifetime_ms=60_000)
NOW = 1_000_000_000
ANOTHER = "ab" * 16


def at(now_ms: int = NOW, number: int = 1) -> Moment:
    return Moment(now_ms, "e", number, now_ms)


async def logged_in(relay: Relay, server: RelayId, user: str, known_as: str = "t1", terms: LeaseTerms = KEPT) -> Hold:
    entered = await relay.reservations.enter(server, user, "192.0.2.1")
    hold = await relay.reservations.commit(proved(entered), user, terms, known_as=known_as)
    assert isinstance(hold, Hold), hold
    return hold


async def test_a_login_outlives_its_relay_and_ends_at_any_other(tmp_path: Path) -> None:
    async with relays(tmp_path, "a") as (first,):
        await logged_in(first, S1, "ann")
        await first.reservations.close()
    async with relays(tmp_path, "b", "a") as (second, again):
        await until(lambda: second.reservations.upkeep.has_read and again.reservations.upkeep.has_read)
        assert second.reservations.holders.server_of("t1", second.store.now_ms()) == S1
        await until(lambda: [hold.login_id for hold in again.reservations.leases.kept()] == ["t1"])  # it remembers what it committed
        assert not second.reservations.leases.kept()
        second.reservations.end_login(S1, "t1", LeaseTerms())
        await until(lambda: not again.reservations.holders.users(0).get(S1))
        await until(lambda: not again.reservations.leases.kept())
        assert (await second.taken(S1, "bob")).user == "bob"


async def test_what_an_administrator_takes_away_is_told_by_the_relay_that_let_it_in(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        await logged_in(first, S1, "ann")
        await logged_in(first, S2, "bob", "t2")
        await until(lambda: second.reservations.holders.server_of("t2", 0) == S2)
        second.reservations.end_login(S2, "t2", LeaseTerms())
        await until(lambda: second.reservations.reporter.counts["released"] == 1)
        before = first.reservations.reporter.counts["released"]
        Ledger(second.store, RelayId("admin"), LEASE_S).clear(S1)
        await until(lambda: not first.reservations.leases.kept())
        # The logout was told by the relay that it came to.
        assert first.reservations.reporter.counts["released"] == before + 1
        assert second.reservations.reporter.counts["released"] == 1


async def test_a_login_of_which_a_relay_lost_the_answer_does_not_stay(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        entered = await first.reservations.enter(S1, "ann", "192.0.2.1")
        first.store.loses_answers = True
        refused = await first.reservations.commit(proved(entered), "ann", KEPT, known_as="t1")
        assert isinstance(refused, NotEntered)
        assert isinstance(await second.reservations.take(S1, "bob", "192.0.2.2", LeaseTerms()), NotEntered)
        first.store.loses_answers = False
        await second.taken(S1, "bob")


async def test_a_store_that_forgot_is_told_of_logins_again(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        hold = await logged_in(first, S1, "ann")
        with sqlite3.connect(tmp_path / "cluster.db", timeout=10) as database:
            database.execute(f"UPDATE facts SET value = '{ANOTHER}' WHERE name = 'epoch'")
        database.close()
        await until(lambda: hold.token.epoch == ANOTHER)
        refused = await second.reservations.take(S1, "bob", "192.0.2.2", LeaseTerms())
        assert isinstance(refused, NotEntered)
        await second.taken(S2, "bob")  # it has settled
        refused = await second.reservations.take(S1, "bob", "192.0.2.2", LeaseTerms())
        assert isinstance(refused, NotEntered)
        assert refused.reason == Reason.RESERVED
        record = second.reservations.holders.standings()[S1].record
        assert is_kept(record.logins[0], int(LEASE_S * 1000))


async def test_a_login_lasts_as_long_as_it_is_used(tmp_path: Path) -> None:
    async with relays(tmp_path, "a") as (relay,):
        await logged_in(relay, S1, "ann", terms=LeaseTerms(lifetime_ms=1_500))
        await relay.reservations.extend(S1, "t1", 60_000)
        login = relay.reservations.holders.standings()[S1].record.logins[0]
        assert login.expires_ms - relay.store.now_ms() > 50_000
        relay.reservations.end_login(S1, "t1", LeaseTerms())
        await until(lambda: not relay.reservations.holders.users(0).get(S1))
        await relay.reservations.extend(S1, "t1", 60_000)
        assert not relay.reservations.holders.users(0).get(S1)
        await logged_in(relay, S1, "bob", "t2", LeaseTerms(lifetime_ms=1_200))
        await relay.taken(S1, "ann")  # it expired


async def test_a_login_under_way_does_not_go_on_without_its_entry(tmp_path: Path) -> None:
    async with relays(tmp_path, "a") as (relay,):
        entered = await relay.reservations.enter(S1, "ann", "192.0.2.1")
        assert isinstance(entered, Entered)
        waiting = Entered(S1, proved(entered).attempt)
        rival = await relay.taken(S1, "bob")
        refused = await relay.reservations.go_on(waiting, "ann")
        assert isinstance(refused, NotEntered)
        assert refused.reason == Reason.RESERVED
        relay.reservations.release(rival)
        await until(lambda: not relay.reservations.holders.users(0).get(S1))
        refused = await relay.reservations.go_on(waiting, "ann")
        assert isinstance(refused, NotEntered)
        assert refused.reason == Reason.NO_ENTRY


def test_going_on_keeps_the_entry_and_brings_none_back() -> None:
    record = rule.enter(Record(), "x", "ann", "192.0.2.1", "r", at())
    assert isinstance(record, Record)
    later = rule.go_on(record, "x", at(NOW + ENTRY_TTL_MS - 1))
    assert isinstance(later, Record)
    assert later.entries[0].expires_ms == NOW + 2 * ENTRY_TTL_MS - 1
    too_late = rule.go_on(record, "x", at(NOW + ENTRY_TTL_MS))
    assert isinstance(too_late, Rejected)
    assert too_late.reason is Reason.NO_ENTRY
    assert isinstance(rule.go_on(later, "y", at()), Rejected)


def test_logins_are_found_by_their_ids() -> None:
    holders = Holders()
    ann, bob = Login("a", "ann", "r", 1_000, 1_000), Login("b", "bob", "r", 1_000, 1_000)
    holders.learn(S1, Record("e", 1, 0, (ann,), revision=1))
    holders.learn(S2, Record("e", 1, 0, (bob,), revision=1))
    assert [holders.server_of(name, 500) for name in ("a", "b", "c")] == [S1, S2, None]
    assert holders.server_of("a", 1_000) is None
    holders.learn(S1, Record("e", 1, 0, (), revision=2))
    assert holders.server_of("a", 500) is None
    holders.forget({S2})
    assert holders.server_of("b", 500) is None
