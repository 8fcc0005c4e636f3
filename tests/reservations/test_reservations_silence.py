"""A store that does not answer at all: who waits for it is told soon, and those who come next at once."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from test_reservations_service import S1, S2, relays

from fxrelay.cluster.ports import Present, Update
from fxrelay.reserving import reservation_cache
from fxrelay.reserving.leases import LeaseTerms
from fxrelay.reserving.reservations import NO_STORE, Entered, NotEntered
from fxtunnel.model import RelayId


async def test_a_store_that_hangs_makes_one_wait_for_two_seconds_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation_cache, "PAUSE_S", 15.0)
    async with relays(tmp_path, "a") as (relay,):
        relay.store.hangs = answers = threading.Event()
        began = trio.current_time()
        first = await relay.reservations.enter(S1, "ann", "192.0.2.1")
        assert isinstance(first, NotEntered)
        assert first.reason == NO_STORE
        assert trio.current_time() - began < reservation_cache.CALL_S, "it is not told as late as the store's own deadlines would be"
        asked, pauses = relay.store.asked, trio.current_time() + reservation_cache.PAUSE_S
        for number in range(100):
            user = f"user {number}"
            for answer in (
                await relay.reservations.enter(S1, user, "192.0.2.1"),
                await relay.reservations.take(S2, user, "192.0.2.1", LeaseTerms()),
                await relay.reservations.look_at(S1),
            ):
                assert answer is False or (isinstance(answer, NotEntered) and answer.reason == NO_STORE)
        assert trio.current_time() < pauses
        assert not relay.reservations.leases.ending(), "what was never asked for need not be taken back"
        answers.set()
        relay.store.hangs = None
        relay.reservations.release(await relay.taken(S1, "bob"))
        assert relay.store.asked > asked


async def test_a_store_that_is_slow_but_answers_others_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation_cache, "ANSWER_S", 1.5)
    monkeypatch.setattr(reservation_cache, "CALL_S", 20.0)
    monkeypatch.setattr(reservation_cache, "AT_ONCE", 1)
    async with relays(tmp_path, "a") as (relay,):
        update_all = relay.store.update_all

        def slowly(updates: Sequence[Update]) -> list[Present | Exception]:
            time.sleep(0.25)  # in a thread of the store's
            return update_all(updates)

        monkeypatch.setattr(relay.store, "update_all", slowly)
        outcomes: list[object] = []

        async def enter(number: int) -> None:
            outcomes.append(await relay.reservations.enter(RelayId(f"n{number}"), f"user {number}", "192.0.2.1"))

        async with trio.open_nursery() as nursery:
            for number in range(20):  # together longer than the patience with a store that is silent
                nursery.start_soon(enter, number)
        assert [outcome for outcome in outcomes if not isinstance(outcome, Entered)] == []
