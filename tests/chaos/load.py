"""A load that checks every byte, in a process of its own: services behind the relays, and clients at the doors.

    python -m tests.chaos.load serve 127.0.0.1:0=swap 127.0.0.1:0=echo
    python -m tests.chaos.load clients '{"port": 5000, "streams": 100, "size_bytes": 1048576}'

A stream sends a head (which piece of the random block, how much, how fast), its piece, and FIN; the service sends another piece, a hash of
all it has received, and FIN. Both print a line of JSON when they stand, and another for each line on their standard input.
"""

import errno
import hashlib
import json
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

import trio

from tests.system.peers import DIGEST_BYTES, payload

HEAD: Final = struct.Struct(">QQd")
BLOCK_BYTES: Final = 1 << 16
PIECES: Final = 1_000_003
"""So many different pieces of the random block, before the first comes again."""
PAUSE_S: Final = 0.1
STALL_S: Final = 2.0


class End(StrEnum):
    """How a stream ended, as the client saw it. TURNED_AWAY: RST before the first byte. The last three must never be."""

    RIGHT = "right"
    RESET = "reset"
    TURNED_AWAY = "turned_away"
    REFUSED = "refused"
    CUT_SHORT = "cut_short"
    WRONG = "wrong"
    STUCK = "stuck"


@dataclass
class Order:
    """What clients are to do. With `repeat` each begins anew until told to finish."""

    port: int
    streams: int
    size_bytes: int = 1 << 20
    rate_bytes_per_s: float = 0.0
    stuck_s: float = 60.0
    start_per_s: float = 0.0
    repeat: bool = False
    host: str = "127.0.0.1"


@dataclass
class Tally:
    """What clients have seen so far. Of those `running`, who have a connection, the `moving` have heard something, and not all.
    `stalled_s` is the longest that any stream has waited for its next byte, `stalled` how many have waited for more than STALL_S."""

    running: int = 0
    moving: int = 0
    begun: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    bytes_heard: int = 0
    bytes_right: int = 0
    stalled: int = 0
    stalled_s: float = 0.0


async def paced(size_bytes: int, rate_bytes_per_s: float) -> AsyncIterator[slice]:
    """Pieces of the whole, no faster than that."""
    step = BLOCK_BYTES if not rate_bytes_per_s else max(1, min(BLOCK_BYTES, int(rate_bytes_per_s / 5)))
    began = trio.current_time()
    for start in range(0, size_bytes, step):
        if rate_bytes_per_s:
            await trio.sleep_until(began + start / rate_bytes_per_s)
        yield slice(start, min(size_bytes, start + step))


async def send_all(sock: trio.socket.SocketType, data: memoryview | bytes) -> None:
    """As `socket.sendall`."""
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]


class Exchange:
    """One stream of a client."""

    def __init__(self, order: Order, seed: int, tally: Tally) -> None:
        self._order = order
        self._seed = seed
        self._tally = tally
        self._moved_at = self._heard_at = 0.0
        self._was_reset = False
        self._has_stalled = False
        self._is_moving = False

    async def run(self) -> End:
        order = self._order
        with trio.socket.socket() as sock:
            try:
                await sock.connect((order.host, order.port))
            except OSError as exc:
                return End.TURNED_AWAY if exc.errno == errno.ECONNRESET else End.REFUSED
            self._tally.running += 1
            try:
                return await self._watched(sock)
            finally:
                self._tally.running -= 1
                self._tally.moving -= self._is_moving

    async def _watched(self, sock: trio.socket.SocketType) -> End:
        end = End.STUCK
        self._moved_at = self._heard_at = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while trio.current_time() - self._moved_at < self._order.stuck_s:
                    await trio.sleep(1)
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            nursery.start_soon(self._send, sock)
            end = await self._receive(sock)
            nursery.cancel_scope.cancel()
        return end

    def _heard(self) -> None:
        now = trio.current_time()
        waited_s = now - self._heard_at
        if not self._is_moving:
            self._is_moving = True
            self._tally.moving += 1
        self._tally.stalled_s = max(self._tally.stalled_s, waited_s)
        if waited_s > STALL_S and not self._has_stalled:
            self._has_stalled = True
            self._tally.stalled += 1
        self._moved_at = self._heard_at = now

    async def _send(self, sock: trio.socket.SocketType) -> None:
        order = self._order
        piece = payload(self._seed, order.size_bytes)
        try:
            await send_all(sock, HEAD.pack(self._seed, order.size_bytes, order.rate_bytes_per_s))
            async for part in paced(order.size_bytes, order.rate_bytes_per_s):
                await send_all(sock, piece[part])
                self._moved_at = trio.current_time()
            sock.shutdown(trio.socket.SHUT_WR)
        except OSError as exc:
            # A RST is told to one system call only; the reader sees a clean end then.
            self._was_reset = exc.errno == errno.ECONNRESET

    async def _receive(self, sock: trio.socket.SocketType) -> End:
        size_bytes = self._order.size_bytes
        wanted, got = payload(self._seed + 1, size_bytes), 0
        digest = b""
        try:
            while block := await sock.recv(BLOCK_BYTES):
                self._heard()
                self._tally.bytes_heard += len(block)
                inside = block[: size_bytes - got]
                if inside != wanted[got : got + len(inside)]:
                    return End.WRONG
                got += len(inside)
                digest += block[len(inside) :]
        except OSError:
            return End.RESET if got else End.TURNED_AWAY
        if len(digest) < DIGEST_BYTES:
            await trio.sleep(PAUSE_S)  # the sender may have been told of a RST, and not have had its turn
            if self._was_reset:
                return End.RESET if got else End.TURNED_AWAY
            return End.CUT_SHORT
        if digest != hashlib.sha256(payload(self._seed, size_bytes)).digest():
            return End.WRONG
        self._tally.bytes_right += 2 * size_bytes
        return End.RIGHT


class Clients:
    """All streams of an order."""

    def __init__(self, order: Order) -> None:
        self.tally = Tally()
        self._order = order
        self._is_finishing = False
        self._numbers = iter(range(1, 1 << 60))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until each has had its stream; with `repeat`, until told to finish."""
        order = self._order
        async with trio.open_nursery() as nursery:
            task_status.started()
            for _ in range(order.streams):
                nursery.start_soon(self._one)
                if order.start_per_s:
                    await trio.sleep(1 / order.start_per_s)

    def finish(self) -> None:
        """What runs is the last."""
        self._is_finishing = True

    async def _one(self) -> None:
        while not self._is_finishing:
            number = next(self._numbers)
            self.tally.begun += 1
            end = await Exchange(self._order, 2 * (number % PIECES), self.tally).run()
            self.tally.ends[end.value] = self.tally.ends.get(end.value, 0) + 1
            if not self._order.repeat:
                return
            if end is not End.RIGHT:
                await trio.sleep(PAUSE_S)


class Services:
    """What relays lead to. A clean end in the middle of an upload is a problem to report."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.accepted: Counter[str] = Counter()

    async def run(self, wanted: list[str], *, task_status: trio.TaskStatus[list[str]]) -> None:
        """Listen at `host:port=kind`; `started` with the addresses."""
        async with trio.open_nursery() as nursery:
            targets = []
            for entry in wanted:
                address, _, kind = entry.partition("=")
                host, _, port = address.rpartition(":")
                serve: Callable[[trio.socket.SocketType], Awaitable[None]] = getattr(self, f"_{kind}")
                (listener,) = await trio.open_tcp_listeners(int(port), host=host, backlog=4096)
                name = listener.socket.getsockname()
                targets.append(f"{name[0]}:{name[1]}")
                nursery.start_soon(trio.serve_listeners, self._barrier(targets[-1], serve), [listener])
            task_status.started(targets)

    def _barrier(
        self, target: str, serve: Callable[[trio.socket.SocketType], Awaitable[None]]
    ) -> Callable[[trio.SocketStream], Awaitable[None]]:
        async def handle(stream: trio.SocketStream) -> None:
            self.accepted[target] += 1
            try:
                await serve(stream.socket)
            except* OSError:
                pass  # what a service sees of a client that has gone

        return handle

    async def _swap(self, sock: trio.socket.SocketType) -> None:
        head = b""
        while len(head) < HEAD.size:
            block = await sock.recv(HEAD.size - len(head))
            if not block:
                return
            head += block
        seed, size_bytes, rate = HEAD.unpack(head)
        was_reset = False
        received, digest = 0, hashlib.sha256()

        async def send() -> None:
            nonlocal was_reset
            piece = payload(seed + 1, size_bytes)
            try:
                async for part in paced(size_bytes, rate):
                    await send_all(sock, piece[part])
            except OSError:
                was_reset = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while block := await sock.recv(BLOCK_BYTES):
                digest.update(block)
                received += len(block)
            if received != size_bytes:
                await trio.sleep(PAUSE_S)  # a RST may have been told to the sender
                nursery.cancel_scope.cancel()
                if not was_reset:
                    self.problems.append(f"stream {seed}: a clean end after {received} of {size_bytes} bytes")
                return
        if not was_reset:
            await send_all(sock, digest.digest())
            sock.shutdown(trio.socket.SHUT_WR)

    async def _echo(self, sock: trio.socket.SocketType) -> None:
        while block := await sock.recv(BLOCK_BYTES):
            await send_all(sock, block)

    async def _source(self, sock: trio.socket.SocketType) -> None:
        piece = payload(0, 1 << 20)
        while True:
            await send_all(sock, piece)


def say(what: dict[str, Any]) -> None:
    """One line for whoever started this process."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def words() -> AsyncIterator[str]:
    """Lines of standard input."""
    async with trio.lowlevel.FdStream(0) as stdin:
        rest = b""
        while block := await stdin.receive_some():
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line.decode()


async def clients(order: Order) -> None:
    """Answers "?" with the tally so far, "finish" with the tally when all have ended."""
    crowd = Clients(order)
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def run() -> None:
            await crowd.run()
            ended.set()

        nursery.start_soon(run)
        say({"started": True})
        async for word in words():
            if word == "finish":
                crowd.finish()
                await ended.wait()
            say(asdict(crowd.tally))
        nursery.cancel_scope.cancel()


async def serve(wanted: list[str]) -> None:
    """Answers any line with the problems so far."""
    services = Services()
    async with trio.open_nursery() as nursery:
        targets = await nursery.start(services.run, wanted)
        say({"targets": targets})
        async for _ in words():
            say({"problems": services.problems[:20], "accepted": services.accepted})
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        trio.run(serve, sys.argv[2:])
    else:
        trio.run(clients, Order(**json.loads(sys.argv[2])))
