"""A task that waits for callbacks."""

import trio
import trio.testing

from fxtunnel.kit.waiter import Waiter


async def test_a_waiter_is_woken_again_and_again_and_may_be_cancelled() -> None:
    waiter, woken = Waiter(), 0

    async def wait() -> None:
        nonlocal woken
        while True:
            await waiter.wait()
            woken += 1

    waiter.wake()  # nobody waits yet, and nobody is told later
    for _ in range(2):
        woken = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            for expected in range(3):
                await trio.testing.wait_all_tasks_blocked()
                assert woken == expected
                waiter.wake()
                waiter.wake()  # twice is once
            await trio.testing.wait_all_tasks_blocked()
            assert woken == 3
            nursery.cancel_scope.cancel()
        waiter.wake()  # nobody waits any more
