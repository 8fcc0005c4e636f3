"""Work beside the loop: in another thread, in its order, and told in the loop whatever becomes of it."""

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import outcome
import pytest
import trio

from fxtunnel.engine.reactor import Reactor


@asynccontextmanager
async def running() -> AsyncIterator[Reactor]:
    reactor = Reactor()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run_in_task)
        with trio.fail_after(10):
            yield reactor
        nursery.cancel_scope.cancel()
    reactor.close()


async def test_work_is_done_elsewhere_one_after_the_other_and_told_here() -> None:
    async with running() as reactor:
        at_once, most, threads, told = 0, 0, set(), []
        done = trio.Event()

        def work(number: int) -> int:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            threads.add(threading.get_ident())
            time.sleep(0.002)
            at_once -= 1
            if number == 3:
                raise OSError("the fourth")
            return number

        def then(result: outcome.Outcome[int]) -> None:
            assert threading.current_thread() is threading.main_thread()
            told.append(str(result.error) if isinstance(result, outcome.Error) else result.unwrap())
            if len(told) == 10:
                done.set()

        for number in range(5):
            reactor.offload.do(partial(work, number), then)
        await trio.sleep(0.03)  # the thread may have ended by now
        for number in range(5, 10):
            reactor.offload.do(partial(work, number), then)
        await done.wait()
        assert told == [0, 1, 2, "the fourth", 4, 5, 6, 7, 8, 9]
        assert most == 1
        assert threading.get_ident() not in threads


async def test_a_crowd_of_one_source_keeps_no_other_waiting() -> None:
    async with running() as reactor:
        may_go_on, told, done = threading.Event(), [], trio.Event()
        reactor.offload.do(lambda: may_go_on.wait(10), lambda _: None)
        for source, count in (("crowd", 200), ("one", 1), ("two", 2)):
            for _ in range(count):
                reactor.offload.do(partial(told.append, source), lambda _: done.set() if len(told) == 203 else None, source)
        may_go_on.set()
        await done.wait()
        assert told[:6] == ["crowd", "one", "two", "crowd", "two", "crowd"]


async def test_the_loop_outlives_those_who_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as reactor:
        done = trio.Event()

        def fails(_: outcome.Outcome[int]) -> None:
            raise ValueError("a bug")

        reactor.offload.do(lambda: 1, fails)
        reactor.offload.do(lambda: 2, lambda _: done.set())
        await done.wait()
        assert "could not be told" in caplog.text


def test_a_loop_that_has_closed_is_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of its descriptor may be somebody else's by then."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], None], ended: Callable[[outcome.Outcome[None]], None], name: str) -> None:
        threads.append(threading.Thread(target=lambda: ended(outcome.capture(work)), name=name))
        threads[-1].start()

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", start)
    told: list[object] = []
    monkeypatch.setattr(Reactor, "call_soon_threadsafe", lambda _, call: told.append(call))
    working, may_go_on = threading.Event(), threading.Event()

    def work() -> None:
        working.set()
        may_go_on.wait(10)

    reactor = Reactor()
    reactor.offload.do(work, told.append)
    reactor.offload.do(lambda: told.append("begun all the same"), told.append)
    assert working.wait(10)
    reactor.close()
    may_go_on.set()
    threads[0].join(10)
    assert not threads[0].is_alive()
    assert told == []


async def test_work_goes_on_in_the_loop_while_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as reactor:
        start, refused = trio.lowlevel.start_thread_soon, 0

        def refuses(*args: Any) -> None:
            nonlocal refused
            if refused < 3:
                refused += 1
                raise RuntimeError("can't start new thread")
            start(*args)

        monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuses)
        threads, told, done = [], [], trio.Event()

        def then(result: outcome.Outcome[int]) -> None:
            told.append(result.unwrap())
            if len(told) == 5:
                done.set()

        def work(number: int) -> int:
            threads.append(threading.current_thread() is threading.main_thread())
            return number

        for number in range(5):
            reactor.offload.do(partial(work, number), then)
            assert told == [], "told from within `do`"
        await done.wait()
        assert told == [0, 1, 2, 3, 4]
        assert threads == [True, True, True, False, False]
        assert caplog.text.count("no thread can be started") == 1
