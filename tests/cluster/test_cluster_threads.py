"""Worker threads for store and transporter: results, errors, how many at once, and calls that nobody waits for any more."""

import threading

import pytest
import trio

from fxrelay.cluster import threads as module
from fxrelay.cluster.threads import CLUSTER_THREADS, Threads


class Gate:
    """Calls that wait until they are let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.let_go = threading.Event()
        self._lock = threading.Lock()

    def call(self) -> str:
        with self._lock:
            self.begun += 1
        assert self.let_go.wait(20)
        return "done"

    async def wait_begun(self, count: int) -> None:
        with trio.fail_after(20):
            while self.begun < count:
                await trio.sleep(0.005)


def fails() -> None:
    raise KeyError("x")


async def test_results_and_errors_come_back() -> None:
    threads = Threads()
    assert await threads.run(lambda: 7) == 7
    with pytest.raises(KeyError):
        await threads.run(fails)
    assert await threads.run(threading.current_thread) is not threading.current_thread()


async def test_so_many_run_at_once_and_the_rest_in_their_order() -> None:
    threads, gate = Threads(), Gate()
    order: list[int] = []

    async def later(number: int) -> None:
        await threads.run(lambda: order.append(number))

    async with trio.open_nursery() as nursery:
        for _ in range(CLUSTER_THREADS):
            nursery.start_soon(threads.run, gate.call)
        await gate.wait_begun(CLUSTER_THREADS)
        for number in range(20):
            nursery.start_soon(later, number)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
        gate.let_go.set()
    assert sorted(order) == list(range(20))
    assert order[0] == 0


async def test_who_is_cancelled_waits_for_nothing_and_what_has_not_begun_never_does() -> None:
    threads, gate = Threads(), Gate()
    ran: list[str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(CLUSTER_THREADS):
            nursery.start_soon(threads.run, gate.call)
        await gate.wait_begun(CLUSTER_THREADS)
        nursery.start_soon(threads.run, lambda: ran.append("late"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    gate.let_go.set()
    assert await threads.run(lambda: "next") == "next", "the threads come back"
    assert ran == []
    with trio.CancelScope() as scope:
        scope.cancel()
        await threads.run(lambda: ran.append("cancelled before"))
    await threads.run(lambda: None)
    assert ran == []


async def test_many_callers_of_quick_calls_all_get_their_own_answer() -> None:
    threads = Threads()
    got: list[int] = []

    async def caller(number: int) -> None:
        for step in range(40):
            wanted = number * 1_000 + step
            assert await threads.run(lambda wanted=wanted: wanted) == wanted
        got.append(number)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(25):
                nursery.start_soon(caller, number)
    assert sorted(got) == list(range(25))


async def test_threads_without_work_end_and_new_ones_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.02)
    threads = Threads()
    for _ in range(5):
        thread = await threads.run(threading.current_thread)
        with trio.fail_after(20):
            while thread.is_alive():
                await trio.sleep(0.005)
    monkeypatch.setattr(module, "IDLE_S", 0.001)
    for pause_ms in (0, 1, 2) * 40:  # a call that comes as a thread is about to end
        await trio.sleep(pause_ms / 1000)
        with trio.fail_after(20):
            assert await threads.run(lambda: 1) == 1


def test_another_run_may_use_them() -> None:
    threads, gate = Threads(), Gate()

    async def leaves_one_behind() -> None:
        with trio.move_on_after(0.05):
            await threads.run(gate.call)

    trio.run(leaves_one_behind)
    gate.let_go.set()

    async def goes_on() -> None:
        with trio.fail_after(20):
            for _ in range(CLUSTER_THREADS * 2):
                assert await threads.run(lambda: 3) == 3

    trio.run(goes_on)
