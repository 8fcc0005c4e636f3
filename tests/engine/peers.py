"""Clients and services of the tests of the data plane, and what they may expect of TCP."""

import errno
import fcntl
import hashlib
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager

import trio

LOOPBACK = "127.0.0.1"
AT_ONCE_S = 4.0
"""On a busy machine, too; the timeouts that would bring about the same are longer: 5 s to connect, 10 s to open."""
Serve = Callable[[trio.SocketStream], Awaitable[None]]
_LINGER_NONE = struct.pack("ii", 1, 0)


def reset(stream: trio.SocketStream) -> None:
    """Close with RST."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    stream.socket.close()


async def connect(port: int) -> trio.SocketStream:
    """A client."""
    return await trio.open_tcp_stream(LOOPBACK, port)


async def refused(port: int, within_s: float = AT_ONCE_S) -> None:
    """A client that gets nothing but RST, perhaps before it knows that it is connected."""
    try:
        stream = await connect(port)
    except OSError as exc:
        if "reset" in f"{exc} {exc.__cause__!r}":
            return
        raise
    assert await until_reset(stream, within_s) == b""


async def receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"end of file after {len(data)} of {size} bytes"
        data += more
    return bytes(data)


async def receive_all(stream: trio.SocketStream) -> bytes:
    """Everything up to the end of file."""
    data = bytearray()
    async for chunk in stream:
        data += chunk
    return bytes(data)


async def until_reset(stream: trio.SocketStream, within_s: float = AT_ONCE_S) -> bytes:
    """What arrives before the RST; fails if it does not come in time, or if an end of file comes."""
    data = bytearray()
    with trio.fail_after(within_s):
        while True:
            try:
                more = await stream.receive_some(65_536)
            except trio.BrokenResourceError as exc:
                if getattr(exc.__cause__, "errno", None) != errno.ECONNRESET:
                    raise
                await stream.aclose()
                return bytes(data)
            assert more, f"a clean end of file after {len(data)} bytes"
            data += more


@contextmanager
def hanging_port() -> Iterator[int]:
    """A port that answers no SYN: the listener's queue is full, and nobody accepts."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def until_read(stdin: trio.abc.SendStream) -> None:
    """Until a program has read all of its standard input so far: what is written next comes to it by itself."""
    assert isinstance(stdin, trio.lowlevel.FdStream)
    waiting = bytearray(4)
    with trio.fail_after(30):
        while fcntl.ioctl(stdin.fileno(), termios.FIONREAD, waiting) or any(waiting):
            await trio.sleep(0.005)


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes that tell when something is lost, repeated or swapped."""
    block = b"".join(hashlib.sha256(struct.pack(">II", seed, number)).digest() for number in range(min(size, 1 << 18) // 32 + 1))
    return (block * (size // len(block) + 1))[:size]


async def echo(stream: trio.SocketStream) -> None:
    """A service that sends back what it gets, and ends when its client does."""
    async for chunk in stream:
        await stream.send_all(chunk)
    await stream.send_eof()


async def exchange(port: int, data: bytes) -> bytes:
    """What an echoing service answers to `data`."""
    async with await connect(port) as stream:
        answer = b""

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            answer = await receive_all(stream)
        return answer
