"""The channel over a WebSocket on memory streams: order, heartbeat, dead paths, ends."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import OUTBOX_MESSAGES, Channel
from fxtunnel.control.messages import Closing, Load, Message, Ping, Refused, encode
from fxtunnel.control.upgrade import CONTROL_PATH, accept_websocket, open_websocket, read_head
from fxtunnel.errors import RemoteProtocolError, TunnelClosed


@dataclass
class Pair:
    near: Any  # WebSocketConnection of the relay
    far: Any  # WebSocketConnection of the gateway
    near_stream: trio.abc.Stream
    far_stream: trio.abc.Stream


@asynccontextmanager
async def linked(make: Callable[[], tuple[Any, Any]] = trio.testing.memory_stream_pair) -> AsyncIterator[Pair]:
    near_stream, far_stream = make()
    async with trio.open_nursery() as nursery:
        far: list[Any] = []

        async def serve() -> None:
            far.append(await accept_websocket(nursery, far_stream, await read_head(far_stream)))

        nursery.start_soon(serve)
        near = await open_websocket(nursery, near_stream, "gw.example", CONTROL_PATH, {"Authorization": "Bearer x"})
        await trio.testing.wait_all_tasks_blocked()
        yield Pair(near, far[0], near_stream, far_stream)
        await trio.aclose_forcefully(near_stream)
        await trio.aclose_forcefully(far_stream)
        nursery.cancel_scope.cancel()


async def stuck(_: int | None = None) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


def sent_by(ws: Any) -> list[str]:
    """What goes out through it from now on."""
    texts: list[str] = []
    really = ws.send_message

    async def send(text: str) -> None:
        texts.append(text)
        await really(text)

    ws.send_message = send
    return texts


async def ended(
    channel: Channel,
    heard: list[Message] | None = None,
    *,
    heartbeat_s: float = 5,
    dead_after_s: float = 15,
    yield_s: float = 0,
    is_vouched_for: bool = False,
) -> TunnelClosed:
    on_message = (lambda _: None) if heard is None else heard.append
    with pytest.raises(TunnelClosed) as caught:
        await channel.run(
            on_message,
            heartbeat_s=heartbeat_s,
            dead_after_s=dead_after_s,
            yield_s=yield_s,
            is_vouched_for=lambda: is_vouched_for,
        )
    return caught.value


async def test_messages_arrive_in_order_and_pings_do_not_show(autojump_clock: object) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        heard: list[Message] = []
        near, far = Channel(pair.near), Channel(pair.far)
        nursery.start_soon(ended, near)
        nursery.start_soon(ended, far, heard)
        for streams in range(40):
            near.send_nowait(Load(streams=streams))
        await trio.sleep(60)
        assert heard == [Load(streams=n) for n in range(40)]
        far.end_soon(Closing(code=Code.SHUTDOWN))


async def test_a_peer_that_only_answers_pings_keeps_the_link(autojump_clock: object) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        outcome: list[TunnelClosed] = []

        async def near_end() -> None:
            outcome.append(await ended(Channel(pair.near)))

        far = Channel(pair.far)
        nursery.start_soon(near_end)
        nursery.start_soon(ended, far)
        await trio.sleep(3600)
        assert outcome == []
        far.end_soon(Closing(code=Code.NORMAL))


@pytest.mark.parametrize(("is_vouched_for", "every_s"), [(False, 3), (True, 7.5)])
async def test_the_relay_pings_and_the_gateway_answers(autojump_clock: object, is_vouched_for: bool, every_s: float) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        near_sent, far_sent = sent_by(pair.near), sent_by(pair.far)
        far = Channel(pair.far)
        nursery.start_soon(partial(ended, Channel(pair.near), heartbeat_s=3, is_vouched_for=is_vouched_for))
        nursery.start_soon(partial(ended, far, heartbeat_s=3, yield_s=1, is_vouched_for=is_vouched_for))
        await trio.sleep(3600)
        assert len(near_sent) == pytest.approx(3600 / every_s, abs=2)
        assert all('"ping"' in text for text in near_sent)
        assert all('"pong"' in text for text in far_sent)
        far.end_soon(Closing(code=Code.NORMAL))


@pytest.mark.parametrize("yield_s", [0, 1])
@pytest.mark.parametrize("is_vouched_for", [False, True])
async def test_a_silent_peer_is_found_dead_in_time(autojump_clock: object, is_vouched_for: bool, yield_s: float) -> None:
    async with linked() as pair:
        started = trio.current_time()
        # Nobody runs the far channel.
        closed = await ended(Channel(pair.near), dead_after_s=15, is_vouched_for=is_vouched_for, yield_s=yield_s)
        assert closed.code is Code.LINK_LOST
        assert trio.current_time() - started == pytest.approx(15)


async def test_a_peer_that_takes_nothing_is_found_dead_in_time(autojump_clock: object) -> None:
    async with linked(trio.testing.lockstep_stream_pair) as pair, trio.open_nursery() as nursery:
        channel, started = Channel(pair.near), trio.current_time()

        async def chatter() -> None:  # speaks, but its reader is stuck
            while True:
                await pair.far.send_message(encode(Load(streams=1)))
                await trio.sleep(1)

        nursery.start_soon(chatter)
        pair.far._stream._stream.receive_some = stuck
        for _ in range(OUTBOX_MESSAGES):
            channel.send_nowait(Load(streams=1))
        with pytest.raises(TunnelClosed) as caught:
            channel.send_nowait(Load(streams=1))
        assert caught.value.code is Code.OVERLOAD
        assert (await ended(channel)).code is Code.OVERLOAD
        assert trio.current_time() - started < 16
        nursery.cancel_scope.cancel()


async def test_closing_is_seen_by_the_callback_and_ends_the_link(autojump_clock: object) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        heard: list[Message] = []
        far = Channel(pair.far)
        nursery.start_soon(ended, far)
        far.send_nowait(Load(streams=1))
        far.end_soon(Closing(code=Code.FENCED, message="another instance", retry_after_s=2))
        far.end_soon(Closing(code=Code.SHUTDOWN))
        closed = await ended(Channel(pair.near), heard)
        assert heard == [Load(streams=1), Closing(code=Code.FENCED, message="another instance", retry_after_s=2)]
        assert (closed.code, closed.by_peer, str(closed)) == (Code.FENCED, True, "another instance")


async def test_after_the_end_nothing_can_be_sent(autojump_clock: object) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        far = Channel(pair.far)
        nursery.start_soon(ended, Channel(pair.near))
        far.end_soon(Closing(code=Code.REVOKED))
        with pytest.raises(TunnelClosed) as caught:
            far.send_nowait(Load(streams=1))
        assert caught.value.code is Code.REVOKED
        assert (await ended(far)).code is Code.REVOKED


async def test_goodbye_instead_of_run_delivers_the_refusal(autojump_clock: object) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        nursery.start_soon(Channel(pair.far).goodbye, Refused(code=Refusal.TOO_MANY, retry_after_s=9))
        near = Channel(pair.near)
        assert await near.receive() == Refused(code=Refusal.TOO_MANY, retry_after_s=9)
        with pytest.raises(TunnelClosed) as caught:
            await near.receive()
        assert caught.value.code is Code.NORMAL


async def test_goodbye_to_a_dead_peer_takes_a_second(autojump_clock: object) -> None:
    async with linked(trio.testing.lockstep_stream_pair) as pair:
        pair.far._stream._stream.receive_some = stuck
        started = trio.current_time()
        await Channel(pair.near).goodbye(Closing(code=Code.SHUTDOWN))
        assert trio.current_time() - started == pytest.approx(1)


@pytest.mark.parametrize("text", ["nonsense", '{"type":"new","required":true}', b"binary"])
async def test_a_malformed_message_ends_the_link_and_the_peer_is_told(autojump_clock: object, text: str | bytes) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        heard: list[Message] = []
        nursery.start_soon(ended, Channel(pair.near), heard)
        await pair.near.send_message(text)
        closed = await ended(Channel(pair.far))
        await trio.testing.wait_all_tasks_blocked()
        assert not closed.by_peer
        assert closed.code in (Code.PROTOCOL_ERROR, Code.UNSUPPORTED)
        assert [m.code for m in heard if isinstance(m, Closing)] == [closed.code]


async def test_a_callback_can_find_the_peer_at_fault(autojump_clock: object) -> None:
    def complain(_: Message) -> None:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "a second hello")

    async with linked() as pair:
        await pair.near.send_message(encode(Load(streams=1)))
        with pytest.raises(TunnelClosed, match="a second hello"):
            await Channel(pair.far).run(complain, heartbeat_s=5, dead_after_s=15)


async def test_a_ping_flood_from_a_peer_that_never_reads_ends_the_link(autojump_clock: object) -> None:
    async with linked(trio.testing.lockstep_stream_pair) as pair, trio.open_nursery() as nursery:

        async def flood() -> None:
            while True:
                await pair.near.send_message(encode(Ping(n=1)))

        pair.near._stream._stream.receive_some = stuck
        nursery.start_soon(flood)
        assert (await ended(Channel(pair.far))).code is Code.OVERLOAD
        nursery.cancel_scope.cancel()


async def test_a_lost_connection_ends_the_link(autojump_clock: object) -> None:
    async with linked() as pair, trio.open_nursery() as nursery:
        await trio.aclose_forcefully(pair.far_stream)
        nursery.start_soon(pair.far.aclose)
        assert (await ended(Channel(pair.near))).code is Code.LINK_LOST


@pytest.mark.parametrize(
    ("frame", "is_harmful"),
    [
        (b"\x01\x01x", True),  # FIN=0
        (b"\x00\x01x", True),  # continuation, FIN=0
        (b"\x80\x01x", True),  # continuation
        (b"\x81\x7e\x40\x01", True),  # 16,385 bytes
        (b"\x81\x7f\xff\xff\xff\xff\xff\xff\xff\xff", True),
        (b"\x81\x10" + b'{"type":"other"}', False),
    ],
)
async def test_only_small_unfragmented_frames_pass(autojump_clock: object, frame: bytes, is_harmful: bool) -> None:
    async with linked() as pair:
        for byte in frame:  # cut anywhere
            await pair.far_stream.send_all(bytes([byte]))
        closed = await ended(Channel(pair.near), dead_after_s=15)
        assert str(closed) == ("the connection was lost" if is_harmful else "nothing heard from the peer for 15 s")
