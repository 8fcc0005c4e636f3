"""Plans hold for heads with other values: what is filled in is what judging the whole head anew would have made of it."""

import base64

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxrelay.delivery.services import PoolService, Service
from fxrelay.web.access import RequestRecord
from fxrelay.web.affinity import Affinity, ClaimAffinity, CookieAffinity
from fxrelay.web.forwarding import Origin
from fxrelay.web.heads import HeadScanner
from fxrelay.web.judging import Judge
from fxrelay.web.planning import Plan, plan_for
from fxrelay.web.ports import WebRules
from fxtunnel.kit.settings import Address
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import Opening

WEB = ServiceName("web")
COOKIES = CookieAffinity("fxnode", "web", b"k" * 32)
SIGNED = [COOKIES.set_cookie(RelayId(node), secure=False).split(b";")[0].removeprefix(b"Set-Cookie: ") for node in ("n1", "n2")]
BEARERS = [b"Bearer a." + base64.urlsafe_b64encode(b'{"iss":"%b"}' % node) + b".c" for node in (b"n1", b"n2")]
NAMES = [
    b"Host", b"host", b"X-Request", b"x-request", b"Accept", b"User-Agent", b"Cookie", b"Authorization", b"Connection", b"Upgrade", b"TE",
    b"Trailer", b"Keep-Alive", b"Expect", b"Proxy", b"Content-Length", b"Transfer-Encoding", b"X-Forwarded-For", b"X_Forwarded_For",
    b"Forwarded", b"X-Real-IP", b"HTTP2-Settings", b"X-Hop", b"Hop", b"X ", b"", b"X\0",
]  # fmt: skip
VALUES = [
    b"a", b"b", b"", b" a", b"a \t", b"a b", b"\x80", b"\0", b"a\0", b"\x7f", b"a\rb", b"a\nb", b"close", b"X-Hop", b"X-Request",
    b"Hop", b"0", b"3", b"3, 3", b"chunked", b"100-continue", b"websocket", b"a/b", b"1.2.3.4", b": x", b"a\r\nX-More: 1", *SIGNED,
    *BEARERS,
]  # fmt: skip
FIELD = st.tuples(st.sampled_from(NAMES), st.sampled_from([b":", b": "]), st.sampled_from(VALUES)).map(b"".join)


def judge(*, trusts_forwarded: bool = False, affinity: Affinity | None = None) -> Judge:
    rules = WebRules(WEB, (), trusts_forwarded, False, affinity)
    service = Service(WEB, Address("127.0.0.1", 1), ()) if affinity is None else PoolService(WEB, "127.0.0.1", 1, ())
    return Judge(rules, service, Opening("web", "1.2.3.4:5", "t"), Origin("1.2.3.4", "http"), None, RelayId("r"), None)


JUDGES = [judge(), judge(trusts_forwarded=True), judge(affinity=COOKIES), judge(affinity=ClaimAffinity("iss"))]


def plan(by: Judge, block: bytes) -> Plan | None:
    """The plan for a head with these fields, if the pump may see such a head at all."""
    raw = b"GET / HTTP/1.1\r\n" + block
    whole = raw + b"\r\n\r\n"
    if HeadScanner().whole_head(whole) != len(raw):
        return None
    return plan_for(raw, by, RequestRecord("t", WEB, "", 0.0), is_pool=by in JUDGES[2:])


@settings(max_examples=1500)
@given(st.sampled_from(JUDGES), st.lists(FIELD, max_size=5), st.lists(st.tuples(st.integers(0, 5), FIELD | st.none()), max_size=3))
def test_what_is_filled_in_is_what_judging_makes(by: Judge, fields: list[bytes], changes: list[tuple[int, bytes | None]]) -> None:
    lines = [b"Host: a", *fields]
    known = plan(by, b"\r\n".join(lines))
    if known is None or known.template is None:
        return
    for place, line in changes:
        lines[place : place + 1] = [line] if line is not None else []
    block = b"\r\n".join(lines)
    raw = b"GET / HTTP/1.1\r\n" + block
    if HeadScanner().whole_head(raw + b"\r\n\r\n") != len(raw):
        return  # the pump is not shown it
    tail = known.template.tail_of(block)
    if tail is None:
        return
    other = plan(by, block)
    assert other is not None, "it was taken, and judging refuses it or gives it to a task"
    assert (tail, known.host, known.node, known.keeps_alive) == (other.tail, other.host, other.node, other.keeps_alive)
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(raw + b"\r\n\r\n")
    assert isinstance(reader.next_event(), h11.Request)


@settings(max_examples=400)
@given(st.sampled_from(JUDGES), st.integers(0, 2), st.binary(max_size=8) | st.sampled_from(VALUES))
def test_any_bytes_as_a_value(by: Judge, place: int, value: bytes) -> None:
    names = [b"X-Request", b"Cookie", b"Accept"]
    lines = [b"Host: a", *(name + b": 1" for name in names)]
    known = plan(by, b"\r\n".join(lines))
    if known is None:
        return  # without an affinity that says a node, a pool's request is for a task
    assert known.template is not None
    lines[place + 1] = names[place] + b":" + value
    block = b"\r\n".join(lines)
    if HeadScanner().whole_head(b"GET / HTTP/1.1\r\n" + block + b"\r\n\r\n") != len(block) + 16:
        return
    other = plan(by, block)
    tail = known.template.tail_of(block)
    assert tail is None or (other is not None and tail == other.tail)
    if place != 1 and other is not None and b"\r\n" not in value:
        assert tail == other.tail, "this value is free, so it costs no judgement"


HEAD = [b"Host: a", b"User-Agent: u", b"X-Request: 1", b"X-Request: 1", b"Accept: */*"]


def test_values_that_change_are_filled_in_where_they_belong() -> None:
    known = plan(JUDGES[0], b"\r\n".join(HEAD))
    assert known is not None
    assert known.template is not None
    tail = known.template.tail_of(b"\r\n".join([*HEAD[:3], b"X-Request:\t2 ", b"Accept:"]))
    assert tail == known.tail.replace(b"X-Request: 1\r\nAccept: */*", b"X-Request: 2\r\nAccept: ")


@pytest.mark.parametrize(
    "lines",
    [
        [b"Host: b", *HEAD[1:]],
        [*HEAD[:4], b"accept: x"],
        [*HEAD[:4], b"Accept : x"],
        [*HEAD[:4], b"Accept"],
        [*HEAD[:4], b"Cookie: x"],
        HEAD[:4],
        [*HEAD, b"X: 1"],
        [HEAD[1], HEAD[0], *HEAD[2:]],
        [*HEAD[:4], b"Accept: \0"],
        [b""],
    ],
)
def test_anything_else_is_judged(lines: list[bytes]) -> None:
    known = plan(JUDGES[0], b"\r\n".join(HEAD))
    assert known is not None
    assert known.template is not None
    assert known.template.tail_of(b"\r\n".join(lines)) is None


def test_fields_of_one_connection_do_not_keep_others_from_being_filled_in() -> None:
    lines = [b"Host: a", b"Connection: keep-alive, Hop", b"Hop: 1", b"Keep-Alive: 5", b"Accept: 1"]
    known = plan(JUDGES[0], b"\r\n".join(lines))
    assert known is not None
    assert known.template is not None
    tail = known.template.tail_of(b"\r\n".join([*lines[:4], b"Accept: 2"]))
    assert tail is not None
    assert tail == known.tail.replace(b"Accept: 1", b"Accept: 2")
    assert b"Hop" not in tail
    assert known.template.tail_of(b"\r\n".join([*lines[:2], b"Hop: 2", *lines[3:]])) is None


@pytest.mark.parametrize(("by", "line"), [(JUDGES[2], b"Cookie: %b"), (JUDGES[3], b"Authorization: %b")], ids=["cookie", "claim"])
def test_what_names_a_node_is_judged(by: Judge, line: bytes) -> None:
    values = SIGNED if by is JUDGES[2] else BEARERS
    plans = [plan(by, b"Host: a\r\nAccept: 1\r\n" + line % value) for value in values]
    assert [known.node if known else None for known in plans] == ["n1", "n2"]
    assert plans[0] is not None
    assert plans[0].template is not None
    assert plans[0].template.tail_of(b"Host: a\r\nAccept: 2\r\n" + line % values[0]) is not None
    assert plans[0].template.tail_of(b"Host: a\r\nAccept: 1\r\n" + line % values[1]) is None
