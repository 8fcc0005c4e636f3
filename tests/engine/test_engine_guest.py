"""trio as a reactor's guest, in a process that may start no more threads: it goes on, more slowly, and as before afterwards."""

import errno
import logging
import os
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


class Short:
    """A socket for which there is no memory, for some time (tcp(7), unix(7): ENOBUFS)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.failures_left = 1

    def send(self, data: bytes) -> int:
        if self.failures_left:
            self.failures_left -= 1
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return self._sock.send(data)

    def close(self) -> None:
        self._sock.close()


def test_a_thread_that_could_not_wake_trio_is_heard(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for it waited until some other thread had ended: for changes of relays.json that was never."""
    monkeypatch.setattr(guest, "LOOK_S", 0.05)

    async def main() -> int:
        wakeup = trio.lowlevel.current_trio_token()._reentry_queue.wakeup
        wakeup.write_sock = short = Short(wakeup.write_sock)
        with trio.fail_after(10):
            found = await trio.to_thread.run_sync(int)
        assert short.failures_left == 0
        return found

    assert reactor.host_trio(main) == 0


def test_what_is_told_from_beside_the_loop_arrives_also_if_it_cannot_be_woken(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread for handshakes ended with the error, and no other was begun."""

    async def main() -> None:
        write = os.eventfd_write
        results: list[str] = []
        for failures in (1, 0):
            left = [failures]

            def wake(fd: int, value: int, left: list[int] = left) -> None:
                if left[0] and threading.current_thread() is not threading.main_thread():
                    left[0] -= 1
                    raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
                write(fd, value)

            monkeypatch.setattr(os, "eventfd_write", wake)
            reactor.offload.do(lambda: "done", lambda result: results.append(result.unwrap()))
            await until(lambda failures=failures, left=left: len(results) == 2 - failures and not left[0])
        assert results == ["done", "done"]

    reactor.host_trio(main)
