"""Pure: the frame layout of PROTOCOL.md, 5: encoders and limits.

0        1                 4                        8
+--------+-----------------+------------------------+----------------
| type   | length (24 bit) | stream id (32 bit)     | payload …
+--------+-----------------+------------------------+----------------
"""

import struct
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError

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

# Bounds of payloads, as in the tables of PROTOCOL.md, 4 and 5.
MAX_DATA_BYTES: Final = 262_144
MAX_OPEN_BYTES: Final = 2_048
MAX_TEXT_BYTES: Final = 256
MAX_OPTIONAL_BYTES: Final = 1_024
MAX_HELLO_BYTES: Final = 4_096
MAX_STREAM_ID: Final = 0xFFFF_FFFF
WORN_STREAMS: Final = 0x8000_0000
"""A session that has had so many streams makes way for another, long before its ids are used up (PROTOCOL.md, 6)."""
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

_ON_SESSION: Final = frozenset({ACK, PING, PONG, GOAWAY})
_BOUNDS: Final = {kind: (MIN_LENGTH[kind], MAX_LENGTH[kind], kind in _ON_SESSION) for kind in MAX_LENGTH}
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_FRAME_U16: Final = struct.Struct(">IIH")
_FRAME_U32: Final = struct.Struct(">III")
_FRAME_U64: Final = struct.Struct(">IIQ")


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


def encode_open(stream_id: int, window_bytes: int, tags: bytes) -> bytes:
    """OPEN with the opener's first receive window; `tags` come from `opening.encode_tags`."""
    return _FRAME_U32.pack(OPEN << 24 | 4 + len(tags), stream_id, window_bytes) + tags


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
