"""What of a byte stream the WebSocket library gets to see."""

import pytest
import trio
from trio.testing import memory_stream_pair

from fxtunnel.control.guard import GuardedStream

PING, TEXT, CLOSE = b"\x89\x01p", b"\x81\x02{}", b"\x88\x00"


@pytest.mark.parametrize("piece_bytes", [1, 100])
async def test_a_ping_of_the_websocket_ends_the_link(piece_bytes: int) -> None:
    ours, theirs = memory_stream_pair()
    guarded = GuardedStream(ours, head=b"", rest=b"", max_payload_bytes=100)
    seen = b""

    async def see(data: bytes) -> None:
        nonlocal seen
        await theirs.send_all(data)
        goal = len(seen) + len(data)
        while len(seen) < goal:
            seen += await guarded.receive_some(piece_bytes)

    await see(TEXT + CLOSE)
    with pytest.raises(trio.BrokenResourceError, match="a WebSocket ping"):
        await see(PING)
    assert seen.startswith(TEXT + CLOSE)
