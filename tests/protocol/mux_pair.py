"""A gateway's and a relay's mux joined in memory, by wires that can be slow, blocked half-way, and cut."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from fxtunnel.codes import Code
from fxtunnel.model import ServiceName
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import WindowBudget
from fxtunnel.protocol.frames import HEADER_BYTES
from fxtunnel.protocol.mux import Mux
from fxtunnel.protocol.opening import Opening, encode_tags
from fxtunnel.protocol.replay import ReplayRing
from fxtunnel.protocol.stream import Stream

MIB = 1_048_576
TAGS = encode_tags(Opening(ServiceName("ssh"), "192.0.2.1:99", "door"))
WHOLE = 1 << 30
Event = tuple[object, ...]
_NOISE = random.Random(1).randbytes(1_000_003)


@lru_cache(maxsize=32)
def _block(stream_id: int) -> bytes:
    return _NOISE.translate(bytes((value + stream_id * 31) & 255 for value in range(256)))


def pattern(stream_id: int, start: int, length: int) -> bytes:
    """What a sender sends: different at every place and in every stream, so that nothing can be swapped unnoticed."""
    at = start % len(_NOISE)
    return (_block(stream_id) * ((at + length) // len(_NOISE) + 1))[at : at + length]


class Recorder:
    """An endpoint that writes down what it hears. It takes bytes only when it is told to."""

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream
        self.events: list[Event] = []
        self.data = bytearray()
        self.taken = 0

    @property
    def waiting(self) -> int:
        return len(self.data) - self.taken

    def take(self, amount: int) -> None:
        assert self.stream is not None
        assert amount <= self.waiting
        self.taken += amount
        self.stream.consumed(amount)
        if not self.waiting:
            self.stream.emptied()

    def on_accept(self) -> None:
        self.events.append(("accept",))

    def on_refuse(self, code: Code, text: str) -> None:
        self.events.append(("refuse", code, text))

    def on_redirect(self, relay: str) -> None:
        self.events.append(("redirect", relay))

    def on_data(self, data: memoryview) -> None:
        assert not any(event[0] in ("fin", "reset", "refuse", "redirect") for event in self.events), "data behind the end"
        self.data += data

    def on_last_data(self, data: memoryview) -> None:
        self.on_data(data)

    def on_fin(self) -> None:
        self.events.append(("fin",))

    def on_reset(self, code: Code) -> None:
        self.events.append(("reset", code))

    def on_credit(self) -> None:
        self.events.append(("credit",))


class Eager(Recorder):
    """Takes everything at once, as a socket does that is never full."""

    def on_data(self, data: memoryview) -> None:
        super().on_data(data)
        self.take(len(data))


@dataclass
class Wire:
    """One direction of a link: what was written and has not arrived, and a write that is not done yet."""

    flying: bytearray = field(default_factory=bytearray)
    blocked: bytes = b""
    passed_on: int = 0
    """How much of the blocked write is flying already, as with TLS records of one large write."""


class Side:
    """A mux, its budget, and one recorder for every stream."""

    def __init__(self, ring_bytes: int, memory_bytes: int, max_streams: int, *, resume: bool, accepts: bool) -> None:
        self.ring = ReplayRing(ring_bytes, keep=resume)
        self.budget = WindowBudget(memory_bytes)
        self.woken = 0
        self.openings: list[tuple[Stream, Opening]] = []
        self.endpoints: dict[int, Recorder] = {}
        self.streams: dict[int, Stream] = {}
        self.make_endpoint: Callable[[Stream], Recorder] = Eager
        self.on_opened: Callable[[Stream], None] = lambda stream: None
        self.mux = Mux(
            self.ring,
            self.budget,
            max_streams=max_streams,
            max_window_bytes=16 * MIB,
            wake=self._wake,
            crashed=_let_fly,
            on_open=self._opened if accepts else None,
        )

    def _wake(self) -> None:
        self.woken += 1

    def _opened(self, stream: Stream, opening: Opening) -> None:
        self.openings.append((stream, opening))
        self._adopt(stream)
        self.on_opened(stream)

    def _adopt(self, stream: Stream) -> None:
        endpoint = self.make_endpoint(stream)
        stream.endpoint = endpoint
        self.endpoints[stream.id] = endpoint
        self.streams[stream.id] = stream

    def open(self, tags: bytes = TAGS) -> Stream:
        stream = self.mux.open(tags, Recorder())
        assert stream is not None
        self._adopt(stream)
        return stream

    def heard(self, stream: Stream) -> Recorder:
        return self.endpoints[stream.id]

    def send(self, stream: Stream, length: int) -> int:
        """Send the next bytes of the stream's pattern, as far as credit and ring allow; returns how many."""
        sent = 0
        while sent < length:
            room = min(length - sent, stream.send_credit, self.mux.data_room - HEADER_BYTES, frames.MAX_DATA_BYTES)
            if room <= 0:
                break
            slot = self.ring.slot(room)
            slot[:] = pattern(stream.id, stream.bytes_out, room)
            stream.sent(slot, room)
            sent += room
        return sent


class Pair:
    """Both ends and the wires between them; the link is up from the start."""

    def __init__(
        self,
        *,
        ring_bytes: int = MIB,
        memory_bytes: int = 256 * MIB,
        max_streams: int = 1_000,
        resume: bool = True,
    ) -> None:
        self.gateway = Side(ring_bytes, memory_bytes, max_streams, resume=resume, accepts=False)
        self.relay = Side(ring_bytes, memory_bytes, max_streams, resume=resume, accepts=True)
        self.wires = {self.gateway: Wire(), self.relay: Wire()}
        self.now = 1_000.0
        self.cuts = 0

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.gateway, self.relay

    def other(self, side: Side) -> Side:
        return self.relay if side is self.gateway else self.gateway

    def open(self) -> tuple[Stream, Stream]:
        """A stream, accepted, as both ends see it."""
        ours = self.gateway.open()
        self.pump()
        theirs = self.relay.streams[ours.id]
        theirs.accept()
        self.pump()
        return ours, theirs

    def write(self, side: Side, limit: int = WHOLE) -> int:
        """One complete write to the link."""
        self.begin_write(side, limit, 0)
        return self.finish_write(side)

    def begin_write(self, side: Side, limit: int, passed_on: int) -> None:
        """A write that blocks after `passed_on` bytes. A second try has at least the bytes of the first."""
        side.mux.refill()
        wire = self.wires[side]
        offered = bytes(side.ring.unsent(max(limit, len(wire.blocked))))
        assert offered.startswith(wire.blocked)
        wire.blocked = offered
        step = max(min(passed_on, len(offered)), wire.passed_on)
        wire.flying += offered[wire.passed_on : step]
        wire.passed_on = step

    def finish_write(self, side: Side) -> int:
        wire = self.wires[side]
        length = len(wire.blocked)
        assert bytes(side.ring.unsent(length)) == wire.blocked
        wire.flying += wire.blocked[wire.passed_on :]
        wire.blocked, wire.passed_on = b"", 0
        side.ring.advance(length)
        side.mux.refill()
        return length

    def deliver(self, side: Side, limit: int = WHOLE) -> int:
        """Let up to `limit` bytes that `side` wrote arrive."""
        wire = self.wires[side]
        chunk = bytes(wire.flying[:limit])
        del wire.flying[:limit]
        if chunk:
            self.other(side).mux.receive(memoryview(chunk), self.now)
        return len(chunk)

    def cut(self) -> None:
        """The link is lost with everything on it; a new one goes on where each end says it is."""
        self.cuts += 1
        for side in self.sides:
            self.wires[side] = Wire()
        for side in self.sides:
            side.ring.rewind(self.other(side).mux.parser.received)
            side.mux.tick(self.now)

    def pump(self, sizes: Iterator[int] | None = None) -> None:
        """Move bytes both ways until nothing is left to move; `sizes` are the pieces they arrive in."""
        moved = True
        while moved:
            moved = False
            for side in self.sides:
                while self.write(side) or self.wires[side].flying:
                    moved = True
                    self.deliver(side, WHOLE if sizes is None else max(1, next(sizes)))

    def settle(self) -> None:
        """Pump, and exchange ACKs, until both replay memories are empty but for the last ACKs themselves."""
        for _ in range(1_000):
            self.pump()
            for side in self.sides:
                side.mux.tick(self.now)
            self.pump()
            if all(side.ring.head - side.ring.acked < 200 for side in self.sides):
                return
        raise AssertionError("the pair does not come to rest")

    def check_budgets(self) -> None:
        """What is promised is what live streams may hold, and what is still unread of those that have ended in order."""
        for side in self.sides:
            held = sum(stream.window.window_bytes for stream in side.streams.values())
            assert side.budget.promised_bytes + side.budget.grown_bytes == held
            for stream_id, stream in side.streams.items():
                if stream.closed and stream.window.window_bytes:
                    assert stream.fin_sent
                    assert 0 < side.endpoints[stream_id].waiting <= stream.window.window_bytes
                elif stream.fin_sent and ("fin",) in side.endpoints[stream_id].events and stream.closed:
                    assert not side.endpoints[stream_id].waiting


def _let_fly(culprit: object) -> None:
    raise  # what is being handled: a test is to see it
