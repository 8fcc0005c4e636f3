"""Pure: the PROXY protocol's header, both versions, both ways: who the client is when somebody stands between it and us.

The wire is in the specification (haproxy's proxy-protocol.txt, 2.1 and 2.2). The library `proxy-protocol` was looked at and left: it bounds
no length, takes `+80` and `8_0` for ports, reads the bytes behind a v2 header as part of it, and raises what `struct` and `int` happen to.
"""

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal

ProxyVersion = Literal["v1", "v2"]
IpAddress = IPv4Address | IPv6Address

MAX_V1_BYTES: Final = 107
"""The longest line of version 1, its end included (2.1)."""
MAX_V2_BYTES: Final = 536
"""The shortest TCP segment everyone takes: what the specification (2.2) wants a header to fit into. Longer ones are refused."""
_V1_START: Final = b"PROXY "
_V2_START: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_HEAD: Final = struct.Struct(">12sBBH")
_V2_LOCAL: Final = 0x20
_V2_PROXY: Final = 0x21
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UNIX_STREAM: Final = 0x31
_ADDRESS_BYTES: Final = {0x00: 0, _TCP4: 12, _TCP6: 36, _UNIX_STREAM: 216}
_PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}")
_ENDPOINT: Final = re.compile(r"\[([^\]]+)\]:([0-9]{1,5})|([^:]+):([0-9]{1,5})")


class BadProxyHeader(Exception):
    """Not a PROXY header, or none we take: reset the connection. The text says what is wrong and repeats none of the bytes."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a header of `length` bytes says. `address` is the client's IP; empty if the header names no client (UNKNOWN, LOCAL, a unix
    socket): then the connection's own peer counts.
    """

    length: int
    address: str = ""
    port: int = 0


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """The header at the beginning of `data`, or None as long as more bytes are needed: never more than MAX_V2_BYTES.

    Raises:
        BadProxyHeader: whatever may follow, this does not become a header.
    """
    if data.startswith(_V1_START):
        return _parse_v1(data)
    if data.startswith(_V2_START):
        return _parse_v2(data)
    if _V1_START.startswith(data) or _V2_START.startswith(data):
        return None
    raise BadProxyHeader("no PROXY header")


def encode_proxy_header(version: ProxyVersion, client: str, door: str = "") -> bytes:
    """The header for a client at `client` (`ip:port`, `[ip6]:port`) that came in at `door` (the same, or any other text).

    Without a client that has an IP address it is the form that says so: UNKNOWN, LOCAL.
    """
    source = _endpoint(client)
    if source is None:
        return b"PROXY UNKNOWN\r\n" if version == "v1" else _V2_HEAD.pack(_V2_START, _V2_LOCAL, 0, 0)
    (address, port), target = source, _endpoint(door)
    if target is not None and target[0].version == address.version:
        target_address, target_port = target
    else:
        target_address, target_port = type(address)(0), target[1] if target is not None else 0
    if version == "v1":
        return f"PROXY TCP{address.version} {address} {target_address} {port} {target_port}\r\n".encode("ascii")
    block = address.packed + target_address.packed + struct.pack(">HH", port, target_port)
    return _V2_HEAD.pack(_V2_START, _V2_PROXY, _TCP4 if address.version == 4 else _TCP6, len(block)) + block


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, MAX_V1_BYTES)
    if end < 0:
        if len(data) >= MAX_V1_BYTES:
            raise BadProxyHeader(f"a line of more than {MAX_V1_BYTES} bytes")
        return None
    length = end + 2
    try:
        words = data[len(_V1_START) : end].decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise BadProxyHeader("a line that is not ASCII") from None
    if words[0] == "UNKNOWN":
        return ProxyHeader(length)  # whatever stands behind it is to be ignored (2.1)
    if len(words) != 5 or words[0] not in ("TCP4", "TCP6"):
        raise BadProxyHeader("a line of an unknown form")
    kind = IPv4Address if words[0] == "TCP4" else IPv6Address
    try:
        source, _ = kind(words[1]), kind(words[2])
    except ValueError:
        raise BadProxyHeader(f"an address that is not one of {words[0]}") from None
    if "%" in words[1] + words[2]:
        raise BadProxyHeader("an address with a zone")
    ports = [int(word) for word in words[3:] if _PORT.fullmatch(word)]
    if len(ports) != 2 or max(ports) > 65_535:
        raise BadProxyHeader("a port that is none")
    return ProxyHeader(length, str(source), ports[0])


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEAD.size:
        if len(data) > len(_V2_START) and data[12] not in (_V2_LOCAL, _V2_PROXY):
            raise BadProxyHeader("an unknown version or command")
        return None
    _, command, family, size = _V2_HEAD.unpack_from(data)
    length = _V2_HEAD.size + size
    if command not in (_V2_LOCAL, _V2_PROXY):
        raise BadProxyHeader("an unknown version or command")
    if length > MAX_V2_BYTES:
        raise BadProxyHeader(f"a header of more than {MAX_V2_BYTES} bytes")
    if command == _V2_PROXY:
        wanted = _ADDRESS_BYTES.get(family)
        if wanted is None:
            raise BadProxyHeader("a family or transport that no TCP connection has")
        if size < wanted:
            raise BadProxyHeader("an address block that is too short")
    if len(data) < length:
        return None
    if command == _V2_LOCAL or family not in (_TCP4, _TCP6):
        return ProxyHeader(length)
    start = _V2_HEAD.size
    if family == _TCP4:
        return ProxyHeader(length, str(IPv4Address(data[start : start + 4])), *struct.unpack_from(">H", data, start + 8))
    return ProxyHeader(length, str(IPv6Address(data[start : start + 16])), *struct.unpack_from(">H", data, start + 32))


def _endpoint(text: str) -> tuple[IpAddress, int] | None:
    """Address and port; an IPv4 address that a dual-stack socket reports as IPv6 is IPv4, and a zone means nothing elsewhere."""
    found = _ENDPOINT.fullmatch(text)
    if found is None:
        return None
    try:
        address = ip_address((found[1] or found[3]).partition("%")[0])
    except ValueError:
        return None
    port = int(found[2] or found[4])
    if port > 65_535:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address, port
