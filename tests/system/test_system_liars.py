"""System: a relay that is enrolled and lies. It may harm its own clients; not the gateway, and not the clients of others."""

import contextlib
import socket
import threading
from collections.abc import Callable

import psutil
import pytest
import trio

from fxtunnel.codes import Code
from fxtunnel.protocol import frames
from tests.system.liars import enrolled_liar, until
from tests.system.peers import Service, dial, is_served, say
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("liars")]

MIB = 1 << 20


def memory_bytes(stack: Stack) -> int:
    return psutil.Process(stack.gateway.pid).memory_info().rss


def push(client: socket.socket, size_bytes: int) -> threading.Thread:
    """A client that sends as much as anyone takes."""

    def run() -> None:
        with contextlib.suppress(OSError):
            client.sendall(bytes(size_bytes))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def stack(make_stack: Callable[..., Stack], echo_service: Service) -> Stack:
    """An honest relay with two services; the liar offers one of them as well."""
    stack = make_stack("echo", "shared")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target, "shared": echo_service.target})
    return stack


async def test_a_relay_cannot_make_the_gateway_keep_more_for_a_replay(stack: Stack) -> None:
    """CREDIT before ACCEPT, and then REFUSE: what was sent until then would go to the honest relay, in a frame that none may send."""
    liar = await enrolled_liar(stack, "aa-liar", "shared")
    with dial(stack.doors["echo"]) as bystander, contextlib.ExitStack() as crowd:
        say(bystander)
        async with liar.control() as control, liar.data_link(control) as line:
            before = memory_bytes(stack)
            for _ in range(4):
                push(crowd.enter_context(dial(stack.doors["shared"])), 30 * MIB)
            _, stream_id, _ = await line.wait_for(frames.OPEN)
            await line.send(frames.encode_credit(stream_id, 1 << 30))
            await trio.sleep(0.5)  # the client sends what it may
            with contextlib.suppress(trio.BrokenResourceError):
                await line.send(frames.encode_refuse(stream_id, Code.BUSY, "elsewhere, please"))
            assert await line.wait_closed() == Code.PROTOCOL_ERROR
            assert memory_bytes(stack) - before < 16 * MIB
            say(bystander, b"still here")
            await until(lambda: is_served(stack.doors["shared"]), "the honest relay serving alone")
