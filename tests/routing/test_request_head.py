"""The head of a connection's first request: what two readers could take in two ways is refused; the rest is read as it is meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgateway.routing.request_head import BadHead, RequestHead, one_request, read_request_head

GET = b"GET /a/b?c HTTP/1.1\r\nHost: A.example.com:80\r\nAccept: application/json\r\nConnection: Keep-Alive, Upgrade\r\n\r\n"


def head(data: bytes) -> RequestHead:
    found = read_request_head(data)
    assert isinstance(found, RequestHead), found
    return found


def test_a_request_is_read() -> None:
    found = head(GET + b"rest of it")
    assert (found.host, found.path, found.connection) == ("a.example.com", "/a/b?c", ("keep-alive", "upgrade"))
    assert (found.raw, found.accept) == (GET, b"application/json")


def test_a_request_cut_anywhere_is_waited_for() -> None:
    for cut in range(len(GET)):
        assert read_request_head(GET[:cut]) is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:8080\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    ],
)
def test_odd_but_right(data: bytes) -> None:
    assert head(data).path == "/"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX:\r\n\tfolded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: " + b"h" * 254 + b"\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"* * *\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"CONNECT a:22 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 64 + b"\r\n", 431),
        (b"GET /" + b"a" * 8_192, 431),
    ],
)
def test_what_is_refused(data: bytes, status: int) -> None:
    found = read_request_head(data)
    assert isinstance(found, BadHead), found
    assert found.status == status
    assert found.reason.isprintable()


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_an_answer(data: bytes, is_ended: bool) -> None:
    found = read_request_head(b"GET / HTTP/1.1\r\n" + data + (b"\r\n\r\n" if is_ended else b""))
    assert found is None or isinstance(found, RequestHead | BadHead)


def test_a_connection_for_one_request_says_so_to_the_service() -> None:
    assert one_request(head(GET)) == (
        b"GET /a/b?c HTTP/1.1\r\nHost: A.example.com:80\r\nAccept: application/json\r\nConnection: upgrade, close\r\n\r\n"
    )
    assert one_request(head(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nKeep-Alive: 5\r\nconnection: x\r\n\r\n")) == (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, close\r\n\r\n"
    )
