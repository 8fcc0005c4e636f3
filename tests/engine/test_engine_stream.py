"""A tunnel's stream as a trio stream: trio's own suite on two of them joined in memory, and the endings, which must never be mixed up."""

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from fxtunnel.codes import Code
from fxtunnel.engine import stream as module
from fxtunnel.engine.ports import StreamSender
from fxtunnel.engine.reactor import Timer
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.errors import LocalProtocolError
from fxtunnel.model import ServiceName
from fxtunnel.protocol.credit import WindowBudget
from fxtunnel.protocol.mux import Mux
from fxtunnel.protocol.opening import Opening, encode_tags
from fxtunnel.protocol.replay import ReplayRing
from fxtunnel.protocol.stream import Stream

TAGS = encode_tags(Opening(ServiceName("web")))


class Wire:
    """Implements `Carrier`: one end's mux, and a task that brings its frames to the other's."""

    is_up = True

    def __init__(self, on_open: Callable[[Stream, Opening], None] | None = None) -> None:
        self.turns: deque[StreamSender] = deque()
        self.stopped = False
        self.straight = True
        self.waiting = trio.Event()
        self.mux = Mux(
            ReplayRing(1 << 18, keep=False),
            WindowBudget(64 << 20),
            max_streams=8,
            max_window_bytes=1 << 20,
            wake=self.wake,
            crashed=_let_fly,
            on_open=on_open,
        )

    def wake(self) -> None:
        self.waiting.set()

    def has_told_of(self, stream: Stream) -> bool:
        return True

    def want_turn(self, sender: StreamSender) -> None:
        assert sender not in self.turns
        self.turns.append(sender)
        self.wake()

    def cancel_turn(self, sender: StreamSender) -> None:
        self.turns.remove(sender)

    def has_room(self, limit_bytes: int) -> int:
        return min(limit_bytes, 5_000) if self.straight and not self.turns else 0

    async def run(self, other: "Wire") -> None:
        ring = self.mux.ring
        while True:
            await self.waiting.wait()
            self.waiting = trio.Event()
            while not self.stopped and (self.turns or ring.unsent_bytes):
                if self.turns and self.mux.data_room > 8:
                    self.turns.popleft().read_turn(min(9_000, self.mux.data_room - 8))
                piece = bytes(ring.unsent(7_001))
                ring.advance(len(piece))
                other.mux.receive(memoryview(piece), trio.current_time())
                await trio.lowlevel.checkpoint()


class Pair:
    """Both ends of one stream."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.accepted: list[Stream] = []
        self.near = Wire()
        self.far = Wire(lambda stream, _: self.accepted.append(stream))
        self.nursery = nursery
        nursery.start_soon(self.near.run, self.far)
        nursery.start_soon(self.far.run, self.near)

    def later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        async def run() -> None:
            await trio.sleep(delay_s)
            call()

        self.nursery.start_soon(run)
        return Timer(0, call)

    async def make(self) -> tuple[TunnelStream, TunnelStream]:
        waits = _NullSink()
        stream = self.near.mux.open(TAGS, waits)
        assert stream is not None
        left = TunnelStream(self.near, stream, self.later)
        await trio.testing.wait_all_tasks_blocked()
        right = TunnelStream(self.far, self.accepted[-1], self.later)
        self.accepted[-1].accept()
        await trio.testing.wait_all_tasks_blocked()
        return left, right

    async def make_clogged(self) -> tuple[TunnelStream, TunnelStream]:
        left, right = await self.make()
        for end in (left, right):
            while end.stream.send_credit:
                await end.send_all(bytes(min(end.stream.send_credit, 20_000)))
        await trio.testing.wait_all_tasks_blocked()
        return left, right


class _NullSink:
    def on_accept(self) -> None: ...
    def on_refuse(self, code: Code, text: str) -> None: ...
    def on_redirect(self, relay: str) -> None: ...
    def on_data(self, data: memoryview) -> None: ...
    def on_last_data(self, data: memoryview) -> None: ...
    def on_fin(self) -> None: ...
    def on_reset(self, code: Code) -> None: ...
    def on_credit(self) -> None: ...


async def receive_all(stream: TunnelStream) -> bytes:
    return b"".join([chunk async for chunk in stream])


@asynccontextmanager
async def pairs() -> AsyncIterator[Pair]:
    with trio.fail_after(90):
        async with trio.open_nursery() as nursery:
            yield Pair(nursery)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("straight", [True, False])
async def test_trios_own_suite(straight: bool, autojump_clock: object) -> None:
    async def fresh(clogged: bool) -> tuple[TunnelStream, TunnelStream]:
        pair = Pair(nursery)
        pair.near.straight = pair.far.straight = straight
        return await (pair.make_clogged() if clogged else pair.make())

    async with trio.open_nursery() as nursery:
        await trio.testing.check_half_closeable_stream(lambda: fresh(False), lambda: fresh(True))
        nursery.cancel_scope.cancel()


async def test_a_reset_is_no_end_and_comes_behind_the_data() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        told: list[str] = []
        right.on_broken = lambda: told.append("broken")
        await left.send_all(b"half of it")
        left.reset(Code.PEER_RESET)
        await trio.testing.wait_all_tasks_blocked()
        assert await right.receive_some() == b"half of it"
        with pytest.raises(trio.BrokenResourceError, match="peer-reset"):
            await right.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await right.send_all(b"x")
        assert told == ["broken"]
        assert right.broken is Code.PEER_RESET


async def test_credit_goes_back_only_for_what_was_received() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        size = left.stream.send_credit
        with trio.move_on_after(0.2):
            await left.send_all(bytes(size * 3))
        assert left.stream.send_credit == 0
        assert right.stream.bytes_in == size
        await right.receive_some(size // 2)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < left.stream.send_credit <= size


async def test_a_receive_that_is_cancelled_loses_nothing() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        with trio.move_on_after(0.01) as scope:
            await right.receive_some()
        assert scope.cancelled_caught
        await left.send_all(b"abc")
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await right.receive_some(1)
        assert [await right.receive_some(1) for _ in range(3)] == [b"a", b"b", b"c"]


async def test_after_a_send_that_is_cancelled_the_end_is_a_reset() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        with trio.move_on_after(0.05) as scope:
            await left.send_all(bytes(1 << 20))
        assert scope.cancelled_caught
        with pytest.raises(trio.BrokenResourceError):
            await left.send_all(b"x")
        await left.aclose()
        with pytest.raises(trio.BrokenResourceError, match="cancelled"):
            await receive_all(right)


async def test_closing_with_something_unread_is_a_reset() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        await left.send_all(b"unread")
        await trio.testing.wait_all_tasks_blocked()
        await right.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await left.receive_some()


async def test_a_closed_stream_does_not_wait_for_ever(autojump_clock: object) -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        await right.aclose()
        assert await left.receive_some() == b""
        assert not right.stream.closed
        await trio.sleep(module.CLOSE_LINGER_S + 1)
        assert right.stream.closed
        assert left.stream.closed


async def test_after_end_what_still_comes_is_dropped_for_a_while() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        await left.send_all(b"unread")
        await trio.testing.wait_all_tasks_blocked()
        await right.send_all(b"answer")
        right.end()
        await left.send_all(bytes(50_000))
        assert await receive_all(left) == b"answer"
        with pytest.raises(trio.BrokenResourceError):
            await left.send_all(bytes(module.END_DROPS_BYTES + 100_000))


async def test_given_back_bytes_count_when_they_leave() -> None:
    async with pairs() as pair:
        left, right = await pair.make()
        await left.send_all(b"GET / and more")
        await left.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert await right.receive_some(9) == b"GET / and"
        before = right.stream.window._consumed
        assert right.give_back(b"and") == (b"and more", True)
        assert right.stream.window._consumed == before - 3
        with pytest.raises(trio.ClosedResourceError):
            await right.receive_some()
        with pytest.raises(LocalProtocolError):
            right.give_back()


async def test_a_stream_in_use_is_not_given_back() -> None:
    async with pairs() as pair:
        _, right = await pair.make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(right.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError):
                right.give_back()
            nursery.cancel_scope.cancel()


def _let_fly(culprit: object) -> None:
    raise  # what is being handled: a test is to see it
