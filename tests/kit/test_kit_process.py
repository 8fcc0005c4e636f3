"""What both daemons do when they are told to reload, or to stop."""

import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fxtunnel.errors import ConfigError, ConfigProblem, FxError
from fxtunnel.kit.notify import Notifier
from fxtunnel.kit.process import ARRIVAL_S, PAUSE_S, Reloads, keep_going, let_arrive, let_finish


class NotifierSpy(Notifier):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def ready(self, status: str = "") -> None:
        self.told.append("ready")

    def reloading(self) -> None:
        self.told.append("reloading")


async def told_after(asks: int, reload: Callable[[], Awaitable[None]]) -> list[str]:
    reloads, notifier = Reloads(), NotifierSpy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reloads.run, reload, notifier)
        for _ in range(asks):
            reloads.ask()
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return notifier.told


async def test_every_request_reloads() -> None:
    calls = []

    async def reload() -> None:
        calls.append(len(calls))

    assert await told_after(3, reload) == ["reloading", "ready"] * 3
    assert len(calls) == 3


async def test_requests_during_a_reload_make_one_more() -> None:
    go, calls = trio.Event(), []

    async def reload() -> None:
        calls.append(len(calls))
        await go.wait()

    reloads = Reloads()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reloads.run, reload, Notifier())
        for _ in range(3):
            reloads.ask()
            await wait_all_tasks_blocked()
        assert len(calls) == 1
        go.set()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FxError("the port is taken"), ["the port is taken"]),
        (
            ConfigError([ConfigProblem("a.toml", "x", "is wrong"), ConfigProblem("a.toml", "y", "too")]),
            ["a.toml: x: is wrong", "a.toml: y: too"],
        ),
    ],
)
async def test_a_refused_reload_names_every_problem_and_the_next_is_tried(
    error: FxError, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def reload() -> None:
        raise error

    assert await told_after(2, reload) == ["reloading", "ready"] * 2
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert lines == [f"reload refused, the old configuration stays: {word}" for word in words] * 2


async def test_draining_ends_with_the_last_one(autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    left, began = [3], trio.current_time()

    def count() -> int:
        left[0] -= 1
        return max(left[0], 0)

    await let_finish("clients", count, 30)
    assert trio.current_time() - began < 1
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


async def test_draining_ends_with_the_time(autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    began = trio.current_time()
    await let_finish("clients", lambda: 2, 30)
    assert trio.current_time() - began == pytest.approx(30)
    assert caplog.records[-1].getMessage() == "clients did not finish in time and are reset: 2"


async def test_what_must_go_on_begins_again_after_an_error(autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    began: list[float] = []

    async def fails_twice() -> None:
        began.append(trio.current_time())
        await trio.sleep(1)
        if len(began) < 3:
            raise MemoryError
        await trio.sleep_forever()

    with trio.move_on_after(60):
        await keep_going("thinking", fails_twice)
    assert [later - earlier for earlier, later in itertools.pairwise(began)] == pytest.approx([1 + PAUSE_S, 1 + PAUSE_S])
    assert [record.getMessage() for record in caplog.records] == ["thinking failed, and begins again in 1 s"] * 2
    assert all(record.exc_info for record in caplog.records)


async def test_an_error_in_a_reload_ends_nothing(autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    reloads = Reloads()

    async def bug() -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd")

    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reloads.run, bug, NotifierSpy())
            for _ in range(2):
                reloads.ask()
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
    assert len(caplog.records) == 2


@dataclass
class Tunnel:
    """Its last bytes are acknowledged so many seconds after it was pressed for them; never, if it is not."""

    takes_s: float
    has_delivered: bool = False
    pressed: int = 0

    def press(self) -> None:
        self.pressed += 1
        trio.lowlevel.spawn_system_task(self._arrive)

    async def _arrive(self) -> None:
        await trio.sleep(self.takes_s)
        self.has_delivered = True


@pytest.mark.parametrize(
    ("takes_s", "drain_s", "waits_s", "is_lost"), [(5, 30, 5, False), (60, 30, 30, True), (0.5, 0, 0.5, False), (60, 0, ARRIVAL_S, True)]
)
async def test_last_bytes_have_until_the_time_to_drain_is_over(
    autojump_clock: object, caplog: pytest.LogCaptureFixture, takes_s: float, drain_s: float, waits_s: float, is_lost: bool
) -> None:
    began = trio.current_time()
    slow, done = Tunnel(takes_s), Tunnel(0, has_delivered=True)
    await let_arrive(lambda: [slow, done], began + drain_s)
    assert trio.current_time() - began == pytest.approx(waits_s, abs=0.11)
    assert (slow.pressed, done.pressed) == (1, 0)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == (
        ["1 tunnels have not acknowledged the last bytes of their streams, which may be lost"] if is_lost else []
    )
