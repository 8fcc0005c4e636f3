"""The parser gives the same frames however the bytes are cut, counts all of them, and holds next to nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.frames import MAX_LENGTH, MIN_LENGTH
from fxtunnel.protocol.parser import FrameParser
from tests.protocol.recording import CollectingSink, Frame

MAX_HELD_BYTES = frames.HEADER_BYTES + max(frames.MAX_OPEN_BYTES, frames.MAX_OPTIONAL_BYTES)
SHORT_KINDS = sorted(set(MAX_LENGTH) - {frames.DATA})
OPTIONAL_KINDS = (0x80, 0xC3, 0xEF)


@st.composite
def whole_frames(draw: st.DrawFn) -> Frame:
    kind = draw(st.sampled_from([frames.DATA, frames.DATA, *SHORT_KINDS, *OPTIONAL_KINDS]))
    if kind in OPTIONAL_KINDS:
        low, high = 0, frames.MAX_OPTIONAL_BYTES
    else:
        low, high = MIN_LENGTH[kind], min(MAX_LENGTH[kind], 1_500)
    length = draw(st.sampled_from([low, high]) | st.integers(low, min(high, low + 24)))
    fill = draw(st.binary(min_size=1, max_size=5))
    on_session = kind in (frames.ACK, frames.PING, frames.PONG, frames.GOAWAY)
    stream_id = 0 if on_session else draw(st.integers(1, frames.MAX_STREAM_ID))
    return kind, stream_id, (fill * (length // len(fill) + 1))[:length]


SEQUENCES = st.lists(whole_frames(), max_size=12)


def joined(sequence: list[Frame]) -> bytes:
    return b"".join(frames.encode(kind, stream_id, payload) for kind, stream_id, payload in sequence)


def held_bytes(parser: FrameParser) -> int:
    return len(parser._held)


@given(SEQUENCES)
def test_whole(sequence: list[Frame]) -> None:
    sink = CollectingSink()
    raw = joined(sequence)
    sink.feed(raw)
    assert sink.frames == sequence
    assert sink.parser.received == len(raw)
    assert not sink.is_mid_frame


@given(SEQUENCES)
def test_one_byte_at_a_time(sequence: list[Frame]) -> None:
    sink = CollectingSink()
    ends = {0}
    for frame in sequence:
        ends.add(max(ends) + len(joined([frame])))
    raw = joined(sequence)
    for position in range(len(raw)):
        sink.feed(raw[position : position + 1])
        assert sink.parser.received == position + 1
        assert held_bytes(sink.parser) <= MAX_HELD_BYTES
        assert sink.is_mid_frame == (position + 1 not in ends)
    assert sink.frames == sequence


@given(SEQUENCES, st.data())
def test_random_cuts(sequence: list[Frame], data: st.DataObject) -> None:
    raw = joined(sequence)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    sink = CollectingSink()
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        sink.feed(raw[start:end])
        assert sink.parser.received == end
        assert held_bytes(sink.parser) <= MAX_HELD_BYTES
    assert sink.frames == sequence


def test_every_single_cut_of_every_kind_of_frame() -> None:
    kinds = (frames.DATA, frames.OPEN, frames.FIN, frames.DATA, frames.ACK, frames.DATA, 0x80, frames.DATA)
    sequence = [(kind, int(kind != frames.ACK), bytes(range(MIN_LENGTH.get(kind, 3)))) for kind in kinds]
    raw = joined(sequence)
    for first in range(len(raw) + 1):
        for second in (first, first + 1, first + 5, first + 8):
            sink = CollectingSink()
            for piece in (raw[:first], raw[first:second], raw[second:]):
                sink.feed(piece)
            assert sink.frames == sequence
            assert sink.parser.received == len(raw)


def test_data_passes_through_while_it_arrives() -> None:
    sink = CollectingSink()
    sink.feed(frames.encode(frames.DATA, 1, b"x" * 100)[:-40])
    assert sink.frames == [(frames.DATA, 1, b"x" * 60)]
    assert held_bytes(sink.parser) == 0
    assert sink.is_mid_frame


def test_the_longest_data_frame() -> None:
    sink = CollectingSink()
    payload = bytes(range(256)) * 1_024
    sink.feed(frames.encode(frames.DATA, 1, payload))
    assert sink.frames == [(frames.DATA, 1, payload)]


@pytest.mark.parametrize("cut", range(9))
def test_a_bad_header_is_refused_however_it_arrives(cut: int) -> None:
    raw = frames.HEADER.pack(frames.OPEN << 24 | 2**24 - 1, 1) + b"x"
    sink = CollectingSink()
    rest = raw
    if cut < frames.HEADER_BYTES:
        sink.feed(raw[:cut])
        rest = raw[cut:]
    with pytest.raises(RemoteProtocolError) as caught:
        sink.feed(rest)
    assert caught.value.code is Code.FRAME_SIZE
    assert held_bytes(sink.parser) <= frames.HEADER_BYTES


def test_a_bad_header_behind_good_frames_does_not_take_them_back() -> None:
    sink = CollectingSink()
    with pytest.raises(RemoteProtocolError):
        sink.feed(frames.encode_fin(1) + frames.encode(0x7F, 1))
    assert sink.frames == [(frames.FIN, 1, b"")]


@given(st.binary(max_size=300), st.integers(1, 20))
def test_random_bytes_are_frames_or_a_clear_error(raw: bytes, step: int) -> None:
    sink = CollectingSink()
    try:
        for position in range(0, len(raw), step):
            sink.feed(raw[position : position + step])
            assert held_bytes(sink.parser) <= MAX_HELD_BYTES
    except RemoteProtocolError:
        return
    assert sink.parser.received == len(raw)


class EndsSink(CollectingSink):
    """Also which DATA frames were handed out as the last of their stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.last: list[Frame] = []

    def on_last_data(self, stream_id: int, data: memoryview) -> None:
        self.last.append((frames.DATA, stream_id, bytes(data)))
        super().on_last_data(stream_id, data)


@pytest.mark.parametrize(
    ("behind", "is_last"),
    [
        (frames.encode_fin(7), True),
        (frames.encode_fin(7)[:-1], False),
        (frames.encode_fin(8), False),
        (frames.encode_reset(7, Code.CANCELLED), False),
        (frames.encode(frames.DATA, 7, b"more"), False),
        (b"", False),
    ],
    ids=["its FIN", "part of it", "another's", "a RESET", "more DATA", "nothing"],
)
def test_the_last_bytes_of_a_stream_are_told_apart_where_its_end_is_at_hand(behind: bytes, is_last: bool) -> None:
    sink = EndsSink()
    sink.feed(frames.encode(frames.DATA, 7, b"answer") + behind)
    assert sink.last == [(frames.DATA, 7, b"answer")] * is_last
    assert sink.frames[0] == (frames.DATA, 7, b"answer")
