"""What may reach two services."""

import ssl

import pytest

from fxgateway.routing.repeating import may_be_repeated


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = client_hello()


@pytest.mark.parametrize(
    "early",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(800),
        HELLO,
        HELLO + b"\x17\x03\x03\x00\x02ab",
        b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"DELETE /a HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_what_changes_nothing_or_the_same_twice(early: bytes) -> None:
    assert may_be_repeated(early)


@pytest.mark.parametrize(
    "early",
    [
        b"x",
        HELLO[:-1],
        b"\x16\x03\x01",
        b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        b"PATCH /a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"get /a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nPOST /b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: a\r\n",
        b"GET /a HTTP/1.1\r\n\r\n",
        b"PUT /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
    ],
)
def test_what_could_have_been_acted_upon(early: bytes) -> None:
    assert not may_be_repeated(early)
