"""A peer that makes its bytes dear takes turns like everybody else."""

import os
import time
from typing import cast
from unittest.mock import Mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from peers import connect, echo, exchange, pattern, receive_exactly
from plane import SERVICE, Contexts, open_plane

from fxtunnel.codes import Code
from fxtunnel.engine.read_share import LONG_S, ReadShare
from fxtunnel.engine.session import RECORD_BYTES
from fxtunnel.protocol.endpoint import Endpoint
from fxtunnel.protocol.opening import Opening, encode_tags

KIB = 1_024


@given(st.lists(st.tuples(st.integers(1, 256 * KIB), st.floats(0, 1))))
def test_a_share_stays_within_its_bounds(turns: list[tuple[int, float]]) -> None:
    share = ReadShare(16 * KIB, 256 * KIB)
    for size_bytes, took_s in turns:
        share.dealt_with(min(size_bytes, share.limit_bytes), took_s)
        assert 16 * KIB <= share.limit_bytes <= 256 * KIB


def test_a_share_shrinks_while_turns_are_long_and_grows_again_when_they_are_full() -> None:
    share = ReadShare(16 * KIB, 256 * KIB)
    sizes = []
    for _ in range(6):
        share.dealt_with(share.limit_bytes, LONG_S + 0.001)
        sizes.append(share.limit_bytes // KIB)
    assert sizes == [128, 64, 32, 16, 16, 16]
    share.dealt_with(15 * KIB, 0.0)
    assert share.limit_bytes == 16 * KIB  # what was not all used need not grow
    for _ in range(6):
        share.dealt_with(share.limit_bytes, LONG_S)
        sizes.append(share.limit_bytes // KIB)
    assert sizes[6:] == [32, 64, 128, 256, 256, 256]


async def test_a_link_whose_bytes_take_long_is_read_in_small_pieces(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        mux = relay.far_session.mux
        receive, sizes = mux.receive, []

        def dear(data: memoryview, now: float) -> None:
            sizes.append(len(data))
            time.sleep(2 * LONG_S)
            receive(data, now)

        monkeypatch.setattr(mux, "receive", dear)
        assert await exchange(port, pattern(2_000_000)) == pattern(2_000_000)
        assert max(sizes[len(sizes) // 2 :]) <= RECORD_BYTES
        limits = []

        def cheap(data: memoryview, now: float) -> None:
            limits.append(relay.far_session._share.limit_bytes)
            receive(data, now)

        monkeypatch.setattr(mux, "receive", cheap)
        assert await exchange(port, pattern(3_000_000)) == pattern(3_000_000)
        assert max(limits) > RECORD_BYTES  # not at every moment: what is interrupted takes long, too


@pytest.mark.parametrize("at_once", [1, 200])
async def test_streams_that_are_opened_and_reset_at_once_leave_nothing_and_others_their_turns(contexts: Contexts, at_once: int) -> None:
    """Rapid resets (CVE-2023-44487): what one costs the sender is little, so it must be little for the relay, and be over at once."""
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        far, tags = relay.far_session, encode_tags(Opening(SERVICE, "192.0.2.1:1", "d"))
        async with await connect(plane.add_door()) as bystander:
            await bystander.send_all(b"k")
            await receive_exactly(bystander, 1)
            before, most, rounds = len(os.listdir("/proc/self/fd")), 0, 4_000 // at_once
            for number in range(rounds):
                for _ in range(at_once):
                    stream = far.mux.open(tags, cast(Endpoint, Mock(spec=Endpoint)))
                    assert stream is not None
                    stream.reset(Code.CANCELLED)
                if number % 20 == 0:
                    await bystander.send_all(b"k")
                    assert await receive_exactly(bystander, 1) == b"k"
                    most = max(most, len(relay.desk.deliveries))
            with trio.fail_after(20):
                while relay.session.mux.opened < 4_001 or len(relay.desk.deliveries) > 1 or len(os.listdir("/proc/self/fd")) > before:
                    await trio.sleep(0.02)
            assert most <= 1 + at_once
            assert relay.session.is_up
            assert len(relay.session.mux.streams) == 1
