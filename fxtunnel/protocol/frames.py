"""Pure: the frame layout of PROTOCOL.md, 5: encoders, limits, and OPEN's tags.

0        1                 4                        8
+--------+-----------------+------------------------+----------------
| type   | length (24 bit) | stream id (32 bit)     | payload …
+--------+-----------------+------------------------+----------------
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.model import RelayId, ServiceName, is_name

HEADER: Final = struct.Struct(">II")
HEADER_BYTES: Final = 8

DATA: Final = 0x00
OPEN: Final = 0x01
ACCEPT: Final = 0x02
REFUSE: Final = 0x03
REDIRECT: Final = 0x04
CREDIT: Final = 0x05
FIN: Final = 0x06
RESET: Final = 0x07
ACK: Final = 0x08
PING: Final = 0x09
PONG: Final = 0x0A
GOAWAY: Final = 0x0B
HELLO: Final = 0xF0
WELCOME: Final = 0xF1
DENIED: Final = 0xF2

MAX_DATA_BYTES: Final = 262_144
MAX_OPEN_BYTES: Final = 1_024
MAX_TEXT_BYTES: Final = 256
MAX_OPTIONAL_BYTES: Final = 1_024
MAX_HELLO_BYTES: Final = 4_096
MAX_STREAM_ID: Final = 0xFFFF_FFFF
MAX_CREDIT: Final = 0x7FFF_FFFF
EARLY_BYTES: Final = 4_096
"""What an opener may send before ACCEPT (PROTOCOL.md, 6)."""

MIN_LENGTH: Final = {
    DATA: 1,
    OPEN: 4,
    ACCEPT: 4,
    REFUSE: 2,
    REDIRECT: 1,
    CREDIT: 4,
    FIN: 0,
    RESET: 2,
    ACK: 8,
    PING: 8,
    PONG: 8,
    GOAWAY: 2,
}
MAX_LENGTH: Final = {
    DATA: MAX_DATA_BYTES,
    OPEN: MAX_OPEN_BYTES,
    ACCEPT: 4,
    REFUSE: 2 + MAX_TEXT_BYTES,
    REDIRECT: 64,
    CREDIT: 4,
    FIN: 0,
    RESET: 2,
    ACK: 8,
    PING: 8,
    PONG: 8,
    GOAWAY: 2 + MAX_TEXT_BYTES,
}
MAX_CONTROL_BYTES: Final = max(MAX_OPEN_BYTES, MAX_OPTIONAL_BYTES)
"""The longest payload that is ever held back until it is complete."""

_ON_SESSION: Final = frozenset({ACK, PING, PONG, GOAWAY})
_BOUNDS: Final = {kind: (MIN_LENGTH[kind], MAX_LENGTH[kind], kind in _ON_SESSION) for kind in MAX_LENGTH}
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_TLV: Final = struct.Struct(">BH")
_FRAME_U16: Final = struct.Struct(">IIH")
_FRAME_U32: Final = struct.Struct(">III")
_FRAME_U64: Final = struct.Struct(">IIQ")

TAG_SERVICE: Final = 0x01
TAG_CLIENT: Final = 0x81
TAG_DOOR: Final = 0x82
TAG_VIA: Final = 0x83
TAG_NOT: Final = 0x84
MAX_AVOIDED: Final = 4
"""Relay ids that one OPEN can rule out as targets of a REDIRECT."""
_OPTIONAL_TAG: Final = 0x80
_KNOWN_TAGS: Final = frozenset({TAG_SERVICE, TAG_CLIENT, TAG_DOOR, TAG_VIA, TAG_NOT})


def check_header(kind: int, length: int, stream_id: int) -> None:
    """Hold a received header against the table of PROTOCOL.md, 5, before anything is kept for it.

    Raises:
        RemoteProtocolError: unknown type, a length out of bounds, or a stream id where none belongs.
    """
    bounds = _BOUNDS.get(kind)
    if bounds is not None:
        if bounds[0] <= length <= bounds[1] and (stream_id == 0) is bounds[2]:
            return
        if not bounds[0] <= length <= bounds[1]:
            raise RemoteProtocolError(Code.FRAME_SIZE, f"frame type 0x{kind:02x} of {length} bytes")
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"frame type 0x{kind:02x} on stream {stream_id}")
    if not 0x80 <= kind <= 0xEF:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"unknown frame type 0x{kind:02x}")
    if length > MAX_OPTIONAL_BYTES:
        raise RemoteProtocolError(Code.FRAME_SIZE, f"optional frame 0x{kind:02x} of {length} bytes")


def encode(kind: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame. The caller keeps to the table of PROTOCOL.md, 5."""
    return HEADER.pack(kind << 24 | len(payload), stream_id) + payload


def encode_accept(stream_id: int, window_bytes: int) -> bytes:
    """ACCEPT with the acceptor's first receive window."""
    return _FRAME_U32.pack(ACCEPT << 24 | 4, stream_id, window_bytes)


def encode_refuse(stream_id: int, code: Code, text: str = "") -> bytes:
    """REFUSE; the text is cut to what the wire allows."""
    return encode(REFUSE, stream_id, _U16.pack(code) + _cut(text))


def encode_credit(stream_id: int, amount_bytes: int) -> bytes:
    """CREDIT: the receiver may take that many bytes more."""
    return _FRAME_U32.pack(CREDIT << 24 | 4, stream_id, amount_bytes)


def encode_fin(stream_id: int) -> bytes:
    """FIN: nothing more comes in this direction."""
    return HEADER.pack(FIN << 24, stream_id)


def encode_reset(stream_id: int, code: Code) -> bytes:
    """RESET: both directions end, behind the DATA before it."""
    return _FRAME_U16.pack(RESET << 24 | 2, stream_id, code)


def encode_u64(kind: int, value: int) -> bytes:
    """ACK, PING or PONG."""
    return _FRAME_U64.pack(kind << 24 | 8, 0, value)


def encode_goaway(code: Code, text: str = "") -> bytes:
    """GOAWAY: the session ends, on purpose."""
    return encode(GOAWAY, 0, _U16.pack(code) + _cut(text))


def decode_u16(payload: bytes | memoryview) -> int:
    """The first two bytes of a payload."""
    value: int = _U16.unpack_from(payload)[0]
    return value


def decode_u32(payload: bytes | memoryview) -> int:
    """The first four bytes of a payload."""
    value: int = _U32.unpack_from(payload)[0]
    return value


def decode_u64(payload: bytes | memoryview) -> int:
    """The first eight bytes of a payload."""
    value: int = _U64.unpack_from(payload)[0]
    return value


def decode_text(payload: bytes | memoryview) -> str:
    """The text behind a code; bytes that are not UTF-8 are replaced, since the text only goes to a log."""
    return bytes(payload[2:]).decode("utf-8", "replace")


def _cut(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore").encode()


@dataclass(frozen=True, slots=True)
class Opening:
    """What an OPEN asks for. `client` and `door` tell where the stream comes from; they may be empty.

    `via` is the relay whose REDIRECT led here, if one did. `avoid` are relays that a REDIRECT has led to already, in vain.
    """

    service: ServiceName
    client: str = ""
    door: str = ""
    via: RelayId | None = None
    avoid: tuple[RelayId, ...] = ()


class UnsupportedTag(Exception):
    """An OPEN carries a required tag of a later version: answer REFUSE `unsupported`."""


def encode_open(stream_id: int, window_bytes: int, tags: bytes) -> bytes:
    """OPEN with the opener's first receive window; `tags` come from `encode_tags`."""
    return _FRAME_U32.pack(OPEN << 24 | 4 + len(tags), stream_id, window_bytes) + tags


def encode_tags(opening: Opening) -> bytes:
    """OPEN's tags.

    Raises:
        LocalProtocolError: the names are longer than an OPEN can carry.
    """
    tags = encode_tag(TAG_SERVICE, opening.service)
    if opening.door:
        tags += encode_tag(TAG_DOOR, opening.door)
    if opening.client:
        tags += encode_tag(TAG_CLIENT, opening.client)
    tags += encode_redirects(opening.via, opening.avoid)
    if len(tags) > MAX_OPEN_BYTES - 4:
        raise LocalProtocolError(f"OPEN of {len(tags)} bytes")
    return tags


def encode_tag(tag: int, text: str) -> bytes:
    """One tag of an OPEN; several are simply joined."""
    value = text.encode("ascii", "replace")
    return _TLV.pack(tag, len(value)) + value


def encode_redirects(via: RelayId | None, avoid: Sequence[RelayId]) -> bytes:
    """The tags that tell of earlier REDIRECTs, or nothing; at most MAX_AVOIDED names in `avoid`."""
    tags = encode_tag(TAG_VIA, via) if via is not None else b""
    return tags + encode_tag(TAG_NOT, ",".join(avoid)) if avoid else tags


def decode_open(payload: bytes | memoryview) -> tuple[int, Opening]:
    """The opener's window in bytes and what it asks for.

    Raises:
        RemoteProtocolError: the tags do not parse, repeat, or name no valid service or relays.
        UnsupportedTag: well-formed, but a required tag is not known.
    """
    raw = bytes(payload)
    window = decode_u32(raw)
    found: dict[int, str] = {}
    position = 4
    end = len(raw)
    unsupported: int | None = None
    while position < end:
        start = position + 3
        if start > end:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN ends inside a tag")
        tag = raw[position]
        position = start + (raw[position + 1] << 8 | raw[position + 2])
        if position > end:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN ends inside a value")
        if tag in found:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"OPEN repeats tag 0x{tag:02x}")
        if tag in _KNOWN_TAGS:
            try:
                found[tag] = raw[start:position].decode("ascii")
            except UnicodeDecodeError:
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"OPEN tag 0x{tag:02x} is not ASCII") from None
        else:
            found[tag] = ""
            if tag < _OPTIONAL_TAG:
                unsupported = tag
    service = found.get(TAG_SERVICE, "")
    if not is_name(service):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN names no valid service")
    opening = Opening(
        ServiceName(service),
        found.get(TAG_CLIENT, ""),
        found.get(TAG_DOOR, ""),
        _relay(found[TAG_VIA]) if TAG_VIA in found else None,
        tuple(_relay(name) for name in found[TAG_NOT].split(",")) if TAG_NOT in found else (),
    )
    if len(opening.avoid) > MAX_AVOIDED or len(set(opening.avoid)) < len(opening.avoid):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"OPEN rules out {len(opening.avoid)} relays, or one of them twice")
    if unsupported is not None:
        raise UnsupportedTag(f"tag 0x{unsupported:02x}")
    return window, opening


def _relay(name: str) -> RelayId:
    if not is_name(name):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN names no valid relay")
    return RelayId(name)
