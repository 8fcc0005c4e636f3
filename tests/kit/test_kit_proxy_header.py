"""PROXY headers there and back, cut at every byte, and everything that is none."""

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.kit.proxy_header import (
    MAX_V1_BYTES,
    MAX_V2_BYTES,
    BadProxyHeader,
    ProxyHeader,
    ProxyVersion,
    encode_proxy_header,
    parse_proxy_header,
)

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


def v2(command: int, family: int, block: bytes, size: int | None = None) -> bytes:
    return SIGNATURE + struct.pack(">BBH", command, family, len(block) if size is None else size) + block


TCP4 = bytes((192, 0, 2, 1, 198, 51, 100, 2)) + struct.pack(">HH", 56_324, 443)
TCP6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + struct.pack(">HH", 1, 2)
V4 = ("192.0.2.1", 56_324)
LONGEST_V1 = b"PROXY UNKNOWN " + b"f" * (MAX_V1_BYTES - 16) + b"\r\n"

GOOD = {
    "v1 IPv4": (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n", V4),
    "v1 IPv6": (b"PROXY TCP6 2001:DB8::1 2001:db8::2 0 65535\r\n", ("2001:db8::1", 0)),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", ("", 0)),
    "v1 unknown, as long as it may be": (LONGEST_V1, ("", 0)),
    "v2 IPv4": (v2(0x21, 0x11, TCP4), V4),
    "v2 IPv6": (v2(0x21, 0x21, TCP6), ("2001:db8::1", 1)),
    "v2 with more behind the addresses": (v2(0x21, 0x11, TCP4 + b"\x04\x00\x02hi"), V4),
    "v2 as long as it may be": (v2(0x21, 0x11, TCP4.ljust(MAX_V2_BYTES - 16, b"\0")), V4),
    "v2 local": (v2(0x20, 0x00, b""), ("", 0)),
    "v2 local with addresses": (v2(0x20, 0x11, TCP4), ("", 0)),
    "v2 local of an unknown family": (v2(0x20, 0xFF, b"abc"), ("", 0)),
    "v2 unspecified": (v2(0x21, 0x00, b""), ("", 0)),
    "v2 unix": (v2(0x21, 0x31, b"/".ljust(216, b"\0")), ("", 0)),
}

BAD = {
    "something else": b"GET / HTTP/1.1\r\n",
    "TLS": b"\x16\x03\x01\x02\x00",
    "almost v1": b"PROXy TCP4",
    "almost v2": SIGNATURE[:-1] + b"\r",
    "v1 too long": b"PROXY UNKNOWN " + b"f" * (MAX_V1_BYTES - 15) + b"\r\n",
    "v1 without an end": b"PROXY TCP4 " + b"1" * MAX_V1_BYTES,
    "v1 of another kind": b"PROXY TCP5 192.0.2.1 198.51.100.2 1 2\r\n",
    "v1 with nothing": b"PROXY \r\n",
    "v1 with too little": b"PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n",
    "v1 with too much": b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2 3\r\n",
    "v1 with two spaces": b"PROXY TCP4  192.0.2.1 198.51.100.2 1 2\r\n",
    "v1 with a tab": b"PROXY TCP4\t192.0.2.1 198.51.100.2 1 2\r\n",
    "v1 with a lone line feed": b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\n\r\n",
    "v1 with a signed port": b"PROXY TCP4 192.0.2.1 198.51.100.2 +1 2\r\n",
    "v1 with a port that goes on": b"PROXY TCP4 192.0.2.1 198.51.100.2 8_0 2\r\n",
    "v1 with a leading zero": b"PROXY TCP4 192.0.2.1 198.51.100.2 01 2\r\n",
    "v1 with a port too high": b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 2\r\n",
    "v1 with a target port too high": b"PROXY TCP4 192.0.2.1 198.51.100.2 1 99999\r\n",
    "v1 with a wrong family": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
    "v1 with a wrong target": b"PROXY TCP4 192.0.2.1 nowhere 1 2\r\n",
    "v1 with a short address": b"PROXY TCP4 192.0.2 198.51.100.2 1 2\r\n",
    "v1 with an octal address": b"PROXY TCP4 192.0.2.01 198.51.100.2 1 2\r\n",
    "v1 with a zone": b"PROXY TCP6 fe80::1%eth0 2001:db8::2 1 2\r\n",
    "v1 not ASCII": b"PROXY TCP4 192.0.2.1 198.51.100.\xb2 1 2\r\n",
    "v2 of version 1": v2(0x11, 0x11, TCP4),
    "v2 with another command": v2(0x22, 0x11, TCP4),
    "v2 with UDP": v2(0x21, 0x12, TCP4),
    "v2 of an unknown family": v2(0x21, 0x41, TCP4),
    "v2 with a short block": v2(0x21, 0x11, TCP4[:-1]),
    "v2 with an IPv4 block for IPv6": v2(0x21, 0x21, TCP4),
    "v2 with a short unix block": v2(0x21, 0x31, b"\0" * 215),
    "v2 too long": v2(0x21, 0x11, TCP4, MAX_V2_BYTES - 15),
    "v2 local and far too long": v2(0x20, 0x00, b"", 0xFFFF),
}


@pytest.mark.parametrize(("raw", "client"), GOOD.values(), ids=GOOD)
def test_a_header_is_read_and_what_follows_is_left(raw: bytes, client: tuple[str, int]) -> None:
    wanted = ProxyHeader(len(raw), *client)
    assert parse_proxy_header(raw) == wanted
    for behind in (b"\0", b"SSH-2.0-x\r\n", raw):
        assert parse_proxy_header(raw + behind) == wanted


@pytest.mark.parametrize("raw", [raw for raw, _ in GOOD.values()], ids=GOOD)
def test_a_header_cut_anywhere_is_not_yet_one(raw: bytes) -> None:
    assert all(parse_proxy_header(raw[:cut]) is None for cut in range(len(raw)))


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_what_is_no_header_is_refused_as_soon_as_it_cannot_become_one(raw: bytes) -> None:
    with pytest.raises(BadProxyHeader):
        parse_proxy_header(raw)
    refused = False
    for cut in range(len(raw) + 1):
        try:
            assert parse_proxy_header(raw[:cut]) is None
            assert not refused, "refused, and then not any more"
        except BadProxyHeader:
            refused = True


@given(st.binary(max_size=600) | st.binary(max_size=600).map(SIGNATURE.__add__) | st.binary(max_size=200).map(b"PROXY ".__add__))
def test_any_bytes_are_a_header_or_a_clear_error(data: bytes) -> None:
    try:
        header = parse_proxy_header(data)
    except BadProxyHeader:
        return
    if header is None:
        assert len(data) < MAX_V2_BYTES
    else:
        assert header.length <= min(len(data), MAX_V2_BYTES)


@given(
    st.sampled_from(["v1", "v2"]),
    st.ip_addresses(),
    st.integers(0, 65_535),
    st.none() | st.tuples(st.ip_addresses(), st.integers(0, 65_535)),
)
def test_a_client_survives_the_wire(
    version: ProxyVersion, address: IPv4Address | IPv6Address, port: int, door: tuple[IPv4Address | IPv6Address, int] | None
) -> None:
    raw = encode_proxy_header(version, endpoint(address, port), endpoint(*door) if door else "ssh")
    assert len(raw) <= MAX_V1_BYTES
    mapped = getattr(address, "ipv4_mapped", None)
    assert parse_proxy_header(raw) == ProxyHeader(len(raw), str(mapped or address), port)


def endpoint(address: IPv4Address | IPv6Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


@pytest.mark.parametrize(
    ("client", "door", "line"),
    [
        ("192.0.2.1:5", "198.51.100.2:443", b"PROXY TCP4 192.0.2.1 198.51.100.2 5 443\r\n"),
        ("192.0.2.1:5", "0.0.0.0:443", b"PROXY TCP4 192.0.2.1 0.0.0.0 5 443\r\n"),
        ("192.0.2.1:5", "[::]:443", b"PROXY TCP4 192.0.2.1 0.0.0.0 5 443\r\n"),
        ("192.0.2.1:5", "desktops", b"PROXY TCP4 192.0.2.1 0.0.0.0 5 0\r\n"),
        ("[2001:db8::1]:5", "", b"PROXY TCP6 2001:db8::1 :: 5 0\r\n"),
        ("[fe80::1%eth0]:5", "", b"PROXY TCP6 fe80::1 :: 5 0\r\n"),
        ("[::ffff:192.0.2.1]:5", "", b"PROXY TCP4 192.0.2.1 0.0.0.0 5 0\r\n"),
    ],
)
def test_what_a_service_reads(client: str, door: str, line: bytes) -> None:
    assert encode_proxy_header("v1", client, door) == line
    kind = 0x11 if line.startswith(b"PROXY TCP4") else 0x21
    assert encode_proxy_header("v2", client, door)[:14] == SIGNATURE + bytes((0x21, kind))


@pytest.mark.parametrize(
    "client", ["", "unix", "192.0.2.1", "192.0.2.1:", "192.0.2.1:70000", "2001:db8::1:5", "host:5", "a\r\nb:5", "[::1]", "\0:1"]
)
def test_a_client_without_an_address_is_unknown(client: str) -> None:
    assert encode_proxy_header("v1", client) == b"PROXY UNKNOWN\r\n"
    assert encode_proxy_header("v2", client) == v2(0x20, 0x00, b"")
