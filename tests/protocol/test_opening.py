"""What an OPEN asks for: every tag there and back, and everything else refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol import frames
from fxtunnel.protocol.opening import Opening, UnsupportedTag, decode_open, encode_redirects, encode_tags

NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).map(ServiceName)
ADDRESSES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)


RELAYS = NAMES.map(RelayId)


OPENINGS = st.builds(
    Opening,
    NAMES,
    ADDRESSES,
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
    st.none() | RELAYS,
    st.lists(RELAYS, unique=True, max_size=2).map(tuple),
    st.from_regex(r"([0-9a-f]{1,32})?", fullmatch=True),
    st.from_regex(r"[a-z0-9.-]{0,60}", fullmatch=True),
    st.sampled_from(["", "http", "https", "tls"]),
    st.none() | RELAYS,
    st.from_regex(r"[A-Za-z0-9._-]{0,150}", fullmatch=True),
)


@given(OPENINGS, st.integers(0, 2**32 - 1))
def test_an_opening_survives_the_wire(opening: Opening, window: int) -> None:
    payload = frames.encode_open(9, window, encode_tags(opening))[frames.HEADER_BYTES :]
    assert decode_open(payload) == (window, opening)


def test_an_opening_that_does_not_fit_is_our_own_mistake() -> None:
    fits = Opening(ServiceName("ssh"), "c" * (2_048 - 4 - 6 - 3))
    assert len(encode_tags(fits)) == 2_044
    with pytest.raises(LocalProtocolError):
        encode_tags(Opening(ServiceName("ssh"), fits.client + "c"))


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
    "via malformed beside an unknown required": SERVICE + tag(0x83, b"") + tag(0x03, b"x"),
    "service twice": SERVICE + SERVICE,
    "client twice": SERVICE + tag(0x81, b"a") + tag(0x81, b"b"),
    "unknown optional twice": SERVICE + tag(0xC0, b"") + tag(0xC0, b""),
    "unknown required twice": SERVICE + tag(0x03, b"") + tag(0x03, b""),
    "length over the end": SERVICE + b"\x81\xff\xff" + b"x" * 20,
    "length over the end by one": SERVICE + b"\x81\x00\x03ab",
    "unknown required without a service": tag(0x03, b"x"),
    "node empty": SERVICE + tag(0x02, b""),
    "node with an address": SERVICE + tag(0x02, b"127.0.0.1:22"),
    "trace empty": SERVICE + tag(0x85, b""),
    "trace not hexadecimal": SERVICE + tag(0x85, b"12\n"),
    "trace too long": SERVICE + tag(0x85, b"1" * 33),
    "host too long": SERVICE + tag(0x86, b"h" * 254),
    "host with a newline": SERVICE + tag(0x86, b"a\nb"),
    "scheme unknown": SERVICE + tag(0x87, b"gopher"),
    "ticket too long": SERVICE + tag(0x88, b"t" * 1_025),
    "ticket with an escape": SERVICE + tag(0x88, b"t\x1b["),
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


@pytest.mark.parametrize("number", [0x00, 0x03, 0x7F])
def test_a_required_tag_that_is_unknown_is_unsupported(number: int) -> None:
    for tags in (SERVICE + tag(number, b"\xff"), tag(number, b"") + SERVICE):
        with pytest.raises(UnsupportedTag, match=f"0x{number:02x}"):
            decode_open(WINDOW + tags)


@pytest.mark.parametrize("number", [0x80, 0x89, 0xFF])
def test_an_optional_tag_that_is_unknown_is_skipped(number: int) -> None:
    assert decode_open(WINDOW + tag(number, b"\xff\x00") + SERVICE) == (65_536, Opening(ServiceName("ssh")))


def test_tags_come_in_any_order() -> None:
    assert decode_open(WINDOW + tag(0x82, b"d") + tag(0x81, b"c") + SERVICE)[1] == Opening(ServiceName("ssh"), "c", "d")


def test_what_a_redirect_adds_is_read_as_it_was_written() -> None:
    avoid = tuple(map(RelayId, ("node-b", "n" * 64, "_", ".")))
    tags = encode_tags(Opening(ServiceName("ssh"))) + encode_redirects(RelayId("node-a"), avoid)
    assert decode_open(WINDOW + tags)[1] == Opening(ServiceName("ssh"), via=RelayId("node-a"), avoid=avoid)
    assert encode_redirects(None, ()) == b""


@given(st.binary(min_size=4, max_size=frames.MAX_OPEN_BYTES))
def test_any_bytes_are_an_opening_or_a_clear_error(payload: bytes) -> None:
    try:
        _, opening = decode_open(payload)
    except (RemoteProtocolError, UnsupportedTag):
        return
    assert len(opening.service) in range(1, 65)
