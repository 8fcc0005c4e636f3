"""Frame headers at every boundary, OPEN's tags in every wrong shape, codes and texts there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.frames import MAX_LENGTH, MIN_LENGTH, check_header
from tests.protocol.recording import parse

LONGEST = 2**24 - 1
ON_SESSION = (frames.ACK, frames.PING, frames.PONG, frames.GOAWAY)


def stream_for(kind: int) -> int:
    return 0 if kind in ON_SESSION else 7


def boundaries(low: int, high: int) -> list[int]:
    return sorted({0, 1, max(low - 1, 0), low, high, high + 1, LONGEST})


LENGTHS = [(kind, length) for kind in MAX_LENGTH for length in boundaries(MIN_LENGTH[kind], MAX_LENGTH[kind])]


@pytest.mark.parametrize(("kind", "length"), LENGTHS)
def test_a_length_is_judged_by_the_table(kind: int, length: int) -> None:
    if MIN_LENGTH[kind] <= length <= MAX_LENGTH[kind]:
        check_header(kind, length, stream_for(kind))
        return
    with pytest.raises(RemoteProtocolError) as caught:
        check_header(kind, length, stream_for(kind))
    assert caught.value.code is Code.FRAME_SIZE


@pytest.mark.parametrize("kind", MAX_LENGTH)
def test_a_stream_id_belongs_to_streams_only(kind: int) -> None:
    for stream_id in (0, 1, frames.MAX_STREAM_ID):
        if (stream_id == 0) == (kind in ON_SESSION):
            check_header(kind, MIN_LENGTH[kind], stream_id)
            continue
        with pytest.raises(RemoteProtocolError) as caught:
            check_header(kind, MIN_LENGTH[kind], stream_id)
        assert caught.value.code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(MAX_LENGTH)))
def test_unknown_types_are_errors_unless_optional(kind: int) -> None:
    for stream_id in (0, 5):
        if 0x80 <= kind <= 0xEF:
            check_header(kind, 0, stream_id)
            check_header(kind, 1_024, stream_id)
            with pytest.raises(RemoteProtocolError) as caught:
                check_header(kind, 1_025, stream_id)
            assert caught.value.code is Code.FRAME_SIZE
        else:
            with pytest.raises(RemoteProtocolError) as caught:
                check_header(kind, 0, stream_id)
            assert caught.value.code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("code", Code)
def test_codes_survive_the_wire(code: Code) -> None:
    _, _, payload = parse(frames.encode_reset(3, code))
    assert Code.from_wire(frames.decode_u16(payload)) is code
    _, _, payload = parse(frames.encode_refuse(3, code, "why"))
    assert Code.from_wire(frames.decode_u16(payload)) is code
    _, _, payload = parse(frames.encode_goaway(code, "why"))
    assert (Code.from_wire(frames.decode_u16(payload)), frames.decode_text(payload)) == (code, "why")


def test_codes_of_later_versions_are_internal_errors() -> None:
    known = {int(code) for code in Code}
    assert {Code.from_wire(number) for number in range(2**16) if number not in known} == {Code.INTERNAL_ERROR}


@given(st.text(max_size=400))
def test_a_text_is_cut_to_what_the_wire_allows(text: str) -> None:
    for raw in (frames.encode_refuse(1, Code.BUSY, text), frames.encode_goaway(Code.NORMAL, text)):
        _, _, payload = parse(raw)
        assert text.startswith(frames.decode_text(payload))
        assert len(payload) - 2 >= min(len(text.encode()), frames.MAX_TEXT_BYTES - 3)


def test_a_text_that_is_no_unicode_is_sent_all_the_same() -> None:
    _, _, payload = parse(frames.encode_goaway(Code.PROTOCOL_ERROR, "bad name \udcff"))
    assert frames.decode_text(payload) == "bad name ?"


def test_a_peers_text_that_is_no_utf8_is_replaced() -> None:
    assert frames.decode_text(b"\x00\x00a\xff\xc3") == "a\ufffd\ufffd"


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_integers_survive_the_wire(large: int, small: int) -> None:
    assert frames.decode_u64(parse(frames.encode_u64(frames.PING, large))[2]) == large
    assert frames.decode_u32(parse(frames.encode_accept(1, small))[2]) == small
    assert frames.decode_u32(parse(frames.encode_credit(1, small))[2]) == small


def test_the_frames_of_a_hello_have_the_numbers_of_the_document() -> None:
    assert (frames.HELLO, frames.WELCOME, frames.DENIED) == (0xF0, 0xF1, 0xF2)
