"""Logins that came to nothing while the store did not answer, or whose answer nobody heard: neither login nor entry stays."""

import threading
from pathlib import Path

import pytest
import trio

from fxrelay.reserving.leases import Hold, LeaseTerms
from fxrelay.reserving.ledger import Ledger
from fxrelay.reserving.reservation_cache import LANES, _Waiting
from fxrelay.reserving.reservations import NO_STORE, NotEntered
from fxtunnel.model import RelayId
from tests.reservations.test_reservations_kept import KEPT
from tests.reservations.test_reservations_service import LEASE_S, S1, Relay, proved, relays, until


@pytest.mark.parametrize("known_as", ["", "the-token"])
async def test_an_entry_whose_commit_cannot_be_asked_for_is_taken_out_when_the_store_is_back(tmp_path: Path, known_as: str) -> None:
    async with relays(tmp_path, "a") as (relay,):
        entered = proved(await relay.reservations.enter(S1, "ann", "192.0.2.1"))
        relay.store.is_cut = True
        refused = await relay.reservations.commit(entered, "ann", KEPT, known_as=known_as)
        assert isinstance(refused, NotEntered)
        assert refused.reason == NO_STORE
        relay.store.is_cut = False
        await until(lambda: not in_store(relay))


@pytest.mark.parametrize("known_as", ["", "the-token"])
async def test_a_commit_that_nobody_waits_for_any_more_leaves_neither_login_nor_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_as: str
) -> None:
    monkeypatch.setattr("fxrelay.reserving.reservations.CALL_S", 1.0)
    async with relays(tmp_path, "a") as (relay,):
        for is_sent in (False, True):
            entered = proved(await relay.reservations.enter(S1, "ann", "192.0.2.1"))
            go_on = relay.store.hangs = threading.Event()
            for lane in range(LANES - is_sent):  # a commit that is not sent waits for one of them
                relay.reservations._cache._waiting.append(_Waiting(relay.reservations._cache.updates.sweep(f"other-{lane}")))
                relay.reservations._cache._some.unpark()
                await until(lambda: not relay.reservations._cache._waiting)
            with trio.move_on_after(0.2) as gone:
                await relay.reservations.commit(entered, "ann", KEPT, known_as=known_as)
            assert gone.cancelled_caught
            relay.store.hangs = None
            go_on.set()
            await until(lambda: not in_store(relay))


async def test_a_commit_that_is_repeated_after_its_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.reserving.reservations.CALL_S", 1.0)
    async with relays(tmp_path, "a") as (relay,):
        first = proved(await relay.reservations.enter(S1, "ann", "192.0.2.1"))
        relay.store.loses_answers = True
        assert isinstance(await relay.reservations.commit(first, "ann", KEPT, known_as="the-token"), NotEntered)
        relay.store.loses_answers = False
        again = proved(await relay.reservations.enter(S1, "ann", "192.0.2.1"))
        hold = await relay.reservations.commit(again, "ann", KEPT, known_as="the-token")
        assert isinstance(hold, Hold)
        await until(lambda: not relay.reservations.leases.has_ending)
        await trio.sleep(1.5)  # what came of the lost answer would have been undone: CALL_S and a moment
        record = relay.reservations.holders.standings()[S1].record
        assert [login.login_id for login in record.logins] == ["the-token"]
        assert not record.entries
        assert relay.reservations.leases.get("the-token") is hold
        relay.reservations.release(hold)
        await until(lambda: not in_store(relay))


async def test_a_login_made_again_with_its_token_is_not_ended_by_the_logout_before(tmp_path: Path) -> None:
    waiting = LeaseTerms(lifetime_ms=KEPT.lifetime_ms, hold_while_sessions=True)
    async with relays(tmp_path, "a") as (relay,):
        relay.reservations.upkeep.may_have_sessions = lambda server_id, user, since_ms: True
        first = proved(await relay.reservations.enter(S1, "ann", "192.0.2.1"))
        hold = await relay.reservations.commit(first, "ann", waiting, known_as="the-token")
        assert isinstance(hold, Hold)
        relay.reservations.release(hold)
        await until(lambda: relay.reservations.holders.standings()[S1].record.logins[0].is_lingering)
        again = proved(await relay.reservations.enter(S1, "ann", "192.0.2.1"))
        assert isinstance(await relay.reservations.commit(again, "ann", waiting, known_as="the-token"), Hold)
        assert not relay.reservations.leases.is_ending("the-token")
        (login,) = relay.reservations.holders.standings()[S1].record.logins
        assert (login.is_lingering, login.ttl_ms) == (False, KEPT.lifetime_ms)


async def test_an_entry_that_nobody_heard_of_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.reserving.reservations.CALL_S", 0.5)
    async with relays(tmp_path, "a") as (relay,):
        relay.store.loses_answers = True
        assert isinstance(await relay.reservations.enter(S1, "ann", "192.0.2.1"), NotEntered)
        assert in_store(relay)
        relay.store.loses_answers = False
        await until(lambda: not in_store(relay))
        go_on = relay.store.hangs = threading.Event()
        with trio.move_on_after(0.2) as gone:
            await relay.reservations.enter(S1, "ann", "192.0.2.1")
        assert gone.cancelled_caught
        relay.store.hangs = None
        go_on.set()
        asked = relay.store.asked
        await until(lambda: not relay.reservations.leases.has_ending and relay.store.asked > asked)
        assert not in_store(relay)


def in_store(relay: Relay) -> bool:
    """Whether any server is somebody's, or about to be."""
    return any(record.logins or record.entries for _, record in Ledger(relay.store, RelayId("looks"), LEASE_S).records())
