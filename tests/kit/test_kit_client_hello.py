"""Which name a ClientHello asks for: OpenSSL's own hellos, hellos cut into records and segments anywhere, and every malformed shape."""

import os
import random
import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.kit import client_hello
from fxtunnel.kit.client_hello import (
    MAX_HELLO_BYTES,
    MAX_RECORDS_BYTES,
    UNRECOGNIZED_NAME,
    ClientHello,
    NeedMore,
    NotTls,
    read_client_hello,
)

HELLOS = int(os.environ.get("FX_HELLOS", "300"))
"""Hellos made by OpenSSL; more by hand: FX_HELLOS=100000."""


def vector(size_bytes: int, body: bytes) -> bytes:
    return len(body).to_bytes(size_bytes) + body


def extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">H", kind) + vector(2, body)


def sni(name: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, bytes((kind,)) + vector(2, name)))


def message(*extensions: bytes, tail: bytes = b"", suites: bytes = b"\x13\x01\x0a\x0a") -> bytes:
    body = b"\x03\x03" + bytes(32) + vector(1, bytes(32)) + vector(2, suites) + vector(1, b"\0")
    if extensions:
        body += vector(2, b"".join(extensions))
    return b"\x01" + vector(3, body + tail)


def records(handshake: bytes, *sizes: int) -> bytes:
    """The message in records of these sizes, the last one repeated."""
    found, at, turn = b"", 0, 0
    while at < len(handshake):
        size = sizes[min(turn, len(sizes) - 1)] if sizes else len(handshake)
        found += b"\x16\x03\x01" + vector(2, handshake[at : at + size])
        at, turn = at + size, turn + 1
    return found


GREASE = extension(0x2A2A, b"") + extension(0xFAFA, b"\0")
PLAIN = message(GREASE, sni(b"A.example.com"), extension(16, vector(2, vector(1, b"h2") + vector(1, b"http/1.1"))))
EXPECTED = ClientHello("a.example.com", (b"h2", b"http/1.1"))


@given(st.lists(st.integers(1, 200), max_size=5), st.binary(max_size=20))
def test_records_of_any_sizes_and_what_follows_change_nothing(sizes: list[int], after: bytes) -> None:
    assert read_client_hello(records(PLAIN, *sizes) + after) == EXPECTED


@pytest.mark.parametrize("sizes", [(), (1,), (3, 1, 50), (4,)])
def test_a_hello_cut_at_every_byte_says_how_much_is_missing(sizes: tuple[int, ...]) -> None:
    whole = records(PLAIN, *sizes)
    for cut in range(len(whole)):
        found = read_client_hello(whole[:cut])
        assert isinstance(found, NeedMore), (cut, found)
        assert cut < found.at_least <= len(whole)


@pytest.mark.parametrize(("extensions", "sizes", "most"), [((), (), 3), ((extension(51, bytes(2_500)),), (1,), 60)])
def test_a_hello_that_comes_byte_by_byte_is_looked_at_seldom(extensions: tuple[bytes, ...], sizes: tuple[int, ...], most: int) -> None:
    whole, wanted, looks = records(message(*extensions, sni(b"a")), *sizes), 1, 0
    for cut in range(1, len(whole) + 1):
        if cut >= wanted:
            looks += 1
            found = read_client_hello(whole[:cut])
            wanted = found.at_least if isinstance(found, NeedMore) else 0
    assert found == ClientHello("a", ())
    assert looks <= most


def test_without_sni_and_without_extensions() -> None:
    assert read_client_hello(records(message(GREASE))) == ClientHello("", ())
    assert read_client_hello(records(message())) == ClientHello("", ())


def test_large_keys_fit() -> None:
    key_share = extension(51, bytes(12_000))
    assert read_client_hello(records(message(key_share, sni(b"a")), 1_200)) == ClientHello("a", ())


LONG = b".".join([b"a" * 63] * 4)
MALFORMED = {
    "http": b"GET / HTTP/1.1\r\n",
    "ssl 2": b"\x80\x2e\x01\x00\x02",
    "an alert": UNRECOGNIZED_NAME,
    "another version": b"\x16\x02\x01\x00\x05",
    "an empty record": b"\x16\x03\x01\x00\x00",
    "an over-long record": b"\x16\x03\x01\x40\x01",
    "another message": b"\x16\x03\x01" + vector(2, b"\x02" + bytes(9)),
    "an over-long message": b"\x16\x03\x01" + vector(2, b"\x01" + MAX_HELLO_BYTES.to_bytes(3) + bytes(5)),
    "too many records": records(b"\x01" + vector(3, bytes(MAX_HELLO_BYTES - 4)), 3),
    "another type in the middle": records(PLAIN, 20)[:25] + b"\x17\x03\x03\x00\x01a",
    "bytes behind the extensions": records(message(sni(b"a"), tail=b"x")),
    "an extension too long": records(message(b"\x00\x05\xff\xff")),
    "an extension twice": records(message(sni(b"a"), sni(b"b"))),
    "cipher suites too long": records(b"\x01" + vector(3, b"\x03\x03" + bytes(32) + b"\x00\xff\xff")),
    "a name of another type": records(message(sni(b"a", kind=1))),
    "an empty list of names": records(message(extension(0, b"\0\0"))),
    "an empty name": records(message(sni(b""))),
    "two names": records(message(extension(0, vector(2, (b"\0" + vector(2, b"a")) * 2)))),
    "bytes behind the names": records(message(extension(0, vector(2, b"\0" + vector(2, b"a")) + b"x"))),
    "NUL": records(message(sni(b"a\0.example.com"))),
    "not ASCII": records(message(sni(b"\xc3\xa4.example.com"))),
    "a wildcard": records(message(sni(b"*.example.com"))),
    "a line break": records(message(sni(b"a\nb"))),
    "a space": records(message(sni(b"a b"))),
    "an address": records(message(sni(b"192.0.2.1"))),
    "an IPv6 address": records(message(sni(b"2001:db8::1"))),
    "an empty label": records(message(sni(b"a..b"))),
    "a long label": records(message(sni(b"a" * 64))),
    "a long name": records(message(sni(LONG))),
    "ALPN with an empty name": records(message(extension(16, vector(2, vector(1, b""))))),
    "ALPN too long": records(message(extension(16, b"\x00\x09\x02h2"))),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_hello(data: bytes) -> None:
    found = read_client_hello(data)
    assert isinstance(found, NotTls), found
    assert found.reason.isprintable()


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_an_answer(noise: bytes, at: int) -> None:
    whole = records(PLAIN)
    for data in (noise, b"\x16\x03\x01" + noise, whole[:at] + noise + whole[at + len(noise) :]):
        found = read_client_hello(data)
        assert not isinstance(found, NeedMore) or len(data) < found.at_least <= MAX_RECORDS_BYTES


KEY_SHARE = extension(51, vector(2, b"\x11\xec" + vector(2, bytes(40))))
KNOWN = records(message(sni(b"a.example.com"), extension(16, vector(2, vector(1, b"h2"))), KEY_SHARE, GREASE))


@given(st.integers(0, len(KNOWN) - 1), st.binary(min_size=1, max_size=4))
def test_a_hello_like_one_before_is_read_as_if_it_were_the_first(at: int, noise: bytes) -> None:
    other = (KNOWN[:at] + noise + KNOWN[at + len(noise) :])[: len(KNOWN)]
    client_hello._shapes.clear()
    fresh = read_client_hello(other)
    for data in (KNOWN, KNOWN, KNOWN):
        assert read_client_hello(data) == ClientHello("a.example.com", (b"h2",))
    for _ in range(3):
        assert read_client_hello(other) == fresh
        assert read_client_hello(KNOWN) == ClientHello("a.example.com", (b"h2",))


def test_lengths_that_make_up_for_each_other_are_no_known_hello() -> None:
    """The extensions begin where they did, but what is before them is cut differently."""
    body = b"\x03\x03" + bytes(32)
    rest = vector(2, sni(b"a.test"))
    one = records(b"\x01" + vector(3, body + vector(1, b"\0\0\1\0\0\0") + vector(2, b"\0\0\0\0") + vector(1, b"\0") + rest))
    two = records(b"\x01" + vector(3, body + vector(1, b"\0\0\1") + vector(2, bytes(7)) + vector(1, b"\0") + rest))
    client_hello._shapes.clear()
    for data in (one, one, two, two, one, two):
        assert read_client_hello(data) == ClientHello("a.test", ())
        assert isinstance(read_client_hello(data[:-1]), NeedMore)


def test_what_is_remembered_is_bounded() -> None:
    client_hello._shapes.clear()
    for length in range(1, 120):
        for _ in range(3):
            read_client_hello(records(message(sni(b"a" * 5 + b".b" * (length // 2) + b"c" * (length % 2)))))
    assert len(client_hello._shapes) <= 32
    for number in range(1_000, 1_200):
        read_client_hello(records(message(sni(b"host%d.test" % number))))
    assert max(len(shape.hellos) for shape in client_hello._shapes.values()) <= 32


def test_a_dot_at_the_end_is_no_part_of_the_name() -> None:
    assert read_client_hello(records(message(sni(b"a.example.com.")))) == ClientHello("a.example.com", ())


def openssl_hello(rng: random.Random) -> tuple[bytes, str, list[str]]:
    """What OpenSSL says first, and what it was told to ask for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if rng.random() < 0.3:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    elif rng.random() < 0.5:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    protocols = rng.sample(["h2", "http/1.1", "acme-tls/1", "x" * rng.randrange(1, 200)], rng.randrange(4))
    if protocols:
        context.set_alpn_protocols(protocols)
    labels = ["".join(rng.choices("abcxyzABC019-", k=rng.randrange(1, 20))).strip("-") or "a" for _ in range(rng.randrange(1, 6))]
    host = ".".join(labels) + ".test" if rng.random() < 0.9 else None
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=host)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read(), host or "", protocols


def openssl_reads(data: bytes) -> str | None:
    """The name that OpenSSL's server finds in it."""
    seen: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _socket, name, _context: seen.append(name)
    incoming = ssl.MemoryBIO()
    incoming.write(data)
    server = context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    with pytest.raises(ssl.SSLError):
        server.do_handshake()
    return seen[0] if seen else None


def test_hellos_of_openssl_are_read_as_openssl_reads_them() -> None:
    rng = random.Random(4)
    for _ in range(HELLOS):
        data, host, protocols = openssl_hello(rng)
        length = int.from_bytes(data[3:5])
        handshake = data[5 : 5 + length]
        sizes = [rng.randrange(1, 300) for _ in range(rng.randrange(3))]
        cut = records(handshake, *sizes)
        found = read_client_hello(cut)
        assert found == ClientHello(host.lower(), tuple(name.encode() for name in protocols))
        assert (openssl_reads(cut) or "").lower() == host.lower()
        assert isinstance(read_client_hello(cut[: rng.randrange(len(cut))]), NeedMore)
