"""The reactor by itself: hosting trio, timers, calls, descriptors that change hands."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from fxtunnel.engine.reactor import READ, WRITE, Reactor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


class Recorder:
    """A handler that notes its events, and then does as it is told."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.events: list[int] = []
        self.crashes = 0
        self.then = then

    def on_event(self, events: int) -> None:
        self.events.append(events)
        self.then()

    def flush(self) -> None:
        self.then()

    def on_crash(self) -> None:
        self.crashes += 1


def test_host_trio_returns_what_main_returns(reactor: Reactor) -> None:
    async def main() -> int:
        await trio.sleep(0.01)
        return await trio.to_thread.run_sync(lambda: 7)

    assert reactor.host_trio(main) == 7


def test_host_trio_raises_what_main_raises(reactor: Reactor) -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("main")

    with pytest.raises(LookupError, match="main"):
        reactor.host_trio(main)


def test_both_kinds_of_work_share_the_thread(reactor: Reactor) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.setblocking(False)
        seen: list[bytes] = []
        main_thread = threading.get_ident()

        async def main() -> None:
            arrived = trio.Event()

            class Reader(Recorder):
                def on_event(self, events: int) -> None:
                    if events & READ:
                        assert threading.get_ident() == main_thread
                        seen.append(far.recv(100))
                        arrived.set()

            reactor.register(far, Reader())
            near.send(b"x")
            with trio.fail_after(10):
                await arrived.wait()
            reactor.unregister(far)
            reactor.unregister(far)

        reactor.host_trio(main)
        assert seen == [b"x"]


def test_calls_from_another_thread_wake_the_loop(reactor: Reactor) -> None:
    async def main() -> None:
        called = trio.Event()
        threading.Timer(0.05, reactor.call_soon_threadsafe, [called.set]).start()
        with trio.fail_after(10):
            await called.wait()

    reactor.host_trio(main)


def test_timers_run_in_order_and_not_when_cancelled(reactor: Reactor) -> None:
    ran: list[str] = []

    def fails() -> None:
        ran.append("fails")
        raise ValueError("a bug")

    reactor.call_later(0.02, lambda: ran.append("second"))
    reactor.call_later(0.01, lambda: ran.append("first"))
    reactor.call_later(0.015, fails)
    cancelled = reactor.call_later(0.012, lambda: ran.append("cancelled"))
    cancelled.cancel()
    cancelled.cancel()
    deadline = time.monotonic() + 10
    while len(ran) < 3 and time.monotonic() < deadline:
        reactor.run_once(0.005)
    assert ran == ["first", "fails", "second"]


def test_event_of_a_closed_descriptor_does_not_reach_its_successor(reactor: Reactor) -> None:
    """Two sockets have events in one batch; the first handler closes the other's, and a new one gets its number."""
    pairs = [socket.socketpair() for _ in range(3)]
    fresh: list[socket.socket] = []
    successor = Recorder()
    heirs: list[Recorder] = []

    def swap(own: int, other: int) -> Callable[[], None]:
        def run() -> None:
            if fresh:
                return
            number = pairs[other][0].fileno()
            reactor.forget(pairs[other][0])
            pairs[other][0].close()
            sock = socket.socket()
            assert sock.fileno() == number
            fresh.append(sock)
            reactor.register(sock, successor, select.EPOLLIN | select.EPOLLET)

        return run

    for own, other in ((0, 1), (1, 0)):
        heirs.append(Recorder(swap(own, other)))
        pairs[own][0].setblocking(False)
        reactor.register(pairs[own][0], heirs[-1], select.EPOLLIN | select.EPOLLET)
        pairs[own][1].send(b"x")
    reactor.run_once(0.1)
    try:
        assert len(fresh) == 1
        assert not any(events & READ for events in successor.events)
    finally:
        for sock in (*fresh, *(sock for pair in pairs for sock in pair)):
            sock.close()


def test_handler_that_asked_twice_is_called_once(reactor: Reactor) -> None:
    handler = Recorder()
    reactor.again(handler)
    reactor.again(handler)
    reactor.run_once(0)
    reactor.run_once(0)
    assert handler.events == [READ]


@pytest.mark.parametrize("error", [RecursionError, UnicodeError, MemoryError, OSError])
def test_callback_that_raises_hurts_nobody_else(reactor: Reactor, error: type[Exception]) -> None:
    def fail() -> None:
        raise error("injected")

    near, far = socket.socketpair()
    with near, far:
        bad, good = Recorder(fail), Recorder()
        reactor.register(near, bad)
        reactor.register(far, good)
        reactor.run_once(0.1)
        assert bad.crashes == 1
        assert good.events
        assert good.events[0] & WRITE
        reactor.flush_later(bad)
        reactor.again(bad)
        reactor.run_once(0)
        assert bad.crashes == 3
        for sock in (near, far):
            reactor.unregister(sock)


HOSTED = """
    import os, signal, sys
    import trio
    from fxtunnel.engine.reactor import Reactor

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored

    async def main():
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            print("ready", flush=True)
            async for number in signals:
                print("got", number, flush=True)
                return

    try:
        Reactor().host_trio(main)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize(("number", "answer"), [(signal.SIGTERM, "got 15"), (signal.SIGINT, "interrupted")])
def test_signals_reach_hosted_trio(number: signal.Signals, answer: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOSTED)], stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
            time.sleep(0.1)  # it sleeps in epoll now
            process.send_signal(number)
            assert process.communicate(timeout=5)[0].strip() == answer
            assert process.returncode == 0
        finally:
            process.kill()


def test_idle_loop_does_not_spin(reactor: Reactor) -> None:
    reactor.call_later(0.2, lambda: None)
    turns = 0

    async def main() -> None:
        await trio.sleep(0.2)

    run_once = reactor.run_once

    def counted(timeout_s: float) -> None:
        nonlocal turns
        turns += 1
        run_once(timeout_s)

    reactor.run_once = counted
    reactor.host_trio(main)
    assert turns < 20
