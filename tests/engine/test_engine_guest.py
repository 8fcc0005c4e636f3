"""trio as a reactor's guest, in a process that may start no more threads: it goes on, more slowly, and as before afterwards."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import trio

from fxtunnel.engine import guest
from fxtunnel.engine.reactor import Reactor


@contextmanager
def no_new_threads() -> Iterator[None]:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        yield


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.005)


def test_trio_goes_on_without_threads(reactor: Reactor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(guest, "LOOK_S", 0.05)
    monkeypatch.setattr(guest, "RETRY_S", 0.05)
    one, other = socket.socketpair()
    one.setblocking(False)

    async def goes_on(word: bytes) -> None:
        with trio.fail_after(20):
            reactor.call_later(0.02, lambda: other.send(word))
            await trio.lowlevel.wait_readable(one)
            assert one.recv(10) == word
            said = trio.Event()
            reactor.call_later(0.02, said.set)
            await said.wait()
            with trio.move_on_after(0.05) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught

    async def take_one(release: threading.Event) -> None:
        while True:
            try:
                trio.lowlevel.start_thread_soon(release.wait, lambda _: None)
            except RuntimeError:  # the reactor has them just now, to see whether they are there
                await trio.sleep(0.001)
            else:
                return

    async def take_all(release: threading.Event) -> None:
        for _ in range(10):  # also those that the reactor has just now
            with suppress(RuntimeError):
                while True:
                    trio.lowlevel.start_thread_soon(release.wait, lambda _: None)
            await trio.sleep(0.01)

    async def main() -> str:
        await goes_on(b"before")
        for number in range(1, 4):
            release = threading.Event()
            with no_new_threads():
                for _ in range(guest.SPARE_THREADS - 1):
                    await take_one(release)
                await goes_on(b"yet")
                await until(lambda number=number: caplog.text.count("no thread can be started") == number)
                await take_all(release)
                await goes_on(b"meanwhile")
                with pytest.raises(RuntimeError):
                    await trio.to_thread.run_sync(int)
                await goes_on(b"still")
            release.set()
            await trio.sleep(0.3)
            assert await trio.to_thread.run_sync(int) == 0
            await goes_on(b"after")
        return "well"

    with one, other, caplog.at_level(logging.WARNING):
        assert reactor.host_trio(main) == "well"


def test_trio_does_not_look_itself_while_there_are_threads(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "LOOK_S", 0.02)
    turns = 0

    async def main() -> None:
        nonlocal turns
        await trio.sleep(0.2)
        monkeypatch.setattr(guest.Guest, "soon", lambda self, step: counted(step))
        await trio.sleep(0.5)

    def counted(step: Callable[[], object]) -> None:
        nonlocal turns
        turns += 1
        reactor.call_soon(step)

    reactor.host_trio(main)
    assert turns < 10
