"""Pure: the ClientHello at the beginning of a TLS connection, read without decrypting anything: which name is asked for.

    record      type u8 = 22 | version u16 = 0x03xx | length u16 | fragment                                    RFC 8446, 5.1
    handshake   type u8 = 1 | length u24 | version u16 | random 32 | session id <u8> | cipher suites <u16> |
                compression <u8> | extensions <u16>: type u16, body <u16>                                      RFC 8446, 4.1.2

A handshake message may be cut into records anywhere. What is not known is skipped, GREASE (RFC 8701) with it.
"""

import ipaddress
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_HELLO_BYTES: Final = 16_384
"""Of the handshake message. Hellos with post-quantum keys have about 2 KiB."""
MAX_RECORDS_BYTES: Final = MAX_HELLO_BYTES + 4_096
"""The same with its records' headers. Nobody has a reason to cut a hello into hundreds of records."""
UNRECOGNIZED_NAME: Final = bytes((21, 3, 3, 0, 2, 2, 112))
"""A record with a fatal alert: no such name here (RFC 6066, 3; RFC 8446, 6.2)."""

_MAX_RECORD_BYTES: Final = 16_384
_RECORD_HEADER_BYTES: Final = 5
_MESSAGE_HEADER_BYTES: Final = 4
_HANDSHAKE: Final = 22
_USUAL: Final = bytes((22, 3))
_CLIENT_HELLO: Final = 1
_VERSION_AND_RANDOM_BYTES: Final = 34
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_READ: Final = (_SERVER_NAME, _ALPN)
_HOST_NAME: Final = 0
_EXTENSION: Final = struct.Struct(">HH")
_MAX_SHAPES: Final = 32
_MAX_HELLOS_OF_A_SHAPE: Final = 32
_MAX_KNOWN_EXTENSIONS: Final = 64
_MAX_KNOWN_BYTES: Final = 512
"""Together these keep the cache below 8 MiB, whatever clients send."""
_LENGTHS: Final = "its lengths do not add up"
_HOST: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client asks for. `host` is in lower case, without a dot at the end; empty without SNI."""

    host: str
    alpn: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NeedMore:
    """Looking again is of no use before so many bytes are there in all."""

    at_least: int


@dataclass(frozen=True, slots=True)
class NotTls:
    """No ClientHello that could be led anywhere."""

    reason: str


class _Malformed(Exception):
    """The text is the reason."""


def read_client_hello(data: bytes) -> ClientHello | NeedMore | NotTls:
    """What the first bytes of a connection say; `data` is all that has arrived, and may go on behind the hello."""
    shape = _shapes.get(len(data))
    if shape is not None and shape.read is not None:
        known = shape.hellos.get(shape.read(data))
        if known is not None:
            return known
    if len(data) > _RECORD_HEADER_BYTES + _MESSAGE_HEADER_BYTES and data.startswith(_USUAL):
        # Nearly always it is whole, and in one record.
        size = int.from_bytes(data[6:9]) + _MESSAGE_HEADER_BYTES
        end = _RECORD_HEADER_BYTES + size
        if (
            size <= int.from_bytes(data[3:5]) <= _MAX_RECORD_BYTES
            and end <= len(data)
            and size <= MAX_HELLO_BYTES
            and data[5] == _CLIENT_HELLO
        ):
            return _read(data[_RECORD_HEADER_BYTES + _MESSAGE_HEADER_BYTES : end], data if end == len(data) else b"")
    message = bytearray()
    at = 0
    while True:
        header = data[at : at + _RECORD_HEADER_BYTES]
        if header[:1] and header[0] != _HANDSHAKE:
            return NotTls("it is no TLS handshake")
        if header[1:2] and header[1] != 3:
            return NotTls("it is no TLS record")
        if len(header) < _RECORD_HEADER_BYTES:
            return _need(len(data), _RECORD_HEADER_BYTES - len(header), message)
        length = int.from_bytes(header[3:])
        if not 1 <= length <= _MAX_RECORD_BYTES:
            return NotTls(f"a record of {length} bytes")
        begin, at = at + _RECORD_HEADER_BYTES, at + _RECORD_HEADER_BYTES + length
        message += data[begin:at]
        if message[:1] and message[0] != _CLIENT_HELLO:
            return NotTls("the first message is no ClientHello")
        size = _size_of(message)
        if size > MAX_HELLO_BYTES:
            return NotTls("the hello is too long")
        if size and len(message) >= size:
            return _read(bytes(message[_MESSAGE_HEADER_BYTES:size]))
        if len(data) < at:
            left = at - len(data)
            return _need(len(data), _RECORD_HEADER_BYTES if left < size - len(message) else 0, message)


def _size_of(message: bytearray) -> int:
    """Of the whole message; 0 as long as that cannot be known."""
    return int.from_bytes(message[1:_MESSAGE_HEADER_BYTES]) + _MESSAGE_HEADER_BYTES if len(message) >= _MESSAGE_HEADER_BYTES else 0


def _need(have_bytes: int, headers_bytes: int, message: bytearray) -> NeedMore | NotTls:
    """The fewest bytes with which the message could be whole, or its size be known: who sends a byte a record makes us look no more often
    than its logarithm, instead of once for each.
    """
    missing = (_size_of(message) or _MESSAGE_HEADER_BYTES) - len(message)
    at_least = have_bytes + headers_bytes + missing
    return NeedMore(at_least) if at_least <= MAX_RECORDS_BYTES else NotTls("the hello is too long")


def _read(body: bytes, whole: bytes = b"") -> ClientHello | NotTls:
    """`whole` is the record, if the body is all there is in it."""
    try:
        layout = _layout(body)
        name, protocols = _body(body, layout, _SERVER_NAME), _body(body, layout, _ALPN)
        hello = ClientHello("" if name is None else _host(name), () if protocols is None else _protocols(protocols))
    except _Malformed as exc:
        return NotTls(str(exc))
    except (IndexError, struct.error):  # a length that is cut off
        return NotTls(_LENGTHS)
    if whole and len(layout.places) <= _MAX_KNOWN_EXTENSIONS and len(name or b"") + len(protocols or b"") <= _MAX_KNOWN_BYTES:
        _learn(whole, layout, hello)
    return hello


class _Layout(NamedTuple):
    """The lengths before the extensions, and where each extension begins in the body: with the body's length it says where all is."""

    session_id_bytes: int
    ciphers_bytes: int
    compression_bytes: int
    places: dict[int, int]


def _layout(body: bytes) -> _Layout:
    at = _VERSION_AND_RANDOM_BYTES
    session_id = body[at]
    at += 1 + session_id
    ciphers = body[at] << 8 | body[at + 1]
    at += 2 + ciphers
    compression = body[at]
    at += 1 + compression
    end = len(body)
    places: dict[int, int] = {}
    if at < end:
        if at + 2 + (body[at] << 8 | body[at + 1]) != end:
            raise _Malformed(_LENGTHS)
        at += 2
        count = 0
        while at < end:
            kind, size = _EXTENSION.unpack_from(body, at)
            places[kind] = at
            at += 4 + size
            count += 1
        if len(places) != count:
            raise _Malformed("it has an extension twice")
    if at != end:
        raise _Malformed(_LENGTHS)
    return _Layout(session_id, ciphers, compression, places)


def _body(body: bytes, layout: _Layout, kind: int) -> bytes | None:
    """What an extension says, if it is there."""
    at = layout.places.get(kind)
    return None if at is None else body[at + 4 : at + 4 + (body[at + 2] << 8 | body[at + 3])]


class _Shape:
    """What hellos of one length have in common that a program has sent twice.

    `read` takes out of a hello every length and type in it, and the bodies of server_name and ALPN. Where all of them are as in a hello
    that was read before, reading this one step by step would come by the same places to the same end: `hellos` has it.
    Programs that shuffle their extensions never send a layout twice, and cost no more than a comparison.
    """

    __slots__ = ("hellos", "layout", "read")

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout
        self.read: Callable[[bytes], tuple[object, ...]] | None = None
        self.hellos: dict[tuple[object, ...], ClientHello] = {}


_shapes: Final[dict[int, _Shape]] = {}


def _learn(whole: bytes, layout: _Layout, hello: ClientHello) -> None:
    shape = _shapes.get(len(whole))
    if shape is None or shape.layout != layout:
        if len(_shapes) >= _MAX_SHAPES:
            _shapes.clear()
        _shapes[len(whole)] = _Shape(layout)
        return
    if shape.read is None:
        shape.read = _reader(len(whole), layout)
    if len(shape.hellos) >= _MAX_HELLOS_OF_A_SHAPE:
        shape.hellos.clear()
    shape.hellos[shape.read(whole)] = hello


def _reader(size: int, layout: _Layout) -> Callable[[bytes], tuple[object, ...]]:
    headers = _RECORD_HEADER_BYTES + _MESSAGE_HEADER_BYTES
    form = f">{headers}s{_VERSION_AND_RANDOM_BYTES}xB{layout.session_id_bytes}xH{layout.ciphers_bytes}xB{layout.compression_bytes}x"
    begins = sorted((at, kind) for kind, at in layout.places.items())
    ends = [at for at, _ in begins[1:]] + [size - headers]
    if begins:
        form += "H" + "".join(f"4s{end - at - 4}{'s' if kind in _READ else 'x'}" for (at, kind), end in zip(begins, ends, strict=True))
    return struct.Struct(form).unpack


def _vector(data: bytes, at: int, size_bytes: int) -> tuple[bytes, int]:
    """What stands there behind its length of so many bytes, and where the next begins."""
    begin = at + size_bytes
    end = begin + int.from_bytes(data[at:begin])
    if end > len(data):  # a length that is cut off is too short, and its end lies behind the data, too
        raise _Malformed(_LENGTHS)
    return data[begin:end], end


def _host(body: bytes) -> str:
    """The name in a server_name extension."""
    names, end = _vector(body, 0, 2)
    raw, names_end = _vector(names, 1, 2)
    if names[0] != _HOST_NAME or names_end < len(names) or end < len(body):
        raise _Malformed("its server_name is not one host name")
    # Wildcards, NUL, addresses and what is not ASCII have no place here (RFC 6066, 3), and have confused matchers elsewhere.
    host = raw.decode("ascii", "replace").removesuffix(".")
    if not _HOST.fullmatch(host) or _is_address(host):
        raise _Malformed("its server_name is no host name")
    return host.lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _protocols(body: bytes) -> tuple[bytes, ...]:
    names, end = _vector(body, 0, 2)
    found = []
    at = 0
    while at < len(names):
        name, at = _vector(names, at, 1)
        found.append(name)
    if end < len(body) or not all(found):
        raise _Malformed("its ALPN is malformed")
    return tuple(found)
