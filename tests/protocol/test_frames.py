"""Frame headers at every boundary, OPEN's tags in every wrong shape, codes and texts there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol import frames
from fxtunnel.protocol.frames import MAX_LENGTH, MIN_LENGTH, Opening, UnsupportedTag, check_header, decode_open
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


NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).map(ServiceName)
ADDRESSES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)


RELAYS = NAMES.map(RelayId)


@given(NAMES, ADDRESSES, ADDRESSES, st.integers(0, 2**32 - 1), st.none() | RELAYS, st.lists(RELAYS, unique=True, max_size=4))
def test_an_opening_survives_the_wire(
    service: ServiceName, client: str, door: str, window: int, via: RelayId | None, avoid: list[RelayId]
) -> None:
    opening = Opening(service, client, door, via, tuple(avoid))
    _, _, payload = parse(frames.encode_open(9, window, frames.encode_tags(opening)))
    assert decode_open(payload) == (window, opening)


def test_an_opening_that_does_not_fit_is_our_own_mistake() -> None:
    fits = Opening(ServiceName("ssh"), "c" * (1_024 - 4 - 6 - 3))
    assert len(frames.encode_tags(fits)) == 1_020
    with pytest.raises(LocalProtocolError):
        frames.encode_tags(Opening(ServiceName("ssh"), fits.client + "c"))


def tag(number: int, value: bytes) -> bytes:
    return bytes((number,)) + len(value).to_bytes(2, "big") + value


WINDOW = b"\x00\x01\x00\x00"
SERVICE = tag(0x01, b"ssh")

MALFORMED = {
    "no tags": b"",
    "no service": tag(0x81, b"192.0.2.1:9"),
    "empty service": tag(0x01, b""),
    "service too long": tag(0x01, b"s" * 65),
    "service with a slash": tag(0x01, b"a/b"),
    "service with an address": tag(0x01, b"127.0.0.1:22"),
    "service with a space": tag(0x01, b"a b"),
    "service with a newline": tag(0x01, b"ssh\n"),
    "service with a NUL": tag(0x01, b"ssh\0"),
    "service not ASCII": tag(0x01, "sshé".encode()),
    "client not ASCII": SERVICE + tag(0x81, b"\xff"),
    "door not ASCII": SERVICE + tag(0x82, b"\x80"),
    "via empty": SERVICE + tag(0x83, b""),
    "via not ASCII": SERVICE + tag(0x83, b"\xff"),
    "via too long": SERVICE + tag(0x83, b"r" * 65),
    "via with a slash": SERVICE + tag(0x83, b"a/b"),
    "via with a newline": SERVICE + tag(0x83, b"a\n"),
    "via two relays": SERVICE + tag(0x83, b"a,b"),
    "via twice": SERVICE + tag(0x83, b"a") + tag(0x83, b"b"),
    "not empty": SERVICE + tag(0x84, b""),
    "not ends in a comma": SERVICE + tag(0x84, b"a,"),
    "not with a gap": SERVICE + tag(0x84, b"a,,b"),
    "not with a space": SERVICE + tag(0x84, b"a, b"),
    "not five relays": SERVICE + tag(0x84, b"a,b,c,d,e"),
    "not one relay twice": SERVICE + tag(0x84, b"a,b,a"),
    "not a relay too long": SERVICE + tag(0x84, b"a," + b"r" * 65),
    "via malformed beside an unknown required": SERVICE + tag(0x83, b"") + tag(0x02, b"x"),
    "service twice": SERVICE + SERVICE,
    "client twice": SERVICE + tag(0x81, b"a") + tag(0x81, b"b"),
    "unknown optional twice": SERVICE + tag(0xC0, b"") + tag(0xC0, b""),
    "unknown required twice": SERVICE + tag(0x02, b"") + tag(0x02, b""),
    "length over the end": SERVICE + b"\x81\xff\xff" + b"x" * 20,
    "length over the end by one": SERVICE + b"\x81\x00\x03ab",
    "unknown required without a service": tag(0x02, b"x"),
}


@pytest.mark.parametrize("tags", MALFORMED.values(), ids=MALFORMED)
def test_malformed_tags_are_the_peers_fault(tags: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_open(WINDOW + tags)
    assert caught.value.code is Code.PROTOCOL_ERROR


def test_an_open_cut_anywhere_is_malformed_or_shorter() -> None:
    whole = WINDOW + SERVICE + tag(0x81, b"192.0.2.1:99") + tag(0x82, b"ssh-door")
    complete = {len(WINDOW + SERVICE), len(WINDOW + SERVICE) + 15, len(whole)}
    for cut in range(4, len(whole)):
        if cut in complete:
            assert decode_open(whole[:cut])[1].service == "ssh"
            continue
        with pytest.raises(RemoteProtocolError):
            decode_open(whole[:cut])


@pytest.mark.parametrize("number", [0x00, 0x02, 0x7F])
def test_a_required_tag_that_is_unknown_is_unsupported(number: int) -> None:
    for tags in (SERVICE + tag(number, b"\xff"), tag(number, b"") + SERVICE):
        with pytest.raises(UnsupportedTag, match=f"0x{number:02x}"):
            decode_open(WINDOW + tags)


@pytest.mark.parametrize("number", [0x80, 0x85, 0xFF])
def test_an_optional_tag_that_is_unknown_is_skipped(number: int) -> None:
    assert decode_open(WINDOW + tag(number, b"\xff\x00") + SERVICE) == (65_536, Opening(ServiceName("ssh")))


def test_tags_come_in_any_order() -> None:
    assert decode_open(WINDOW + tag(0x82, b"d") + tag(0x81, b"c") + SERVICE)[1] == Opening(ServiceName("ssh"), "c", "d")


def test_what_a_redirect_adds_is_read_as_it_was_written() -> None:
    avoid = tuple(map(RelayId, ("node-b", "n" * 64, "_", ".")))
    tags = frames.encode_tags(Opening(ServiceName("ssh"))) + frames.encode_redirects(RelayId("node-a"), avoid)
    assert decode_open(WINDOW + tags)[1] == Opening(ServiceName("ssh"), via=RelayId("node-a"), avoid=avoid)
    assert frames.encode_redirects(None, ()) == b""


@given(st.binary(min_size=4, max_size=frames.MAX_OPEN_BYTES))
def test_any_bytes_are_an_opening_or_a_clear_error(payload: bytes) -> None:
    try:
        _, opening = decode_open(payload)
    except (RemoteProtocolError, UnsupportedTag):
        return
    assert len(opening.service) in range(1, 65)
