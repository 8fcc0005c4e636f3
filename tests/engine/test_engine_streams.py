"""Bytes and endings of streams: what TCP promises must hold across a tunnel."""

import hashlib
import socket

import pytest
import trio
from peers import connect, echo, exchange, hanging_port, pattern, receive_all, receive_exactly, reset, until_reset
from plane import Contexts, open_plane

MIB = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_bytes_come_back_as_they_were_sent(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as stream:
            for size in (1, 64, 5_000):
                await stream.send_all(pattern(size))
                assert await receive_exactly(stream, size) == pattern(size)


async def test_bulk_both_ways_at_once(contexts: Contexts) -> None:
    data = pattern(6 * MIB + 12_345)
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        assert sha256(await exchange(plane.add_door(), data)) == sha256(data)


async def test_many_streams_at_once_keep_their_bytes_apart(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()

        async def one(number: int) -> None:
            data = pattern(150_000 + number, number)
            assert sha256(await exchange(port, data)) == sha256(data)

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(one, number)


async def test_client_ends_first_and_still_gets_the_answer(contexts: Contexts) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        request = await receive_all(stream)
        await trio.sleep(0.02)
        await stream.send_all(sha256(request).encode() + pattern(2 * MIB))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(pattern(300_000, 3))
            await stream.send_eof()
            answer = await receive_all(stream)
        assert answer == sha256(pattern(300_000, 3)).encode() + pattern(2 * MIB)


async def test_service_ends_first_and_still_gets_the_rest(contexts: Contexts) -> None:
    got = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(pattern(100_000))
        await stream.send_eof()
        assert await receive_all(stream) == pattern(2 * MIB, 1)
        got.set()

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        async with await connect(plane.add_door()) as stream:
            assert await receive_all(stream) == pattern(100_000)
            await stream.send_all(pattern(2 * MIB, 1))
            await stream.send_eof()
            await got.wait()


async def test_data_and_end_in_one_segment(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        for size in (0, 1, 4_095, 4_096, 4_097, 32_768, 32_769, 65_536):
            assert await exchange(port, pattern(size)) == pattern(size)


async def test_urgent_data_stops_nothing_and_is_not_lost(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(b"hello")
            await receive_exactly(stream, 5)
            await stream.socket.send(b"before")
            await stream.socket.send(b"!", socket.MSG_OOB)
            await stream.socket.send(b"behind")
            with trio.fail_after(4):
                assert await receive_exactly(stream, 13) == b"before!behind"


@pytest.mark.parametrize("before", [b"", b"x" * 10, pattern(200_000)], ids=["no data", "some data", "much data"])
async def test_reset_of_the_client_reaches_the_service(contexts: Contexts, before: bytes) -> None:
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hi")
        seen.append(await until_reset(stream))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        stream = await connect(plane.add_door())
        assert await receive_exactly(stream, 2) == b"hi"
        await stream.send_all(before)
        await trio.sleep(0.02)
        reset(stream)
        await plane.quiet()
        with trio.fail_after(10):
            while not seen:
                await trio.sleep(0.01)
        assert before.startswith(seen[0])


@pytest.mark.parametrize("size", [0, 10, 100_000])
async def test_reset_of_the_service_reaches_the_client(contexts: Contexts, size: int) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(pattern(size))
        reset(stream)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        port = plane.add_door()
        for _ in range(10):
            stream = await connect(port)
            assert pattern(size).startswith(await until_reset(stream))


async def test_service_that_closes_with_unread_data(contexts: Contexts) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await receive_exactly(stream, 1)
        await trio.sleep(0.02)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        stream = await connect(plane.add_door())
        await stream.send_all(b"x" * 1000)
        assert await until_reset(stream) == b""


async def test_reset_behind_a_half_close(contexts: Contexts) -> None:
    async def resets_after_the_end(stream: trio.SocketStream) -> None:
        await receive_all(stream)
        reset(stream)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(resets_after_the_end))
        stream = await connect(plane.add_door())
        await stream.send_all(b"x" * 10_000)
        await stream.send_eof()
        assert await until_reset(stream) == b""


async def test_client_resets_after_its_end(contexts: Contexts) -> None:
    ended = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        assert await receive_all(stream) == b"x"
        ended.set()
        while True:
            await stream.send_all(bytes(100_000))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        stream = await connect(plane.add_door())
        await stream.send_all(b"x")
        await stream.send_eof()
        await ended.wait()
        await trio.sleep(0.1)  # the window is used up: nobody reads
        reset(stream)
        await plane.quiet(4.0)


@pytest.mark.parametrize("wait_s", [0.0, 0.1], ids=["with the data", "behind the data"])
async def test_reset_of_the_client_is_seen_while_the_service_does_not_read(contexts: Contexts, wait_s: float) -> None:
    stalled, ended = trio.Event(), trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stalled.wait()
        await until_reset(stream)
        ended.set()

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        stream = await connect(plane.add_door())
        with trio.move_on_after(0.3):
            while True:
                await stream.send_all(bytes(65_536))
        await trio.sleep(wait_s)
        reset(stream)
        await plane.quiet(4.0)
        stalled.set()
        with trio.fail_after(10):
            await ended.wait()


async def test_reset_that_comes_with_more_data_than_there_is_credit(contexts: Contexts) -> None:
    """Data and RST are there before the first look: the credit runs out on the data, and no edge tells of the RST any more."""
    async with open_plane(contexts) as plane:
        with hanging_port() as nowhere:
            await plane.add_relay(nowhere)
            port = plane.add_door()
            door = plane.doors[0]
            door._pause("the test")
            stream = await connect(port)
            await stream.socket.send(bytes(60_000))
            reset(stream)
            with trio.fail_after(10):
                while not door.counters.accepted:
                    await trio.sleep(0.01)
            await plane.quiet(4.0)


async def test_reset_of_the_service_is_seen_while_the_client_does_not_read(contexts: Contexts) -> None:
    is_reset = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        with trio.move_on_after(0.3):
            while True:
                await stream.send_all(bytes(65_536))
        reset(stream)
        is_reset.set()

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        stream = await connect(plane.add_door())
        with trio.fail_after(10):
            await is_reset.wait()
        await plane.quiet(4.0)
        await until_reset(stream)
