"""One worker process, kept alive: what becomes of it when the parent lacks what a start takes."""

import errno
import os
from collections.abc import Iterator

import psutil
import pytest
import trio

from fxgateway.workers import child as child_module
from fxgateway.workers.channel import Channel
from fxgateway.workers.child import Child, SpawnPayload
from fxtunnel.engine.reactor import Reactor


class Parent:
    """A home whose worker counts as ready from the start, and in which a call fails at the second process."""

    def __init__(self, reactor: Reactor, fails: str) -> None:
        self.reactor = reactor
        self.child = Child(1, self, self)
        self.fails = fails
        self.pids: list[int] = []
        self.begun = 0
        self.ended = 0
        self.third = trio.Event()

    def payload(self, number: int) -> SpawnPayload:
        self.begun += 1
        self.pids.append(self.child.pid)
        self.child.became_ready()
        if self.begun == 3:
            self.third.set()
        self.fail_in("payload")
        return SpawnPayload({"op": "nothing that a worker knows: it ends"}, [])

    def introduce(self, child: Child) -> None:
        self.fail_in("introduce")

    def died(self, child: Child) -> None:
        self.ended += 1

    def on_message(self, *_: object) -> None:
        pass

    def on_gone(self, channel: Channel) -> None:
        pass

    def fail_in(self, name: str) -> None:
        if self.begun == 2 and self.fails == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.fixture(autouse=True)
def waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine: a process that was killed is waited for, so that none is left when a test looks."""
    monkeypatch.setattr(child_module, "LOOK_S", 60.0)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.mark.parametrize("fails", ["payload", "introduce"])
async def test_a_process_that_cannot_be_equipped_is_ended_and_another_is_started(
    fails: str, reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_S", 0.01)
    parent = Parent(reactor, fails)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run_in_task)
        with trio.fail_after(240):
            await nursery.start(parent.child.run)
            await parent.third.wait()
        nursery.cancel_scope.cancel()
    assert parent.ended == 3
    assert len(set(parent.pids)) == 3
    assert not any(psutil.pid_exists(pid) for pid in parent.pids)


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "no process"), RuntimeError("can't start new thread")])
async def test_a_process_that_cannot_be_started_is_tried_again(
    error: Exception, reactor: Reactor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_S", 0.01)
    parent = Parent(reactor, "")
    opens, open_process = 0, trio.lowlevel.open_process

    async def opening(*args: object, **options: object) -> trio.Process:
        nonlocal opens
        opens += 1
        if opens in (2, 3):
            raise error
        return await open_process(*args, **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", opening)
    descriptors = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run_in_task)
        with trio.fail_after(240):
            await nursery.start(parent.child.run)
            await parent.third.wait()
        nursery.cancel_scope.cancel()
    assert opens == 5
    assert caplog.text.count(str(error.args[-1])) == 2
    assert len(os.listdir("/proc/self/fd")) <= descriptors
