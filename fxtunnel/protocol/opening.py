"""Pure: what an OPEN asks for, and its tags (PROTOCOL.md, 5): tag u8, length u16, value; each at most once.

Tags below 0x80 change what is asked for, and must be understood; the others only tell, and may be left alone.
"""

import re
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.model import RelayId, ServiceName, is_name
from fxtunnel.protocol.frames import MAX_OPEN_BYTES, decode_u32

TAG_SERVICE: Final = 0x01
TAG_NODE: Final = 0x02
TAG_CLIENT: Final = 0x81
TAG_DOOR: Final = 0x82
TAG_VIA: Final = 0x83
TAG_NOT: Final = 0x84
TAG_TRACE: Final = 0x85
TAG_HOST: Final = 0x86
TAG_SCHEME: Final = 0x87
TAG_TICKET: Final = 0x88

MAX_AVOIDED: Final = 4
"""Relay ids that one OPEN can rule out as targets of a REDIRECT."""
MAX_HOST_BYTES: Final = 253
MAX_TICKET_BYTES: Final = 1_024
_OPTIONAL_TAG: Final = 0x80
_KNOWN_TAGS: Final = frozenset({TAG_SERVICE, TAG_NODE, TAG_CLIENT, TAG_DOOR, TAG_VIA, TAG_NOT, TAG_TRACE, TAG_HOST, TAG_SCHEME, TAG_TICKET})
_ALL_TAGS: Final = frozenset(range(256))
_OWN_TAGS: Final = frozenset({TAG_CLIENT, TAG_TRACE, TAG_TICKET})
"""What no two streams have in common. Where they stand in front, the bytes behind them are the same for all streams of a door and host,
and are read once. Tickets are never remembered."""
_MAX_REMEMBERED: Final = 256
_SCHEMES: Final = frozenset({"", "http", "https", "tls"})
_TRACE: Final = re.compile(r"[0-9a-f]{1,32}")
_TLV: Final = struct.Struct(">BH")
_remembered: Final[dict[bytes, tuple["Opening", frozenset[int]]]] = {}


class Opening(NamedTuple):
    """What an OPEN asks for. All but the service may be empty. A tuple, since one is made for every stream.

    `client` and `door` tell where the stream comes from. `via` is the relay whose REDIRECT led here, if one did; `avoid` are relays that a
    REDIRECT has led to already, in vain. `trace` is the stream's mark in the gateway's log. `host` is the name by which the client asked
    (SNI, or HTTP's Host), and `scheme` how: "tls" unread by the gateway, "https" decrypted by it, "http" in the clear. `node` is the only
    node that may serve it. `ticket` is what the client showed; the gateway has not looked at it.
    """

    service: ServiceName
    client: str = ""
    door: str = ""
    via: RelayId | None = None
    avoid: tuple[RelayId, ...] = ()
    trace: str = ""
    host: str = ""
    scheme: str = ""
    node: RelayId | None = None
    ticket: str = ""


class UnsupportedTag(Exception):
    """An OPEN carries a required tag of a later version: answer REFUSE `unsupported`."""


def encode_tags(opening: Opening) -> bytes:
    """OPEN's tags.

    Raises:
        LocalProtocolError: the names are longer than an OPEN can carry.
    """
    tags = encode_tag(TAG_SERVICE, opening.service)
    for tag, text in (
        (TAG_NODE, opening.node),
        (TAG_DOOR, opening.door),
        (TAG_CLIENT, opening.client),
        (TAG_TRACE, opening.trace),
        (TAG_HOST, opening.host),
        (TAG_SCHEME, opening.scheme),
        (TAG_TICKET, opening.ticket),
    ):
        if text:
            tags += encode_tag(tag, text)
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
        RemoteProtocolError: the tags do not parse, repeat, or hold what their table does not allow.
        UnsupportedTag: well-formed, but a required tag is not known.
    """
    raw = bytes(payload)
    window = decode_u32(raw)
    own, at = _read_tags(raw, 4, _OWN_TAGS)
    rest = raw[at:]
    known = _remembered.get(rest)
    if known is None:
        known = _opening_of(rest)
        if known[1].isdisjoint(_OWN_TAGS):
            if len(_remembered) >= _MAX_REMEMBERED:
                _remembered.clear()
            _remembered[rest] = known
    opening, tags = known
    if not own:
        return window, opening
    if not tags.isdisjoint(own):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN repeats a tag")
    return window, Opening(
        opening.service,
        own.get(TAG_CLIENT, opening.client),
        opening.door,
        opening.via,
        opening.avoid,
        _trace(own[TAG_TRACE]) if TAG_TRACE in own else opening.trace,
        opening.host,
        opening.scheme,
        opening.node,
        _bounded(own, TAG_TICKET, MAX_TICKET_BYTES) if TAG_TICKET in own else opening.ticket,
    )


def _read_tags(raw: bytes, position: int, wanted: frozenset[int]) -> tuple[dict[int, str], int]:
    """The tags from there on, as long as they are `wanted`, and where they end. Those that are not known have no text."""
    found: dict[int, str] = {}
    end = len(raw)
    while position < end and (tag := raw[position]) in wanted:
        start = position + 3
        if start > end:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN ends inside a tag")
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
    return found, position


def _opening_of(raw: bytes) -> tuple[Opening, frozenset[int]]:
    """What these tags say, and which they are."""
    found, _ = _read_tags(raw, 0, _ALL_TAGS)
    service = found.get(TAG_SERVICE, "")
    if not is_name(service):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN names no valid service")
    opening = Opening(
        ServiceName(service),
        found.get(TAG_CLIENT, ""),
        found.get(TAG_DOOR, ""),
        _relay(found[TAG_VIA]) if TAG_VIA in found else None,
        tuple(_relay(name) for name in found[TAG_NOT].split(",")) if TAG_NOT in found else (),
        _trace(found[TAG_TRACE]) if TAG_TRACE in found else "",
        _bounded(found, TAG_HOST, MAX_HOST_BYTES),
        found.get(TAG_SCHEME, ""),
        _relay(found[TAG_NODE]) if TAG_NODE in found else None,
        _bounded(found, TAG_TICKET, MAX_TICKET_BYTES),
    )
    if len(opening.avoid) > MAX_AVOIDED or len(set(opening.avoid)) < len(opening.avoid):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"OPEN rules out {len(opening.avoid)} relays, or one of them twice")
    if opening.scheme not in _SCHEMES:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN names no valid scheme")
    for tag in found:
        if tag < _OPTIONAL_TAG and tag not in _KNOWN_TAGS:
            raise UnsupportedTag(f"tag 0x{tag:02x}")
    return opening, frozenset(found)


def _relay(name: str) -> RelayId:
    if not is_name(name):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN names no valid relay")
    return RelayId(name)


def _trace(text: str) -> str:
    # It goes into logs and pages.
    if _TRACE.fullmatch(text) is None:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "OPEN has no valid trace")
    return text


def _bounded(found: dict[int, str], tag: int, limit_bytes: int) -> str:
    text = found.get(tag, "")
    if len(text) > limit_bytes or not text.isprintable():
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"OPEN tag 0x{tag:02x} of {len(text)} bytes")
    return text
