"""HELLO, WELCOME and DENIED: what goes out comes in, and nothing malformed does."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Code, Refusal
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.model import SessionId
from fxtunnel.protocol import frames
from fxtunnel.protocol.hello import (
    HEADER_BYTES,
    Denied,
    Hello,
    Welcome,
    decode_hello,
    decode_reply,
    encode_denied,
    encode_hello,
    encode_welcome,
    parse_header,
)

SESSION = SessionId("0123456789abcdef" * 2)
HELLO = {"v": 1, "ticket": "t", "session": None, "received": 0, "window": 65_536, "caps": ["resume"], "need": []}
WELCOME = {"v": 1, "session": SESSION, "received": 0, "window": 65_536, "caps": ["resume"]}
MISSING = object()

NAMES = st.lists(st.text(max_size=64), max_size=32).map(tuple)
COUNTERS = st.integers(0, 2**63)
WINDOWS = st.integers(1, 2**31 - 1)
SESSIONS = st.from_regex(r"[0-9a-f]{32}", fullmatch=True).map(SessionId)
TICKETS = st.text(st.characters(max_codepoint=127), min_size=1, max_size=256)


def split(raw: bytes) -> tuple[int, bytes]:
    kind, length, stream_id = parse_header(raw[:HEADER_BYTES])
    assert (length, stream_id) == (len(raw) - HEADER_BYTES, 0)
    return kind, raw[HEADER_BYTES:]


def shown(value: object) -> str:
    return "missing" if value is MISSING else repr(value)[:24]


def refused(payload: str | bytes) -> None:
    raw = payload if isinstance(payload, bytes) else payload.encode()
    for kind in (frames.HELLO, frames.WELCOME, frames.DENIED):
        with pytest.raises(RemoteProtocolError) as caught:
            decode_hello(raw) if kind == frames.HELLO else decode_reply(kind, raw)
        assert caught.value.code is Code.PROTOCOL_ERROR


def changed(base: dict[str, object], key: str, value: object) -> bytes:
    fields = {name: old for name, old in base.items() if name != key}
    if value is not MISSING:
        fields[key] = value
    return json.dumps(fields).encode()


@given(TICKETS, st.none() | SESSIONS, COUNTERS, WINDOWS, st.just(("resume",)), st.just(()))
def test_hello_survives_the_wire(
    ticket: str, session: SessionId | None, received: int, window: int, caps: tuple[str, ...], need: tuple[str, ...]
) -> None:
    hello = Hello(ticket, session, received, window, caps, need)
    kind, payload = split(encode_hello(hello))
    assert kind == frames.HELLO
    assert decode_hello(payload) == hello


@given(SESSIONS, COUNTERS, WINDOWS)
def test_welcome_survives_the_wire(session: SessionId, received: int, window: int) -> None:
    welcome = Welcome(session, received, window)
    kind, payload = split(encode_welcome(welcome))
    assert kind == frames.WELCOME
    assert decode_reply(kind, payload) == welcome


@pytest.mark.parametrize("refusal", Refusal)
def test_every_refusal_survives_the_wire(refusal: Refusal) -> None:
    denied = Denied(refusal, "why", 2.5)
    kind, payload = split(encode_denied(denied))
    assert kind == frames.DENIED
    assert decode_reply(kind, payload) == denied


@given(NAMES)
def test_names_survive_the_wire(names: tuple[str, ...]) -> None:
    payload = json.dumps(HELLO | {"caps": names, "need": names}).encode()
    assert (decode_hello(payload).caps, decode_hello(payload).need) == (names, names)


@pytest.mark.parametrize("message", ["m" * 5_000, "\U0001f600" * 5_000])
def test_a_long_explanation_is_cut_so_that_the_peer_can_take_it(message: str) -> None:
    kind, payload = split(encode_denied(Denied(Refusal.BAD_TICKET, message)))
    assert decode_reply(kind, payload) == Denied(Refusal.BAD_TICKET, message[:256])


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4_095, 4_096, 4_097, 2**24 - 1])
@pytest.mark.parametrize("kind", [frames.HELLO, frames.WELCOME, frames.DENIED])
def test_a_length_is_judged_before_anything_is_read(kind: int, length: int) -> None:
    header = frames.HEADER.pack(kind << 24 | length, 0)
    if 2 <= length <= 4_096:
        assert parse_header(header) == (kind, length, 0)
        return
    with pytest.raises(RemoteProtocolError) as caught:
        parse_header(header)
    assert caught.value.code is Code.FRAME_SIZE


@pytest.mark.parametrize("kind", [k for k in range(256) if k not in (frames.HELLO, frames.WELCOME, frames.DENIED)])
def test_another_frame_is_no_hello(kind: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_header(frames.HEADER.pack(kind << 24 | 8, 0))
    assert caught.value.code is Code.PROTOCOL_ERROR


def test_a_hello_is_not_on_a_stream() -> None:
    with pytest.raises(RemoteProtocolError):
        parse_header(frames.HEADER.pack(frames.HELLO << 24 | 8, 1))


NOT_OBJECTS = {
    "empty": b"",
    "blank": b"   ",
    "list": b"[]",
    "string": b'"hello"',
    "number": b"1",
    "null": b"null",
    "cut": b'{"v":1,',
    "two objects": b"{}{}",
    "not UTF-8": b'{"v":1,"ticket":"\xff"}',
    "deep lists": b"[" * 4_096,
    "deep objects": b'{"a":' * 800,
    "deep lists inside": b'{"v":' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    "control character": b'{"v":1,"ticket":"\x00"}',
    "single quotes": b"{'v':1}",
}


@pytest.mark.parametrize("payload", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_what_is_not_an_object_is_refused(payload: bytes) -> None:
    refused(payload)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_no_json_are_refused(number: str) -> None:
    for key in ("v", "received", "window", "retry_after_s", "later"):
        refused(f'{{"v":1,"ticket":"t","code":"draining","session":"{SESSION}","received":0,"window":1,"{key}":{number}}}')


WRONG_INTEGERS = [MISSING, None, "0", -1, 0.0, 1.5, True, [], {}, 2**64, 10**400]


@pytest.mark.parametrize("value", WRONG_INTEGERS, ids=shown)
@pytest.mark.parametrize("key", ["received", "window"])
def test_a_wrong_counter_is_refused(key: str, value: object) -> None:
    for base, decode in ((HELLO, decode_hello), (WELCOME, lambda raw: decode_reply(frames.WELCOME, raw))):
        with pytest.raises(RemoteProtocolError, match=key):
            decode(changed(base, key, value))


@pytest.mark.parametrize("value", [0, 2**31])
def test_a_window_has_bounds(value: int) -> None:
    with pytest.raises(RemoteProtocolError, match="window"):
        decode_hello(changed(HELLO, "window", value))


@pytest.mark.parametrize("value", [MISSING, None, "1", 0, 2, -1, 1.0, True, [1], 10**400], ids=shown)
def test_another_version_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="version 1"):
        decode_hello(changed(HELLO, "v", value))
    with pytest.raises(RemoteProtocolError, match="version 1"):
        decode_reply(frames.WELCOME, changed(WELCOME, "v", value))


@pytest.mark.parametrize("value", [MISSING, None, 1, "", "t" * 257, "tické", ["t"]], ids=shown)
def test_a_wrong_ticket_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="ticket"):
        decode_hello(changed(HELLO, "ticket", value))


@pytest.mark.parametrize("value", ["", "0" * 31, "0" * 33, "0" * 32 + "\n", "G" * 32, "ABCDEF" + "0" * 26, 0, ["0" * 32]], ids=shown)
def test_a_wrong_session_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="session"):
        decode_hello(changed(HELLO, "session", value))
    with pytest.raises(RemoteProtocolError, match="session"):
        decode_reply(frames.WELCOME, changed(WELCOME, "session", value))


def test_a_welcome_names_a_session() -> None:
    for value in (MISSING, None):
        with pytest.raises(RemoteProtocolError, match="session"):
            decode_reply(frames.WELCOME, changed(WELCOME, "session", value))


@pytest.mark.parametrize("value", [None, "resume", 1, {}, [1], [None], ["x" * 65], ["x"] * 33, [["resume"]]], ids=shown)
@pytest.mark.parametrize("key", ["caps", "need"])
def test_a_wrong_list_of_names_is_refused(key: str, value: object) -> None:
    with pytest.raises(RemoteProtocolError, match=key):
        decode_hello(changed(HELLO, key, value))


@pytest.mark.parametrize("key", ["caps", "need"])
def test_a_missing_list_of_names_is_empty(key: str) -> None:
    assert getattr(decode_hello(changed(HELLO, key, MISSING)), key) == ()


def test_unknown_fields_and_caps_are_ignored() -> None:
    assert decode_hello(changed(HELLO, "colour", {"deep": [1]})) == Hello("t")
    assert decode_reply(frames.WELCOME, changed(WELCOME, "colour", "red")) == Welcome(SESSION)
    assert decode_hello(changed(HELLO, "caps", ["resume", "later"])).caps == ("resume", "later")


def denied(**fields: object) -> Denied:
    reply = decode_reply(frames.DENIED, json.dumps({"code": "draining", "message": "", "retry_after_s": 0} | fields).encode())
    assert isinstance(reply, Denied)
    return reply


def test_a_refusal_of_a_later_version_is_understood_enough() -> None:
    assert denied(code="moonphase").code is Refusal.UNSUPPORTED


@pytest.mark.parametrize(
    ("sent", "kept"), [(-1, 0.0), (0, 0.0), (2.5, 2.5), (1e300, 3_600.0), (10**400, 3_600.0), (-(10**400), 0.0)], ids=shown
)
def test_a_retry_time_is_kept_within_bounds(sent: float, kept: float) -> None:
    assert denied(retry_after_s=sent).retry_after_s == kept


def test_a_retry_time_beyond_floats_is_kept_within_bounds() -> None:
    reply = decode_reply(frames.DENIED, b'{"code":"draining","retry_after_s":1e999}')
    assert reply == Denied(Refusal.DRAINING, "", 3_600.0)


@pytest.mark.parametrize(
    "fields", [{"code": None}, {"code": 1}, {"message": None}, {"message": 1}, {"retry_after_s": None}, {"retry_after_s": True}], ids=shown
)
def test_a_wrong_denial_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        denied(**fields)


def test_a_gateway_does_not_answer_with_a_hello() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_reply(frames.HELLO, json.dumps(HELLO).encode())


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_payload_is_a_hello_or_a_clear_error(payload: bytes) -> None:
    for decode in (decode_hello, lambda raw: decode_reply(frames.WELCOME, raw), lambda raw: decode_reply(frames.DENIED, raw)):
        with pytest.raises(RemoteProtocolError):
            decode(payload)
