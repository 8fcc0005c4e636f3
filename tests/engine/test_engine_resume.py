"""A link that is lost costs no stream a byte."""

import hashlib
import re
import socket

import pytest
import trio
from peers import connect, echo, exchange, pattern, receive_exactly, until_reset
from plane import QUICK, Contexts, Plane, RelaySide, Wire, open_plane

from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol.frames import encode

MIB = 1 << 20
PATIENT = SessionConfig(hold_s=20.0, heartbeat_s=0.1, dead_after_s=20.0)
"""For links that the test itself breaks: on a busy machine others find a link dead that only waits for its turn."""


async def wait_for_cut(relay: RelaySide, count: int) -> None:
    while relay.dialled < count:
        await trio.sleep(0.002)


async def flowing(relay: RelaySide) -> Wire:
    """Wait until bulk is under way; returns the wire that carries it, which may be another one than at first."""
    while True:
        wire = relay.wire
        assert wire is not None
        until = wire.forwarded + MIB
        while relay.wire is wire and wire.forwarded < until:
            await trio.sleep(0.002)
        if relay.wire is wire:
            return wire


async def exchange_all(port: int, count: int, size: int) -> None:
    """So many echoes at once; every hash must be right."""

    async def one(number: int) -> None:
        data = pattern(size + number, number)
        assert hashlib.sha256(await exchange(port, data)).digest() == hashlib.sha256(data).digest()

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)


async def test_twenty_cuts_in_mid_transfer(contexts: Contexts) -> None:
    async with open_plane(contexts, PATIENT) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange_all, port, 16, 3 * MIB // 2)
            for number in range(20):
                assert relay.wire is not None
                # Anywhere: in mid-record, in mid-frame, sometimes at once.
                relay.wire.cut_at = relay.wire.forwarded + 700_001 + 13_337 * number
                await wait_for_cut(relay, number + 2)
        assert relay.session.resumed == relay.far_session.resumed == 20


@pytest.mark.parametrize("at", [0, 1, 21, 22, 30, 100, 16_384, 16_407, 40_000])
async def test_cut_at_an_awkward_byte(contexts: Contexts, at: int) -> None:
    async with open_plane(contexts, PATIENT) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        assert await exchange(port, b"warm") == b"warm"
        assert relay.wire is not None
        relay.wire.cut_at = relay.wire.forwarded + at
        await exchange_all(port, 3, 100_000)
        await wait_for_cut(relay, 2)


async def test_silent_path_is_found_and_left(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(b"one")
            await receive_exactly(stream, 3)
            assert relay.wire is not None
            relay.wire.silence()
            silent_since = trio.current_time()
            await stream.send_all(b"two")
            assert await receive_exactly(stream, 3) == b"two"
            assert trio.current_time() - silent_since < QUICK.hold_s
            assert relay.session.resumed >= 1
    assert re.search(r"link of relay \S+ lost: nothing arrived for .*; streams held: 1", caplog.text)


async def test_silent_while_the_write_is_blocked(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=20.0, heartbeat_s=0.1, dead_after_s=1.0)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange_all, port, 4, 4 * MIB)
            (await flowing(relay)).silence()
        assert relay.session.resumed >= 1


async def test_cut_while_the_write_is_blocked(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=20, heartbeat_s=5, dead_after_s=20)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange_all, port, 4, 4 * MIB)
            wire = await flowing(relay)
            # Buffers that have grown would take all that may be unacknowledged, and then nothing blocks.
            for end in wire.ends:
                end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            relay.far_session._link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with trio.fail_after(20):
                while not relay.far_session._blocked:
                    # Now and then all credit is used up at this moment, and there is nothing to write: go on for a bit.
                    wire.speak()
                    await trio.sleep(0.01)
                    wire.silence()
                    with trio.move_on_after(0.3):
                        while not relay.far_session._blocked:
                            await trio.sleep(0.01)
            wire.cut()
        assert relay.session.resumed == 1


async def test_hold_over_resets_both_ends(contexts: Contexts) -> None:
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hi")
        seen.append(await until_reset(stream, 10))

    async with open_plane(contexts, SessionConfig(hold_s=0.3, heartbeat_s=0.1, dead_after_s=0.5)) as plane:
        relay = await plane.add_relay(await plane.serve(serve))
        streams = [await connect(port) for port in [plane.add_door()] for _ in range(5)]
        for stream in streams:
            await receive_exactly(stream, 2)
        relay.redials = False
        assert relay.wire is not None
        relay.wire.cut()
        for stream in streams:
            assert await until_reset(stream, 10) == b""
        assert relay.far_session.state is State.CLOSED
        await plane.quiet()
        assert len(seen) == 5
        assert relay.closed_with is not None
        assert relay.closed_with[0] is Code.LINK_LOST


async def test_wrong_counters_are_refused(contexts: Contexts) -> None:
    async with open_plane(contexts, PATIENT) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        assert await exchange(plane.add_door(), pattern(600_000)) == pattern(600_000)
        far = relay.far_session
        received = relay.session.received
        relay.redials = False
        near_link, far_link, _ = await plane.tls_pair()
        far.detach("the test")
        for wrong in (0, received // 2, received + (1 << 40)):
            with pytest.raises(RemoteProtocolError):
                far.attach(far_link, wrong)
        assert far.state is State.HELD
        near_link.close()
        far_link.close()
        far.close(Code.NORMAL)
        with pytest.raises(RemoteProtocolError):
            far.attach(far_link, received)


async def test_streams_that_are_opened_without_a_link_wait_for_it(contexts: Contexts) -> None:
    async with open_plane(contexts, PATIENT) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        assert await exchange(port, b"warm") == b"warm"
        relay.redials = False
        assert relay.wire is not None
        relay.wire.cut()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange_all, port, 8, 20_000)
            while not all(client.waits_for_link for client in plane.doors[0].opening) or len(plane.doors[0].opening) < 8:
                await trio.sleep(0.01)
            assert not relay.session.is_up
            relay.redials = True


async def test_link_taken_over_while_it_works(contexts: Contexts) -> None:
    async with open_plane(contexts, PATIENT) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange_all, port, 6, 3 * MIB)
            for _ in range(6):
                await trio.sleep(0.03)
                await relay.link_up()
        assert relay.session.resumed >= 6


async def test_late_bytes_of_a_retired_link_change_nothing(contexts: Contexts) -> None:
    """The gateway takes a new link while bytes of the old one are still on their way."""
    async with open_plane(contexts, PATIENT) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange_all, port, 4, 2 * MIB)
            for _ in range(3):
                await trio.sleep(0.04)
                zombie = relay.wire
                assert zombie is not None
                zombie.silence()
                await trio.sleep(0.02)
                await relay.link_up()
                zombie.speak()


async def lost_link(plane: Plane, relay: RelaySide) -> None:
    relay.redials = False
    assert relay.wire is not None
    relay.wire.cut()
    with trio.fail_after(15):
        while relay.far_session.is_up or relay.session.is_up:
            await trio.sleep(0.005)


async def test_without_resumption_a_lost_link_is_the_end(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(resume=False, heartbeat_s=0.1, dead_after_s=20)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        assert await exchange(port, pattern(3 * MIB)) == pattern(3 * MIB)
        stream = await connect(port)
        await stream.send_all(b"x")
        await receive_exactly(stream, 1)
        await lost_link(plane, relay)
        assert await until_reset(stream) == b""
        assert relay.session.state is State.CLOSED


async def test_goodbye_gets_through_a_blocked_link(contexts: Contexts) -> None:
    """A deliberate end must reach the peer as one, or it holds the streams for `hold_s` in vain."""

    async def serve(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(bytes(65_536))

    async with open_plane(contexts, SessionConfig(hold_s=20)) as plane:
        relay = await plane.add_relay(await plane.serve(serve))
        port = plane.add_door()
        streams = [await connect(port) for _ in range(4)]

        async def drain(stream: trio.SocketStream) -> None:
            await until_reset(stream, 15)

        assert relay.wire is not None
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(drain, stream)
            await flowing(relay)
            relay.wire.silence()
            with trio.fail_after(15):
                while not relay.session._blocked:
                    await trio.sleep(0.01)
            relay.session.close(Code.SHUTDOWN, "the test")
            relay.wire.speak()
        assert relay.far_session.state is State.CLOSED


async def test_goodbye_gets_through_when_replay_memory_is_full(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=20, ring_bytes=262_144, max_ring_bytes=262_144)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        stream = await connect(port)
        await stream.send_all(b"x")
        await receive_exactly(stream, 1)
        ring = relay.far_session.mux.ring
        while ring.free_bytes > 1_024:  # ACKs come at every 128 KiB, or with the next PING: until then optional frames fill the ring
            ring.append(encode(0x80, 0, bytes(1_016)))
        ring.append(encode(0x80, 0, bytes(ring.free_bytes - 8)))
        relay.far_session.close(Code.REVOKED, "the test")
        assert await until_reset(stream) == b""
        with trio.fail_after(15):
            while relay.closed_with is None:
                await trio.sleep(0.01)
        assert relay.closed_with[0] is Code.REVOKED


async def test_goodbye_gets_through_behind_more_than_a_peer_may_have_us_answer(contexts: Contexts) -> None:
    """It is told `overload`: one that hears nothing comes back, for a session that is over."""
    async with open_plane(contexts, SessionConfig(hold_s=20)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        mux = relay.far_session.mux
        while not mux.overrun:
            mux.queue(encode(0x80, 0, bytes(1_016)))
        with trio.fail_after(15):
            while relay.closed_with is None:
                await trio.sleep(0.01)
        assert relay.closed_with[0] is Code.OVERLOAD
