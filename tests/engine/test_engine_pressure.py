"""A reader that stops stops only itself, and costs no more than its window."""

import gc
import socket

import pytest
import trio
from peers import connect, echo, exchange, hanging_port, pattern, receive_exactly, reset, until_reset
from plane import Contexts, RelaySide, open_plane

from fxgateway.doors.client import Client
from fxrelay.delivery.delivery import Delivery, DeliveryLimits
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.engine.send_scheduler import BESIDE_BYTES, SPARSE_BYTES, SPARSE_TURN_BYTES
from fxtunnel.protocol.stream import Stream

MIB = 1 << 20


async def firehose(stream: trio.SocketStream) -> None:
    """Answers one byte with as much as is taken."""
    await receive_exactly(stream, 1)
    while True:
        await stream.send_all(bytes(65_536))


async def mixed(stream: trio.SocketStream) -> None:
    """`f`: a firehose; `e`: an echo."""
    if await receive_exactly(stream, 1) == b"f":
        while True:
            await stream.send_all(bytes(65_536))
    await echo(stream)


async def test_clients_that_never_read_stop_only_themselves(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(mixed))
        port = plane.add_door()
        stalled = [await connect(port) for _ in range(20)]
        for stream in stalled:
            await stream.send_all(b"f")
        await trio.sleep(0.3)
        for _ in range(5):
            assert await exchange(port, b"e" + pattern(300_000)) == pattern(300_000)
        for client in plane.doors[0].clients:
            assert client.stream is not None
            held = len(client._pending or b"")
            assert held <= client.stream.window.window_bytes
        moved = -1
        with trio.fail_after(10):  # nobody reads, so what moves comes to an end: when first windows and the kernel's buffers are full
            while moved != (moved := sum(client.moved_bytes for client in plane.doors[0].clients)):
                await trio.sleep(0.2)
        assert relay.far_session.is_up
        for stream in stalled:
            reset(stream)


async def test_who_has_little_is_told_from_who_has_much(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(mixed))
        port = plane.add_door()
        download, typist = await connect(port), await connect(port)
        await download.send_all(b"f")
        await receive_exactly(download, 4 * MIB)  # by now its window lets it send much at once
        await typist.send_all(b"exy")
        assert await receive_exactly(typist, 2) == b"xy"
        turns = sorted(delivery.turn_bytes for delivery in relay.desk.deliveries)
        assert turns[0] == 2
        assert turns[1] >= SPARSE_BYTES
        assert sorted(client.turn_bytes for client in plane.doors[0].clients) == [1, 3]
        for stream in (download, typist):
            reset(stream)


async def test_bulk_beside_somebody_who_types_keeps_the_link_short_and_goes_on(contexts: Contexts) -> None:
    # No heartbeat, which would bring an ACK as well.
    async with open_plane(contexts, SessionConfig(hold_s=5.0, heartbeat_s=3_600, dead_after_s=7_200)) as plane:
        relay = await plane.add_relay(await plane.serve(mixed))
        port = plane.add_door()
        download, typist = await connect(port), await connect(port)
        await typist.send_all(b"e")
        while not relay.session.mux.min_rtt_s:
            await trio.sleep(0.01)
        relay.session.mux.heartbeats.min_rtt_s = 1e-4  # whatever the only PING measured on a busy machine
        await download.send_all(b"f")
        await receive_exactly(download, 4 * MIB)
        most_bytes = 0
        with trio.fail_after(20):
            for number in range(60):
                key = b"%4d" % number
                await typist.send_all(key)
                assert await receive_exactly(typist, 4) == key
                await receive_exactly(download, 300_000)
                ring = relay.session.mux.ring
                most_bytes = max(most_bytes, ring.head - ring.acked)
        assert 0 < most_bytes < BESIDE_BYTES + 2 * SPARSE_TURN_BYTES
        for stream in (download, typist):
            reset(stream)


class Taker:
    """Has `turn_bytes` to send, and sends nothing."""

    def __init__(self, turn_bytes: int) -> None:
        self.turn_bytes = turn_bytes

    def read_turn(self, limit_bytes: int) -> int:
        return 0

    def on_crash(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(("ring_bytes", "grown_bytes"), [(MIB, 2 * MIB), (2 * MIB, 2 * MIB)])
async def test_the_ring_grows_beside_somebody_who_types_only_where_it_is_what_is_short(
    contexts: Contexts, ring_bytes: int, grown_bytes: int
) -> None:
    """A path of 2.5 ms holds 610 KiB: more than half of the one ring, and less than half of the other."""
    config = SessionConfig(ring_bytes=ring_bytes)
    async with open_plane(contexts) as plane:
        session = RelaySide(plane, "b", DeliveryLimits(), config).session
        session.mux.heartbeats.min_rtt_s = 0.0025
        ring = session.mux.ring
        ring.append(bytes(700_000))
        ring.advance(700_000)
        typist, download = Taker(1), Taker(SPARSE_BYTES)
        session.want_turn(typist)
        session.want_turn(download)
        assert not session._fill(), "what is not acknowledged is enough"
        assert ring.size_bytes == grown_bytes
        session.close(Code.NORMAL)


async def test_the_ring_of_an_idle_link_is_as_small_as_at_first_again(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(heartbeat_s=0.05, dead_after_s=10)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        mux = relay.session.mux
        mux.heartbeats.min_rtt_s = 0.01
        mux.grow_ring(4 * MIB)
        assert mux.ring.size_bytes == 2 * MIB
        with trio.fail_after(10):
            while mux.ring.size_bytes != MIB:
                await trio.sleep(0.01)
        assert relay.budget.rings_bytes == 0
        assert await exchange(plane.add_door(), pattern(2 * MIB)) == pattern(2 * MIB)


async def test_services_that_never_read_stop_only_themselves(contexts: Contexts) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        if await receive_exactly(stream, 1) == b"s":
            await trio.sleep_forever()
        await echo(stream)

    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(serve))
        port = plane.add_door()
        stalled = [await connect(port) for _ in range(5)]
        for stream in stalled:
            with trio.move_on_after(0.1):
                await stream.send_all(b"s" + bytes(30 * MIB))
        assert await exchange(port, b"e" + pattern(2 * MIB)) == pattern(2 * MIB)
        for delivery in relay.desk.deliveries:
            assert delivery.stream is not None
            assert len(delivery._pending or b"") <= delivery.stream.window.window_bytes
        for stream in stalled:
            reset(stream)


async def test_stalled_reader_goes_on_where_it_stopped(contexts: Contexts) -> None:
    data = pattern(12 * MIB)

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(data)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        async with await connect(plane.add_door()) as stream:
            got = bytearray()
            for pause_s in (0.3, 0.2, 0.0):
                await trio.sleep(pause_s)
                got += await receive_exactly(stream, 2 * MIB)
            async for chunk in stream:
                got += chunk
            assert got == data


async def test_full_replay_memory_waits_for_acks_and_goes_on(contexts: Contexts) -> None:
    """The peer reads nothing for a while: the ring fills up, everything stops, and then everything goes on."""
    config = SessionConfig(heartbeat_s=0.2, dead_after_s=10, ring_bytes=262_144, max_ring_bytes=262_144)
    async with open_plane(contexts, config) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            results: list[bytes] = []

            async def one(number: int) -> None:
                results.append(await exchange(port, pattern(MIB, number)))

            for number in range(8):
                nursery.start_soon(one, number)
            assert relay.wire is not None
            while relay.wire.forwarded < MIB:
                await trio.sleep(0.002)
            for _ in range(3):
                relay.wire.silence()
                await trio.sleep(0.15)
                relay.wire.speak()
                await trio.sleep(0.02)
        assert sorted(results) == sorted(pattern(MIB, number) for number in range(8))
        assert relay.session.resumed == 0


async def test_long_path_lets_replay_memory_and_windows_grow(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(heartbeat_s=0.05, dead_after_s=10)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        assert relay.wire is not None
        relay.wire.delay_s = 0.004
        await trio.sleep(0.2)
        data = pattern(3 * MIB)
        assert await exchange(plane.add_door(), data) == data
        assert relay.far_session.mux.min_rtt_s > 0.004


async def test_slow_reader_at_the_other_end_of_a_small_buffer(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        stream = await connect(plane.add_door())
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        data = pattern(60_000)

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            got = bytearray()
            while len(got) < len(data):
                got += await receive_exactly(stream, min(1_000, len(data) - len(got)))
            assert got == data
            assert await stream.receive_some(1) == b""


def left(*kinds: type) -> int:
    """Objects of these kinds that somebody still holds."""
    gc.collect()
    return sum(isinstance(found, kinds) for found in gc.get_objects())


async def test_many_open_and_reset_leave_nothing(contexts: Contexts) -> None:
    kinds = (Client, Delivery, Stream)
    before = left(*kinds)
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        handlers = len(plane.reactor._handlers)

        async def one(number: int) -> None:
            stream = await connect(port)
            if number % 3:
                await stream.send_all(pattern(number * 37))
            if number % 5 == 0:
                await stream.send_eof()
            reset(stream)

        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(one, number)
        await plane.quiet()
        assert not relay.session._scheduler.waiting
        assert not relay.far_session._scheduler.waiting
        assert len(plane.reactor._handlers) == handlers
        assert len(plane.reactor._timers) < 40, "as many as do their rounds, not one for each that came"
        assert left(*kinds) == before


async def test_relays_that_go_before_they_answer_leave_nothing(contexts: Contexts) -> None:
    kinds = (Client, Delivery, Stream)
    before = left(*kinds)
    async with open_plane(contexts) as plane:
        port = plane.add_door()
        with hanging_port() as nowhere:
            for run in range(20):
                relay = await plane.add_relay(nowhere, name=f"r{run}")
                clients = [await connect(port) for _ in range(10)]
                for client in clients[:5]:
                    await client.send_all(b"early")
                with trio.fail_after(10):
                    while len(relay.desk.connecting) < len(clients):
                        await trio.sleep(0.01)
                relay.far_session.close(Code.SHUTDOWN)
                for client in clients:
                    assert await until_reset(client, 10) == b""
                    await client.aclose()
        await plane.quiet()
        assert left(*kinds) == before
