"""Pure: the ClientHello at the beginning of a TLS connection, read without decrypting anything: which name is asked for.

    record      type u8 = 22 | version u16 = 0x03xx | length u16 | fragment                                    RFC 8446, 5.1
    handshake   type u8 = 1 | length u24 | version u16 | random 32 | session id <u8> | cipher suites <u16> |
                compression <u8> | extensions <u16>: type u16, body <u16>                                      RFC 8446, 4.1.2

A handshake message may be cut into records anywhere. What is not known is skipped, GREASE (RFC 8701) with it.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

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
_CLIENT_HELLO: Final = 1
_VERSION_AND_RANDOM_BYTES: Final = 34
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_HOST_NAME: Final = 0
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


class _Reader:
    """Takes a message apart."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        start = self._at
        self._at += count
        if self._at > len(self._data):
            raise _Malformed("its lengths do not add up")
        return self._data[start : self._at]

    def number(self, size_bytes: int) -> int:
        return int.from_bytes(self.take(size_bytes))

    def vector(self, size_bytes: int) -> bytes:
        return self.take(self.number(size_bytes))


def read_client_hello(data: bytes) -> ClientHello | NeedMore | NotTls:
    """What the first bytes of a connection say; `data` is all that has arrived, and may go on behind the hello."""
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


def _read(body: bytes) -> ClientHello | NotTls:
    try:
        hello = _Reader(body)
        hello.take(_VERSION_AND_RANDOM_BYTES)
        for size_bytes in (1, 2, 1):  # session id, cipher suites, compression
            hello.vector(size_bytes)
        extensions = {} if hello.is_at_end else _extensions(hello.vector(2))
        if not hello.is_at_end:
            raise _Malformed("its lengths do not add up")
        return ClientHello(
            _host(extensions[_SERVER_NAME]) if _SERVER_NAME in extensions else "",
            _protocols(extensions[_ALPN]) if _ALPN in extensions else (),
        )
    except _Malformed as exc:
        return NotTls(str(exc))


def _extensions(block: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    reader = _Reader(block)
    while not reader.is_at_end:
        kind = reader.number(2)
        if kind in found:
            raise _Malformed(f"it has extension {kind} twice")
        found[kind] = reader.vector(2)
    return found


def _host(body: bytes) -> str:
    outer = _Reader(body)
    names = _Reader(outer.vector(2))
    kind, raw = names.number(1), names.vector(2)
    if kind != _HOST_NAME or not names.is_at_end or not outer.is_at_end:
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
    outer = _Reader(body)
    names = _Reader(outer.vector(2))
    found = []
    while not names.is_at_end:
        found.append(names.vector(1))
    if not outer.is_at_end or not all(found):
        raise _Malformed("its ALPN is malformed")
    return tuple(found)
