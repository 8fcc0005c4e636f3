"""Heads, targets, bodies, cookies and pages: tables, and properties against h11 and against themselves."""

import re

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxrelay.web import heads
from fxrelay.web.affinity import CookieAffinity
from fxrelay.web.bodies import BadBody, ChunkedBody, LengthBody, chunk, response_body
from fxrelay.web.forwarding import Backward, Onward, Origin, request_onward, response_back, wanted_upgrade
from fxrelay.web.heads import MAX_ANSWER_FIELDS, BadHead, HeadScanner, RequestHead, parse_request, parse_response
from fxrelay.web.targets import is_served, read_target, split_node_path
from fxtunnel.kit.answers import Refused, render
from fxtunnel.model import RelayId


def request(text: str) -> RequestHead:
    return parse_request(text.encode("latin-1").removesuffix(b"\r\n\r\n"))


@given(st.binary(max_size=300), st.lists(st.integers(1, 7), max_size=50))
def test_a_head_is_the_same_however_it_is_cut(tail: bytes, cuts: list[int]) -> None:
    data = b"GET /x HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n" + tail
    scanner, found, at = HeadScanner(), None, 0
    for size in [*cuts, len(data)]:
        scanner.feed(data[at : at + size])
        at += size
        if found is None:
            found = scanner.next_head()
    assert found == b"GET /x HTTP/1.1\r\nHost: a\r\nX: y"
    assert scanner.take_rest() == tail


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from([b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host: a", b"Content-Length: 3", b"\t", b"x:", b"\0"])
    )
)
def test_whatever_is_taken_h11_reads_the_same_way(pieces: list[bytes]) -> None:
    data = b"".join(pieces) + b"\r\n\r\n"
    scanner = HeadScanner()
    scanner.feed(data)
    try:
        raw = scanner.next_head()
        if raw is None:
            return
        head = parse_request(raw)
    except BadHead:
        return
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(data.removeprefix(b"\r\n"))
    found = reader.next_event()
    assert isinstance(found, h11.Request)
    assert (found.method, found.target) == (head.method, head.target)
    assert [(field.name, field.value) for field in head.fields] == list(found.headers)
    assert not any(mark in raw.replace(b"\r\n", b"") for mark in (b"\r", b"\n", b"\0"))


@pytest.mark.parametrize(
    "begun", [b"\x16\x03\x01", b"\0", b" GET", b"\r\n\r\n", b"\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\rX", b"A: b\r\n c"]
)
def test_what_cannot_become_a_head_is_refused_at_once(begun: bytes) -> None:
    scanner = HeadScanner()
    scanner.feed(begun)
    with pytest.raises(BadHead) as bad:
        scanner.next_head()
    assert bad.value.status == 400


def test_a_long_head_is_refused_before_it_is_whole() -> None:
    scanner = HeadScanner()
    for _ in range(8):
        scanner.feed(b"GET /" + b"a" * 1_000)
        assert scanner.next_head() is None
    scanner.feed(bytes(1_000))
    with pytest.raises(BadHead) as bad:
        scanner.next_head()
    assert bad.value.status == 414


class Watched(bytearray):
    """A buffer that counts the bytes that were searched."""

    looked_at = 0

    def find(self, sub: bytes, begin: int = 0, end: int | None = None) -> int:
        Watched.looked_at += (len(self) if end is None else min(end, len(self))) - begin
        return super().find(sub, begin, len(self) if end is None else end)


class WatchedPattern:
    """A pattern that counts the bytes that were searched."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern

    def search(self, data: bytearray, begin: int, end: int) -> re.Match[bytes] | None:
        Watched.looked_at += min(end, len(data)) - begin
        return self._pattern.search(data, begin, end)


@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_a_head_in_pieces_is_searched_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("fxrelay.web.heads._BARE", WatchedPattern(heads._BARE))
    scanner = HeadScanner()
    scanner.rest = Watched()
    Watched.looked_at = 0
    data = (b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 9_000)[: heads.MAX_HEAD_BYTES]
    for begin in range(0, len(data), size):
        scanner.feed(data[begin : begin + size])
        assert scanner.next_head() is None
    assert Watched.looked_at < 10 * len(data) + 10 * (len(data) // size)
    assert Watched.looked_at >= 2 * len(data), "the test looks at what the scanner does"
    scanner.feed(b"a" * 20_000_000)
    Watched.looked_at = 0
    with pytest.raises(BadHead) as bad:
        scanner.next_head()
    assert bad.value.status == 431
    assert Watched.looked_at < 21_000_000


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        ("/a?b", "h", (b"/a?b", "h")),
        ("*", "h", None),
        ("http://H.Example/x", "h.example", (b"/x", "h.example")),
        ("http://h", "h", (b"/", "h")),
        ("https://h?q", "h", (b"/?q", "h")),
        ("/", "H.:8080", (b"/", "h")),
        ("/", "[::1]:80", (b"/", "[::1]")),
        ("/", "user@h", None),
        ("/", "h:99999999", None),
        ("//evil/x", "h", (b"//evil/x", "h")),
        ("ftp://h/", "h", None),
        ("h:80", "h", None),
    ],
)
def test_targets(target: str, host: str, expected: tuple[bytes, str] | None) -> None:
    head = request(f"GET {target} HTTP/1.1\r\nHost: {host}")
    if expected is None:
        with pytest.raises(BadHead):
            read_target(head)
    else:
        found = read_target(head)
        assert (found.path, found.host) == expected


def test_options_of_everything() -> None:
    assert read_target(request("OPTIONS * HTTP/1.1\r\nHost: h")).path == b"*"


@pytest.mark.parametrize(
    ("path", "node", "onward", "prefix"),
    [
        (b"/node/n1/a", "n1", b"/node/n1/a", b""),
        (b"/node/n1", "n1", b"/node/n1", b""),
        (b"/rnode/n1/a/b?c", "n1", b"/a/b?c", b"/rnode/n1"),
        (b"/rnode/n1", "n1", b"/", b"/rnode/n1"),
        (b"/rnode/n1?x=/y", "n1", b"/?x=/y", b"/rnode/n1"),
        (b"/node/10.0.0.1:22/", None, b"/node/10.0.0.1:22/", b""),
        (b"/node/", None, b"/node/", b""),
    ],
)
def test_node_paths(path: bytes, node: str | None, onward: bytes, prefix: bytes) -> None:
    found = split_node_path(path)
    assert found is not None
    assert (found.node, found.path, found.prefix) == (node, onward, prefix)
    assert split_node_path(b"/nodes/n1/") is None


def test_hosts() -> None:
    assert is_served("x", ())
    assert is_served("a.example", ("a.example",))
    assert is_served("x.y.example", ("*.example",))
    assert not is_served("example", ("*.example",))
    assert not is_served("evilexample", ("*.example",))
    assert not is_served(".example", ("*.example",))


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8), st.lists(st.integers(1, 9), max_size=200))
def test_chunks_are_the_same_however_they_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(chunk(payload) for payload in payloads) + b"0;x=y\r\nTrailer: z\r\n\r\n" + b"NEXT"
    reader, found, at = ChunkedBody(), bytearray(), 0
    for size in [*cuts, len(data)]:
        found += reader.feed(data[at : at + size])
        at += size
    assert reader.is_done
    assert (bytes(found), reader.rest) == (b"".join(payloads), b"NEXT")


@settings(max_examples=300)
@given(st.lists(st.sampled_from([b"0", b"3", b"a", b"\r\n", b"\n", b"\r", b"abc", b";", b" ", b"X: 1", b"-", b"ffffffffffffffffff"])))
def test_any_bytes_as_chunks(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    whole, single = ChunkedBody(), ChunkedBody()
    try:
        expected = whole.feed(data)
    except BadBody:
        with pytest.raises(BadBody):
            _feed_singly(single, data + b"\n" * 2_000)
        return
    assert _feed_singly(single, data) == expected
    assert single.is_done is whole.is_done


def _feed_singly(reader: ChunkedBody, data: bytes) -> bytes:
    return b"".join(reader.feed(data[at : at + 1]) for at in range(len(data)))


def test_lengths() -> None:
    body = LengthBody(5)
    assert (body.feed(b"abc"), body.is_done) == (b"abc", False)
    assert not body.end()
    assert (body.feed(b"defg"), body.is_done, body.rest) == (b"de", True, b"fg")


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 3\r\nContent-Length: 4",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Content-Length: -1",
    ],
)
def test_responses_whose_end_is_open(fields: bytes) -> None:
    head = parse_response(b"HTTP/1.1 200 OK\r\n" + fields)
    with pytest.raises(BadHead):
        response_body(b"GET", head)
    assert response_body(b"HEAD", head).is_done


@pytest.mark.parametrize(
    "raw", [b"HTTP/2 200", b"HTTP/1.1 99 X", b"HTTP/1.1 2000", b"HTTP/1.1 200 OK\r\nno colon", b"HTTP/1.1 200 OK\r\nX : y"]
)
def test_responses_that_are_malformed(raw: bytes) -> None:
    with pytest.raises(BadHead):
        parse_response(raw)


def test_as_many_response_fields_as_are_taken_and_one_more() -> None:
    most = b"HTTP/1.1 200 OK" + b"\r\na: b" * MAX_ANSWER_FIELDS
    assert len(parse_response(most).fields) == MAX_ANSWER_FIELDS
    with pytest.raises(BadHead, match="too many header fields"):
        parse_response(most + b"\r\na: b")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("Connection: Upgrade\r\nUpgrade: websocket", b"websocket"),
        ("Connection: keep-alive, upgrade\r\nUpgrade: WebSocket", b"websocket"),
        ("Connection: Upgrade\r\nUpgrade: fx-stream", b"fx-stream"),
        ("Upgrade: websocket", b""),
        ("Connection: Upgrade\r\nUpgrade: h2c", b""),
        ("Connection: Upgrade\r\nUpgrade: websocket, h2c", b""),
    ],
)
def test_which_upgrades_are_asked_for(fields: str, expected: bytes) -> None:
    assert wanted_upgrade(request(f"GET / HTTP/1.1\r\nHost: a\r\n{fields}")) == expected


def test_what_a_trusted_proxy_said_is_kept() -> None:
    head = request(
        "GET / HTTP/1.1\r\nHost: inner\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: outer\r\n"
        "Forwarded: for=192.0.2.7\r\nX-Forwarded-Port: 443\r\nX_Forwarded_For: 6.6.6.6"
    )
    wire = request_onward(head, read_target(head), Origin.of("[2001:db8::1]:99", "http"), Onward(b"/"), trusts_forwarded=True, own_host="s")
    assert b"X-Forwarded-For: 192.0.2.7, 2001:db8::1\r\n" in wire
    assert b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: outer\r\n" in wire
    assert b'Forwarded: for=192.0.2.7, for="[2001:db8::1]";proto=http;host="inner"\r\n' in wire
    assert b"X-Forwarded-Port: 443\r\n" in wire
    assert b"6.6.6.6" not in wire


def test_a_connection_field_takes_nothing_that_matters() -> None:
    names = ("Host", "Authorization", "Cookie", "X-User", "Content-Type", "Forwarded", "Origin", "Sec-WebSocket-Key", "Accept", "Range")
    fields = "\r\n".join(f"{name}: v" for name in names if name != "Host")
    head = request(f"GET / HTTP/1.1\r\nHost: h\r\n{fields}\r\nHop: v\r\nConnection: {', '.join(names)}, Hop")
    wire = request_onward(head, read_target(head), Origin("", "http"), Onward(b"/"), trusts_forwarded=False, own_host="s")
    for name in names:
        assert f"{name}: ".encode() in wire
    assert b"Hop" not in wire


def test_responses_on_their_way_back() -> None:
    head = parse_response(
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nConnection: close, X-Hop\r\nKeep-Alive: 5\r\nHop: 1\r\nServer: s"
    )
    assert (
        response_back(head, Backward(connection=b"close")) == b"HTTP/1.1 204 No Content\r\nHop: 1\r\nServer: s\r\nConnection: close\r\n\r\n"
    )


@given(st.text(), st.text(), st.binary())
def test_pages_escape_everything(name: str, message: str, accept: bytes) -> None:
    answer = render(Refused(503, name, message, retry_after_s=3.4), "abc", accept)
    head, _, rest = answer.head.partition(b"\r\n")
    assert head == b"HTTP/1.1 503 Service Unavailable"
    assert b"Retry-After: 3\r\n" in rest
    assert f"Content-Length: {len(answer.body)}\r\n".encode() in rest
    if b"text/html" in rest:
        inner = answer.body.split(b"<body>")[1]
        assert inner.count(b"<") == 10


@given(st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True), st.text())
def test_cookies_name_what_was_signed(node: str, other: str) -> None:
    affinity = CookieAffinity("c", "svc", b"k" * 32)
    value = affinity.set_cookie(RelayId(node), secure=True).decode().removeprefix("Set-Cookie: ").partition(";")[0]
    assert affinity.node_of(request(f"GET / HTTP/1.1\r\nHost: a\r\nCookie: x=y; {value}; z")) == node
    for stranger in (CookieAffinity("c", "other", b"k" * 32), CookieAffinity("c", "svc", b"K" * 32)):
        assert stranger.node_of(request(f"GET / HTTP/1.1\r\nHost: a\r\nCookie: {value}")) is None
