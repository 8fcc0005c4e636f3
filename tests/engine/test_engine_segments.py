"""What a short connection costs: no read, no segment and no event more than it needs."""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
from peers import LOOPBACK, connect, echo, exchange, pattern, receive_all, receive_exactly
from plane import SERVICE, Contexts, open_plane

from fxrelay.delivery import delivery as delivery_module
from fxtunnel.engine.reactor import ERROR, HANGUP, READ, URGENT, Reactor
from fxtunnel.engine.splice import PROVEN_NOTSENT_BYTES, PROVEN_WINDOW_BYTES, Splice
from fxtunnel.protocol.credit import ReceiveWindow, WindowBudget
from fxtunnel.protocol.replay import ReplayRing
from fxtunnel.protocol.stream import Stream

_SEGS_IN_AT = 140
"""Where tcpi_segs_in lies in struct tcp_info (linux/tcp.h)."""


@dataclass
class Counted:
    """A stream and its session, in one, as a splice sees them."""

    send_credit: int = 65_536
    closed: bool = False
    window_bytes: int = 32_768
    taken: int = 0
    sent_bytes: int = 0
    ends: int = 0
    turns: list[Any] = field(default_factory=list)
    ring: ReplayRing = field(default_factory=lambda: ReplayRing(65_536, keep=True))

    @property
    def mux(self) -> "Counted":
        return self

    @property
    def window(self) -> ReceiveWindow:
        return ReceiveWindow(WindowBudget(1 << 20), self.window_bytes)

    def consumed(self, amount_bytes: int) -> None:
        self.taken += amount_bytes

    def emptied(self) -> None:
        """Nothing waits any more."""

    def sent(self, slot: memoryview, length: int) -> None:
        self.sent_bytes += length

    def fin(self) -> None:
        self.ends += 1

    def reset(self, code: object) -> None:
        self.closed = True

    def want_turn(self, sender: object) -> None:
        self.turns.append(sender)


class CountingSocket(socket.socket):
    """How often it was read."""

    reads = 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.reads += 1
        return super().recv_into(buffer, nbytes, flags)


@dataclass
class Joined:
    """A splice, what it is joined to, and the far end of its socket."""

    splice: Splice
    stream: Counted
    sock: CountingSocket
    peer: socket.socket

    def segments(self) -> int:
        """Segments that have arrived at the peer."""
        info = self.peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGS_IN_AT + 4)
        return int(struct.unpack_from("I", info, _SEGS_IN_AT)[0])

    def turn(self, events: int) -> None:
        """An event, and the turn it asks for, if it does."""
        self.splice.on_event(events)
        while self.stream.turns:
            self.stream.turns.pop().read_turn(65_536)


@pytest.fixture
def joined() -> Iterator[Joined]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        peer = stack.enter_context(socket.create_connection(listener.getsockname()))
        accepted, _ = listener.accept()
        sock = stack.enter_context(CountingSocket(fileno=accepted.detach()))
        sock.setblocking(False)
        reactor = Reactor()
        stack.callback(reactor.close)
        splice, stream = Splice(reactor, sock), Counted()
        splice.join(cast("Any", stream), cast("Stream", stream))
        yield Joined(splice, stream, sock, peer)


def test_last_bytes_and_their_end_are_one_segment(joined: Joined) -> None:
    before = joined.segments()
    joined.splice.on_last_data(memoryview(b"answer"))
    joined.splice.on_fin()
    assert joined.peer.recv(100) == b"answer"
    assert joined.peer.recv(100) == b""
    assert joined.stream.taken == 6
    assert joined.segments() == before + 1


def test_last_bytes_go_behind_those_that_wait(joined: Joined) -> None:
    joined.splice.start()
    total = 0
    while not joined.splice._pending:
        total += 65_536
        joined.splice.on_data(memoryview(bytes(65_536)))
    joined.splice.on_last_data(memoryview(b"last"))
    joined.splice.on_fin()
    got = bytearray()
    joined.peer.settimeout(10)
    while more := joined.peer.recv(1 << 20):
        got += more
        joined.splice.reactor.run_once(0)
    assert len(got) == total + 4
    assert got.endswith(b"\0last")


@pytest.mark.parametrize("window_bytes", [32_768, PROVEN_WINDOW_BYTES], ids=["new", "proven"])
def test_a_reader_on_this_host_that_has_proven_itself_gets_more_at_once(joined: Joined, window_bytes: int) -> None:
    def options() -> tuple[int, bytes]:
        return (
            joined.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT),
            joined.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"),
        )

    before = options()
    joined.stream.window_bytes = window_bytes
    joined.splice.start()
    while not joined.splice._pending:
        joined.splice.on_data(memoryview(bytes(65_536)))
    if window_bytes < PROVEN_WINDOW_BYTES:
        assert options() == before
    else:
        assert options() == (PROVEN_NOTSENT_BYTES, b"reno" if before[1] == b"bbr" else before[1])


def test_the_end_that_came_with_the_last_bytes_is_not_read_for(joined: Joined) -> None:
    joined.peer.sendall(b"question")
    joined.peer.shutdown(socket.SHUT_WR)
    joined.turn(READ | HANGUP & ~ERROR)
    assert (joined.stream.sent_bytes, joined.stream.ends, joined.sock.reads) == (8, 1, 1)


@pytest.mark.parametrize("also", [URGENT, ERROR], ids=["urgent data", "an error"])
def test_where_more_may_follow_it_is_read_for(joined: Joined, also: int) -> None:
    joined.peer.sendall(b"question")
    joined.peer.shutdown(socket.SHUT_WR)
    joined.turn(READ | HANGUP | also)
    assert (joined.stream.sent_bytes, joined.stream.ends, joined.sock.reads) == (8, 1, 2)


async def test_a_service_on_another_host_stands_when_an_event_says_so(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over loopback connections stand at once; elsewhere they do not, and that way must work as well."""
    monkeypatch.setattr(delivery_module, "is_connected", lambda sock: False)
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        assert await exchange(plane.add_door(), pattern(100_000)) == pattern(100_000)


async def test_a_service_on_this_host_is_reached_in_the_turn_that_asks_for_it(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")

    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(serve))
        desk, waiting = relay.desk, []
        admit = desk.admit

        def looked_at(*args: Any) -> None:
            admit(*args)
            waiting.append(len(desk.connecting))

        monkeypatch.setattr(desk, "admit", looked_at)
        stream = await connect(plane.add_door())
        assert await receive_all(stream) == b"hello"
        assert waiting == [0]
        await stream.aclose()


async def test_what_a_client_has_said_leaves_with_its_opening(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        is_time: list[bool] = []
        port = plane.add_door()
        plane.doors[0].hold_until(lambda: bool(is_time), plane.reactor.now + 10)
        async with await connect(port) as stream:
            await stream.send_all(b"word")
            session = relay.far_session
            send, written = session._send, []

            def noted(data: memoryview) -> int:
                written.append(bytes(data))
                return send(data)

            session._send = noted
            is_time.append(True)
            assert await receive_exactly(stream, 4) == b"word"
        assert [b"word" in data for data in written if SERVICE.encode() in data] == [True]
