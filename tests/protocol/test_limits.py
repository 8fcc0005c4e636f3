"""The bounds of PROTOCOL.md, 5, to the byte; and what a session keeps count of, and lets go of."""

import re

import pytest

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.mux import ACK_EVERY_BYTES, MAX_OVERFLOW_BYTES, RING_RESERVE_BYTES
from tests.protocol.mux_pair import TAGS, Pair
from tests.protocol.recording import CollectingSink
from tests.protocol.test_vectors import DOCUMENT

TABLE = {
    frames.DATA: (1, 262_144),
    frames.OPEN: (4, 2_048),
    frames.ACCEPT: (4, 4),
    frames.REFUSE: (2, 258),
    frames.REDIRECT: (1, 64),
    frames.CREDIT: (4, 4),
    frames.FIN: (0, 0),
    frames.RESET: (2, 2),
    frames.ACK: (8, 8),
    frames.PING: (8, 8),
    frames.PONG: (8, 8),
    frames.GOAWAY: (2, 258),
}
OF_A_SESSION = (frames.ACK, frames.PING, frames.PONG, frames.GOAWAY)


def code_of(kind: int, length: int, stream_id: int) -> Code | None:
    try:
        frames.check_header(kind, length, stream_id)
    except RemoteProtocolError as exc:
        return exc.code
    return None


@pytest.mark.parametrize("kind", TABLE)
def test_every_length_is_bounded_to_the_byte(kind: int) -> None:
    low, high = TABLE[kind]
    stream_id, other = (0, 1) if kind in OF_A_SESSION else (1, 0)
    assert code_of(kind, low, stream_id) is code_of(kind, high, stream_id) is None
    assert code_of(kind, high + 1, stream_id) is Code.FRAME_SIZE
    assert code_of(kind, 0xFF_FFFF, stream_id) is Code.FRAME_SIZE
    if low:
        assert code_of(kind, low - 1, stream_id) is Code.FRAME_SIZE
    assert code_of(kind, low, other) is Code.PROTOCOL_ERROR
    assert code_of(kind, low, frames.MAX_STREAM_ID) is (Code.PROTOCOL_ERROR if kind in OF_A_SESSION else None)


@pytest.mark.parametrize(
    ("kind", "length", "code"),
    [
        (0x7F, 0, Code.PROTOCOL_ERROR),
        (0x80, 0, None),
        (0x80, 1_024, None),
        (0xEF, 1_025, Code.FRAME_SIZE),
        (0xEF, 1_024, None),
        (0xF0, 2, Code.PROTOCOL_ERROR),
        (0x0C, 0, Code.PROTOCOL_ERROR),
    ],
)
def test_types_of_later_versions(kind: int, length: int, code: Code | None) -> None:
    assert code_of(kind, length, 0) is code_of(kind, length, 7) is code


def test_the_document_gives_the_same_bounds() -> None:
    rows = dict(re.findall(r"^\| 0x\w\w \| ([A-Z]+) \| (?:id|0) \| ([^|]+) \|", DOCUMENT, re.MULTILINE))
    assert rows["DATA"] == "1 … 262,144 bytes"
    assert rows["OPEN"].endswith("≤ 2,048 bytes in all")
    assert rows["REFUSE"] == rows["GOAWAY"] == "code u16, UTF-8 text ≤ 256 bytes"
    assert rows["REDIRECT"] == "relay id, 1 … 64 bytes ASCII"
    assert "up to 4,096 bytes of DATA right after OPEN" in DOCUMENT
    assert "ACK at least every 128 KiB" in DOCUMENT
    assert "1 … 2^31-1" in rows["CREDIT"]
    limits = (frames.EARLY_BYTES, frames.MAX_HELLO_BYTES, frames.MAX_CREDIT, frames.MAX_STREAM_ID, ACK_EVERY_BYTES)
    assert limits == (4_096, 4_096, 2**31 - 1, 2**32 - 1, 131_072)


def test_what_dos_promises_of_a_session() -> None:
    """docs/dos.md: 4 MiB of control frames that the peer does not acknowledge."""
    assert (MAX_OVERFLOW_BYTES, RING_RESERVE_BYTES) == (4 << 20, 16_384)


def test_streams_count_their_bytes_both_ways() -> None:
    """Doors go by it: a stream on which nothing has moved may be opened elsewhere, and one that is idle ends."""
    pair = Pair()
    ours = pair.gateway.open()
    pair.pump()
    theirs = pair.relay.streams[ours.id]
    theirs.accept()
    pair.pump()
    pair.gateway.send(ours, 1_000)
    pair.pump()
    pair.relay.send(theirs, 70)
    pair.pump()
    assert (ours.bytes_out, ours.bytes_in) == (1_000, 70)
    assert (theirs.bytes_in, theirs.bytes_out) == (1_000, 70)


def test_a_closed_stream_lets_go_of_its_endpoint() -> None:
    """A cycle would keep both, and a socket's buffers, until the garbage collector comes."""
    pair = Pair()
    ours = pair.gateway.open()
    ours.reset(Code.CANCELLED)
    assert ours.endpoint is None


def test_a_session_that_is_over_gives_its_memory_back_and_hears_nothing() -> None:
    pair = Pair()
    mux = pair.gateway.mux
    pair.gateway.open()
    woken = pair.gateway.woken
    mux.dispose()
    mux.parser.feed(memoryview(frames.encode_accept(1, 65_536)))
    mux.queue(b"")
    assert pair.gateway.woken == woken
    assert not mux.streams[1].accepted
    assert not mux.ring.slot(10)
    assert mux._on_open is None


def test_a_frame_that_was_cut_belongs_to_its_stream() -> None:
    sink = CollectingSink()
    for piece in (frames.encode(frames.DATA, 7, b"abc")[:9], b"bc", frames.encode_open(8, 1, TAGS)):
        sink.feed(piece)
    assert sink.frames[0] == (frames.DATA, 7, b"abc")


def test_a_round_trip_is_measured_when_its_answer_arrives() -> None:
    """Windows grow by it: an old clock would make a short path look long, or a long one short."""
    mux = Pair().gateway.mux
    for now, sent in ((100.0, 99.9), (200.0, 199.95), (300.0, 299.0)):
        mux.receive(memoryview(frames.encode_u64(frames.PONG, int(sent * 1e6))), now)
    assert mux.min_rtt_s == pytest.approx(0.05, abs=1e-4)
    for answer in (0, 2**64 - 1, int(301e6)):  # what was never asked, or lies ahead, measures nothing
        mux.receive(memoryview(frames.encode_u64(frames.PONG, answer)), 300.0)
    assert mux.min_rtt_s == pytest.approx(0.05, abs=1e-4)


def test_a_closed_stream_says_nothing_more() -> None:
    pair = Pair()
    pair.gateway.open()
    pair.pump()
    theirs = pair.relay.streams[1]
    theirs.reset(Code.CANCELLED)
    pair.pump()
    head = pair.relay.ring.head
    theirs.accept()
    theirs.refuse(Code.BUSY)
    theirs.redirect("node-b")
    theirs.fin()
    theirs.reset(Code.CANCELLED)
    theirs.consumed(1 << 20)
    assert pair.relay.ring.head == head
