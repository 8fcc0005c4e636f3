"""When logins that have ended are told to the store. The store is the test's, and takes as long as it says."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fxrelay.balance.login_attempt import Attempt
from fxrelay.balance.reservations import Record, Token
from fxrelay.cluster.members import Ages
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.leases import Hold, Leases, LeaseTerms
from fxrelay.reserving.ledger import Written
from fxrelay.reserving.record_updates import RecordUpdate, RecordUpdates
from fxrelay.reserving.reservation_cache import AT_ONCE, ReservingConfig
from fxrelay.reserving.upkeep import Upkeep
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId

CALL_S = 0.01


class SlowBooks:
    """`failing`: so many calls get no answer."""

    def __init__(self) -> None:
        self.config = ReservingConfig(RelayId("a"))
        self.updates = RecordUpdates("a", 1)
        self.reporter = SimpleNamespace(happened=lambda *_: None)
        self.last_error = ""
        self.failing = 0

    async def do(self, ask: RecordUpdate[Any]) -> Any:
        (outcome,) = await self.do_all([ask])
        return outcome

    async def do_all(self, together: Sequence[RecordUpdate[Any]]) -> list[Any]:
        await trio.sleep(CALL_S)
        self.last_error = "no answer" if self.failing else ""
        if self.failing:
            self.failing -= 1
            return [StoreError(self.last_error) for _ in together]
        return [(Record(), Written(Record(), ())) for _ in together]

    def learn(self, server_id: RelayId, written: Written) -> None:
        """Nothing to be learnt."""


def held(name: str) -> Hold:
    return Hold(RelayId(f"s-{name}"), "ann", Attempt(name), LeaseTerms(), Token("e", 1), 0, trio.current_time())


async def test_a_login_that_ends_while_another_is_taken_out_does_not_wait(autojump_clock: MockClock) -> None:
    cache, leases = SlowBooks(), Leases(trio.current_time)
    upkeep = Upkeep(cache, leases, ClusterView(Ages()))  # as much of them as it uses
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep._keep_releasing)
        await wait_all_tasks_blocked()
        for number in range(10):
            leases.end(held(str(number)))
            await trio.sleep(CALL_S / 2)
        await trio.sleep(2 * CALL_S)
        assert not leases.has_ending

        cache.failing = 1
        leases.end(held("failing"))
        await trio.sleep(2 * CALL_S)
        leases.end(held("behind it"))
        await trio.sleep(0.5)
        assert len(leases.ending()) == 2  # a store that does not answer is not asked all the time
        await trio.sleep(1.0)
        assert not leases.has_ending
        nursery.cancel_scope.cancel()


async def test_a_login_that_is_being_renewed_when_its_turn_comes_holds_up_no_other(autojump_clock: MockClock) -> None:
    cache, leases = SlowBooks(), Leases(trio.current_time)
    upkeep = Upkeep(cache, leases, ClusterView(Ages()))  # as much of them as it uses
    holds = [held(str(number)) for number in range(2 * AT_ONCE)]
    for hold in holds:
        leases.end(hold)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.release_all)
        await wait_all_tasks_blocked()  # the first of them are with the store
        async with holds[-1].lock:
            await trio.sleep(2.5 * CALL_S)
            assert leases.ending() == holds[-1:]
    assert not leases.has_ending
    assert not any(hold.lock.locked() for hold in holds)
