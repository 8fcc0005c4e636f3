"""One fuzzing case: a seed, what is sent, and the bounds that hold whatever is sent."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.control.messages import MESSAGE_BYTES
from fxtunnel.control.messages import decode as decode_message
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import WindowBudget
from fxtunnel.protocol.hello import decode_hello, decode_reply, parse_header
from fxtunnel.protocol.mux import MAX_OVERFLOW_BYTES, Mux
from fxtunnel.protocol.opening import Opening, UnsupportedTag, decode_open
from fxtunnel.protocol.replay import ReplayRing
from fxtunnel.protocol.stream import Stream
from tests.fuzz.peers import TAGS, lawful_frame, mutated, noise, odd_frame, odd_open, pieces, unlawful_frame

MEMORY_BYTES: Final = 8 * 1_048_576
RING_BYTES: Final = 50_001
MAX_STREAMS: Final = 32
MAX_HELD_BYTES: Final = frames.HEADER_BYTES + max(frames.MAX_OPEN_BYTES, frames.MAX_OPTIONAL_BYTES)
FRAMES_PER_SESSION: Final = 80
PAYLOADS_PER_CASE: Final = 10


@dataclass
class Tally:
    """What a run has seen."""

    frames: int = 0
    ends: Counter[str] = field(default_factory=Counter)


class Taker:
    """An endpoint that takes its bytes some time later, or never, and talks back now and then."""

    def __init__(self, rng: random.Random, stream: Stream) -> None:
        self.rng = rng
        self.stream = stream
        self.waiting = 0
        self.stalls = rng.random() < 0.2

    def take(self) -> None:
        if not self.stalls and self.waiting:
            amount, self.waiting = self.waiting, 0
            self.stream.consumed(amount)

    def on_accept(self) -> None: ...

    def on_refuse(self, code: Code, text: str) -> None: ...

    def on_redirect(self, relay: str) -> None: ...

    def on_data(self, data: memoryview) -> None:
        self.waiting += len(data)
        assert self.waiting <= self.stream.window.window_bytes, "more waits than was granted"

    def on_last_data(self, data: memoryview) -> None:
        self.on_data(data)

    def on_fin(self) -> None:
        if self.rng.random() < 0.5:
            self.stream.fin()

    def on_reset(self, code: Code) -> None: ...

    def on_credit(self) -> None: ...


class Target:
    """A mux in one of its two roles, a link that writes what it is given, and the bounds."""

    def __init__(self, rng: random.Random, *, accepts: bool) -> None:
        self.rng = rng
        self.now = 1_000.0
        self.takers: dict[int, Taker] = {}
        self.budget = WindowBudget(MEMORY_BYTES)
        self.mux = Mux(
            ReplayRing(RING_BYTES, keep=rng.random() < 0.8),
            self.budget,
            max_streams=MAX_STREAMS,
            max_window_bytes=4 * 1_048_576,
            wake=lambda: None,
            crashed=_let_fly,
            on_open=self._on_open if accepts else None,
        )

    def _on_open(self, stream: Stream, opening: Opening) -> None:
        self._adopt(stream)
        match self.rng.randrange(8):
            case 0:
                stream.refuse(Code.BUSY, "no")
            case 1:
                stream.redirect("node-b")
            case _:
                stream.accept()

    def _adopt(self, stream: Stream) -> None:
        stream.endpoint = self.takers[stream.id] = Taker(self.rng, stream)

    def act(self) -> None:
        """What the owner of a mux does between two arrivals."""
        mux, rng = self.mux, self.rng
        self.now += rng.choice((0.0, 0.001, 0.5))
        if mux._on_open is None and len(mux.streams) < 8:
            stream = mux.open(TAGS, Taker.__new__(Taker))
            if stream is not None:
                self._adopt(stream)
        for stream in list(mux.streams.values()):
            self.takers[stream.id].take()
            room = min(stream.send_credit, mux.data_room - frames.HEADER_BYTES, 3_000)
            if room > 0 and stream.accepted and not stream.fin_sent:
                stream.sent(mux.ring.slot(room), room)
            elif rng.random() < 0.02:
                stream.reset(Code.CANCELLED)
        for taker in self.takers.values():
            if rng.random() < 0.1:
                taker.stream.emptied()
        if rng.random() < 0.1:
            mux.tick(self.now)
        mux.refill()
        mux.ring.advance(len(mux.ring.unsent(rng.choice((100, 100_000)))))

    def check(self) -> None:
        mux = self.mux
        assert len(mux.parser._held) <= MAX_HELD_BYTES
        assert len(mux.overflow) <= MAX_OVERFLOW_BYTES + MAX_HELD_BYTES
        assert len(mux.streams) <= MAX_STREAMS
        assert 0 <= mux.ring.free_bytes <= RING_BYTES
        assert mux.ring.acked <= mux.ring.sent <= mux.ring.head
        held = sum(taker.stream.window.window_bytes for taker in self.takers.values())  # of streams that ended in order: what is unread
        assert self.budget.promised_bytes + self.budget.grown_bytes == held <= MEMORY_BYTES * 5 // 8

    def finish(self) -> None:
        self.mux.reset_all(Code.LINK_LOST)
        assert not self.mux.streams
        for taker in self.takers.values():
            taker.stream.emptied()
        assert (self.budget.promised_bytes, self.budget.grown_bytes) == (0, 0)

    def feed(self, raw: bytes) -> RemoteProtocolError | None:
        """Let `raw` arrive in pieces; the error with which the session would have been closed."""
        for piece in pieces(self.rng, raw):
            try:
                self.mux.receive(piece, self.now)
            except RemoteProtocolError as exc:
                return exc
            self.check()
        return None


def live_session(rng: random.Random, tally: Tally) -> None:
    """A lawful peer that at some time sends one odd or unlawful thing; whatever it was, the bounds hold."""
    target = Target(rng, accepts=rng.random() < 0.5)
    unlawful = rng.random() < 0.5
    odd_at = rng.randrange(FRAMES_PER_SESSION)
    for turn in range(FRAMES_PER_SESSION):
        target.act()
        if turn == odd_at and unlawful:
            raw = unlawful_frame(rng, target.mux)
        elif turn == odd_at:
            raw = rng.choice((odd_frame, noise))(rng)
        else:
            raw = lawful_frame(rng, target.mux)
        tally.frames += 1
        error = target.feed(raw)
        target.check()
        if error is not None:
            assert turn >= odd_at, f"a lawful frame was refused: {error}"
            tally.ends[error.code.label] += 1
            break
        assert turn != odd_at or not unlawful, f"an unlawful frame was taken: {raw[:40].hex()}"
    else:
        tally.ends["survived"] += 1
    target.finish()


def recorded_session(rng: random.Random, tally: Tally) -> None:
    """A lawful session is recorded; then it is sent again, broken in a few places, to a mux that acts the same way."""
    seed, accepts = rng.getrandbits(64), rng.random() < 0.5
    original = Target(random.Random(seed), accepts=accepts)
    recorded = []
    for _ in range(FRAMES_PER_SESSION // 2):
        original.act()
        recorded.append(lawful_frame(rng, original.mux))
        error = original.feed(recorded[-1])
        assert error is None, f"a lawful frame was refused: {error}"
    original.finish()
    target = Target(random.Random(seed), accepts=accepts)
    broken_at = rng.randrange(len(recorded))
    recorded[broken_at] = mutated(rng, recorded[broken_at])
    tally.frames += 2 * len(recorded)
    ended = "survived"
    for raw in recorded:
        target.act()
        error = target.feed(raw)
        target.check()
        if error is not None:
            ended = error.code.label
            break
    tally.ends[ended] += 1
    target.finish()


def stray_frames(rng: random.Random, tally: Tally) -> None:
    """Odd frames and noise from the first byte on."""
    target = Target(rng, accepts=rng.random() < 0.5)
    target.act()
    for _ in range(20):
        tally.frames += 1
        error = target.feed(rng.choice((odd_frame, odd_frame, noise))(rng))
        if error is not None:
            tally.ends[error.code.label] += 1
            break
    target.finish()


def payloads(rng: random.Random, tally: Tally) -> None:
    """OPEN's tags, hellos and control messages, each on its own."""
    for _ in range(PAYLOADS_PER_CASE):
        tally.frames += 4
        _judged(tally, decode_open, odd_open(rng))
        _judged(tally, parse_header, rng.randbytes(8))
        text = odd_json(rng)
        _judged(tally, decode_hello, text)
        _judged(tally, lambda raw: decode_reply(rng.choice((frames.WELCOME, frames.DENIED)), raw), text)
        _judged(tally, decode_message, text[:MESSAGE_BYTES])
        _judged(tally, decode_message, text.decode("utf-8", "replace"))


def _judged(tally: Tally, decode: Callable[[bytes], object] | Callable[[str], object], raw: bytes | str) -> None:
    try:
        decode(raw)
    except RemoteProtocolError as exc:
        tally.ends[exc.code.label] += 1
    except UnsupportedTag:
        tally.ends["unsupported tag"] += 1
    else:
        tally.ends["decoded"] += 1


ODD_VALUES: Final[tuple[object, ...]] = (
    None,
    True,
    0,
    1,
    -1,
    1.5,
    2**63,
    2**64,
    10**400,
    "",
    "0" * 32,
    "ssh",
    "\ud800",
    "\0\n\u2028",
    [],
    ["resume"],
    {},
    [[[]]],
)
KEYS: Final = ("v", "type", "ticket", "session", "received", "window", "caps", "need", "code", "message", "retry_after_s", "n", "services")
LAWFUL: Final = (
    {"v": 1, "ticket": "t", "session": None, "received": 0, "window": 65_536, "caps": ["resume"], "need": []},
    {"v": 1, "session": "0" * 32, "received": 0, "window": 65_536, "caps": []},
    {"code": "draining", "message": "", "retry_after_s": 0},
    {"type": "hello", "version": "1", "instance": "i", "services": [{"name": "ssh", "protocol": "tcp"}]},
    {"type": "ticket", "request": 1, "ticket": "t", "expires_s": 3.0},
    {"type": "closing", "code": "fenced", "message": "", "retry_after_s": 0},
)


def odd_json(rng: random.Random) -> bytes:
    fields: dict[str, object] = dict(rng.choice(LAWFUL))
    for _ in range(rng.randrange(4)):
        fields[rng.choice(KEYS)] = rng.choice(ODD_VALUES)
    raw = json.dumps(fields).encode()
    match rng.randrange(5):
        case 0:
            return mutated(rng, raw)
        case 1:
            return rng.choice((b"[", b'{"v":', b'{"type":"ping","n":')) * rng.randrange(1, 2_000)
        case 2:
            return raw.replace(b"0", rng.choice((b"NaN", b"1e999", b"-Infinity", b"-0", b"1" * 300)))
        case _:
            return raw


CASES: Final[tuple[Callable[[random.Random, Tally], None], ...]] = (live_session, recorded_session, stray_frames, payloads)


def run_case(seed: int, number: int, tally: Tally) -> None:
    """Case `number` of a run; the two integers are all that is needed to repeat it."""
    rng = random.Random(f"{seed}/{number}")
    CASES[number % len(CASES)](rng, tally)


def _let_fly(culprit: object) -> None:
    raise  # what is being handled: a test is to see it
