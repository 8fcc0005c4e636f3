"""What fuzzing sends: noise, lawful sessions, and lawful sessions with something broken in them."""

import random
from collections.abc import Iterator
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.model import ServiceName
from fxtunnel.protocol import frames
from fxtunnel.protocol.frames import MAX_LENGTH, MIN_LENGTH
from fxtunnel.protocol.mux import Mux
from fxtunnel.protocol.opening import Opening, encode_tags
from fxtunnel.protocol.stream import Stream

CODES: Final = tuple(Code)
KINDS: Final = (*MAX_LENGTH, 0x0C, 0x7F, 0x80, 0xEF, frames.HELLO, frames.WELCOME, frames.DENIED, 0xFF)
INTEGERS: Final = (0, 1, 255, 256, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
TAGS: Final = encode_tags(Opening(ServiceName("ssh"), "192.0.2.1:99", "127.0.0.1:2222"))
ACCEPTS_KINDS: Final = ("DATA", "DATA", "DATA", "OPEN", "CREDIT", "FIN", "RESET", "PING", "PONG", "ACK", "OPTIONAL")
OPENS_KINDS: Final = ("DATA", "DATA", "DATA", "ACCEPT", "ACCEPT", "CREDIT", "FIN", "RESET", "REFUSE", "REDIRECT", "PING", "PONG", "ACK")


def noise(rng: random.Random) -> bytes:
    """Bytes of no shape at all."""
    return rng.randbytes(rng.randrange(1, 200))


def odd_frame(rng: random.Random) -> bytes:
    """A header with boundary values, and a payload that need not belong to it."""
    kind = rng.choice(KINDS)
    low, high = MIN_LENGTH.get(kind, 0), MAX_LENGTH.get(kind, 1_024)
    length = rng.choice((0, 1, max(low - 1, 0), low, low, high, high + 1, rng.randrange(low, min(high, low + 64) + 1), 2**24 - 1))
    stream_id = rng.choice((0, 1, 1, 2, 3, rng.randrange(64), 2**31, 2**32 - 1))
    payload = rng.choice((rng.randbytes, bytes))(min(length, 300))
    return frames.HEADER.pack(kind << 24 | length, stream_id) + payload


def odd_open(rng: random.Random) -> bytes:
    """The payload of an OPEN with tags in any shape."""
    parts = [rng.choice(INTEGERS).to_bytes(4, "big")]
    for _ in range(rng.randrange(5)):
        value = rng.choice((b"ssh", b"", b"x" * 64, b"x" * 65, b"\xff\x00", rng.randbytes(rng.randrange(40))))
        length = rng.choice((len(value), len(value), len(value), len(value) + 1, 0, 2**16 - 1))
        parts.append(bytes((rng.choice((1, 1, 1, 1, 1, 2, 3, 0x7F, 0x81, *range(0x80, 0x8A), 0xFF)),)) + length.to_bytes(2, "big") + value)
    raw = b"".join(parts)
    return raw[: rng.randrange(4, len(raw) + 1)] if rng.random() < 0.2 else raw


def lawful_frame(rng: random.Random, mux: Mux) -> bytes:
    """A frame that `mux` has to take now. It looks into the mux, as no peer can, to stay within what is allowed."""
    kind = rng.choice(ACCEPTS_KINDS if mux._on_open is not None else OPENS_KINDS)
    streams = list(mux.streams.values())
    if kind == "OPEN" or (mux._on_open is not None and not streams):
        return frames.encode_open(mux._last_id + 1, rng.choice((1, 4_096, 65_536, 2**31 - 1)), TAGS)
    if streams and kind not in ("PING", "PONG", "ACK", "OPTIONAL"):
        return _stream_frame(rng, kind, rng.choice(streams))
    if kind == "ACK":
        return frames.encode_u64(frames.ACK, rng.randrange(mux.ring.acked, mux.ring.sent + 1))
    if kind == "OPTIONAL":
        return frames.encode(rng.randrange(0x80, 0xF0), rng.randrange(3), rng.randbytes(rng.choice((0, 5, 1_024))))
    return frames.encode_u64(frames.PONG if kind == "PONG" else frames.PING, rng.choice((0, 2**64 - 1, int(mux.now * 1e6))))


def _stream_frame(rng: random.Random, kind: str, stream: Stream) -> bytes:
    answered = stream.early is None  # a relay sends nothing before its ACCEPT
    if kind == "DATA" and answered and not stream.fin_received and stream.window.left_bytes > 0:
        length = rng.choice((1, rng.randrange(1, 2_000), stream.window.left_bytes))
        return frames.encode(frames.DATA, stream.id, bytes(min(length, stream.window.left_bytes, 65_536)))
    untouched = not stream.accepted and not stream.bytes_in and not stream.fin_received
    if untouched and kind == "ACCEPT":
        return frames.encode_accept(stream.id, rng.choice((4_096, 65_536, 2**20)))
    if untouched and kind == "REFUSE":
        return frames.encode_refuse(stream.id, rng.choice(CODES), "because")
    if untouched and kind == "REDIRECT":
        return frames.encode(frames.REDIRECT, stream.id, b"node-b")
    if kind == "FIN" and answered and not stream.fin_received:
        return frames.encode_fin(stream.id)
    if kind == "RESET":
        return frames.encode_reset(stream.id, rng.choice(CODES))
    room = frames.MAX_CREDIT - stream.send_credit if answered else 0
    return frames.encode_credit(stream.id, rng.randrange(1, min(room, 2**20))) if room > 1 else frames.encode_u64(frames.PING, 1)


def unlawful_frame(rng: random.Random, mux: Mux) -> bytes:
    """A frame that `mux` must not take, whatever its state: well-formed, but out of order, over credit, or not the sender's to send."""
    accepts = mux._on_open is not None
    unknown = mux._last_id + 1 + accepts + rng.randrange(1_000)
    choices = [
        frames.encode(frames.DATA, unknown, b"x"),
        frames.encode_fin(unknown),
        frames.encode_credit(unknown, 1),
        frames.encode_open(unknown if accepts else mux._last_id + 1, 65_536, TAGS),
        frames.encode_u64(frames.ACK, mux.ring.head + 1_000_000),
        frames.encode(rng.choice((0x0C, 0x7F, frames.HELLO, 0xFF)), 0, b"{}"),
    ]
    if accepts:
        choices += [frames.encode_open(mux._last_id, 65_536, TAGS), frames.encode_open(mux._last_id + 1, 0, TAGS)]
        choices += [frames.encode_open(mux._last_id + 1, 65_536, b"\x81\x00\x01x")]
    for stream in mux.streams.values():
        choices += [frames.encode_credit(stream.id, amount) for amount in (0, frames.MAX_CREDIT - stream.send_credit + 1)]
        over = stream.window.left_bytes + 1
        if over <= frames.MAX_DATA_BYTES:
            choices.append(frames.encode(frames.DATA, stream.id, bytes(over)))
        if stream.early is not None:
            choices.append(frames.encode_credit(stream.id, 1))
        if stream.fin_received:
            choices += [frames.encode(frames.DATA, stream.id, b"x"), frames.encode_fin(stream.id)]
        if accepts or stream.accepted:
            choices += [frames.encode_accept(stream.id, 65_536), frames.encode_refuse(stream.id, Code.BUSY)]
    return rng.choice(choices)


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """The same bytes with one to four places changed, lost, repeated or swapped."""
    broken = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(broken) + 1)
        span = rng.choice((1, 1, 2, 8, 16, 100))
        match rng.randrange(6):
            case 0:
                broken[at : at + 1] = bytes((rng.randrange(256),))
            case 1:
                if at < len(broken):
                    broken[at] ^= 1 << rng.randrange(8)
            case 2:
                del broken[at : at + span]
            case 3:
                broken[at:at] = broken[at : at + span]
            case 4:
                broken[at : at + 4] = rng.choice(INTEGERS).to_bytes(4, "big")
            case _:
                broken[at:at] = odd_frame(rng)
    return bytes(broken)


def pieces(rng: random.Random, raw: bytes) -> Iterator[memoryview]:
    """`raw`, whole or in random cuts."""
    view = memoryview(raw)
    while view:
        step = rng.choice((1, 7, 8, 9, 100, 5_000, len(view)))
        yield view[:step]
        view = view[step:]
