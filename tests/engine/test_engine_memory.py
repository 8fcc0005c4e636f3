"""What a session that is over still holds: nothing that counts, and that at once, for the garbage collector is made to be lazy."""

import pytest
import trio
from plane import Contexts, open_plane

from fxtunnel.codes import Code
from fxtunnel.engine.session import State
from fxtunnel.protocol import frames


def rings(*sessions: object) -> list[int]:
    return [len(session.mux.ring._buffer) for session in sessions]


@pytest.mark.parametrize("how", ["closed by us", "broken by the peer", "closed by the peer"])
async def test_replay_memory_is_given_back_when_a_session_ends(contexts: Contexts, how: str) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay()
        near, far = relay.session, relay.far_session
        assert min(rings(near, far)) > 1 << 20
        if how == "broken by the peer":
            near.mux.queue(frames.encode_fin(77))
        elif how == "closed by the peer":
            near.close(Code.SHUTDOWN)
        else:
            far.close(Code.SHUTDOWN)
        with trio.fail_after(5):
            while rings(near, far) != [0, 0]:
                await trio.sleep(0.01)
        assert near.state is far.state is State.CLOSED
