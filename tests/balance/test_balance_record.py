"""Decisions written down and read again, and told to people."""

import json
from typing import Any

import pytest
from balance_samples import DESK, LOGIN, ids, member
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.filters import Pool
from fxrelay.balance.model import Action, Chosen, Decision, Dropped, Failed, Narrowed, Passed, Request, Step
from fxrelay.balance.record import Recording, decode_recording, encode_recording, explain
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.cluster.members import MemberState
from fxtunnel.model import RelayId

A = RelayId("a")
PLAIN = Recording(LOGIN, DESK, ("builtin:local",), (member("a"),), {A: 1}, A)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=3)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    request = Request(
        draw(st.sampled_from(Action)),
        draw(st.text()),
        draw(st.text()),
        tuple(draw(st.lists(OBJECTS, max_size=2))),
        draw(OBJECTS),
        tuple(draw(st.lists(st.text(), max_size=2))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(OBJECTS),
    )
    pool = Pool(draw(st.text()), draw(st.none() | st.frozensets(st.sampled_from(ids("a", "b")))), draw(OBJECTS) or None)
    members = tuple(
        member(
            name,
            draw(st.sampled_from(MemberState)),
            is_drained=draw(st.booleans()),
            disabled=draw(st.frozensets(st.sampled_from(["login"]))),
        )
        for name in draw(st.sets(st.sampled_from("abc")))
    )
    return Recording(
        request,
        pool,
        tuple(draw(st.lists(st.text(), max_size=2))),
        members,
        draw(st.dictionaries(st.just(A), st.integers(0))),
        A,
        draw(st.dictionaries(st.just(A), st.text())),
        draw(st.booleans()),
        draw(st.dictionaries(st.text(), st.integers(1))),
        draw(st.booleans()),
        draw(st.sampled_from(OwnerRelogin)),
        draw(st.frozensets(st.sampled_from(ids("a", "b")))),
    )


@given(recordings())
def test_what_is_written_down_reads_the_same(recording: Recording) -> None:
    again = decode_recording(encode_recording(recording))
    assert again == recording
    assert again.circumstances().in_flight == recording.in_flight


@given(st.text())
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^"):
        decode_recording(text)


def changes() -> list[tuple[str, Any]]:
    wrong: list[Any] = [None, 7, "x", [], {}, [7], {"x": 7}, {"server": 7}]
    return [(key, value) for key in json.loads(encode_recording(PLAIN)) for value in wrong]


@pytest.mark.parametrize(("key", "value"), changes())
def test_a_wrong_field_is_a_value_error_or_can_be_used(key: str, value: Any) -> None:
    found = json.loads(encode_recording(PLAIN)) | {key: value}
    try:
        recording = decode_recording(json.dumps(found))
    except ValueError:
        return
    encode_recording(recording)


@pytest.mark.parametrize("text", ["", "{}", "null", "[" * 100_000, '{"version": 2}', encode_recording(PLAIN).replace('"serverId"', '"id"')])
def test_what_is_no_record(text: str) -> None:
    with pytest.raises(ValueError, match=r"^."):
        decode_recording(text)


def test_a_server_that_is_there_twice_is_refused() -> None:
    found = json.loads(encode_recording(PLAIN))
    with pytest.raises(ValueError, match="a server twice"):
        decode_recording(json.dumps(found | {"members": found["members"] * 2}))


def test_a_decision_is_told_line_by_line() -> None:
    steps = (
        Step("js:a.js", 12, Narrowed(ids(*(f"n{n}" for n in range(10)))), 0.0012),
        Step("builtin:local", 10, Passed(), 0.0),
        Step("js:b.js", 10, Narrowed(()), 0.0),
    )
    assert explain(Decision(None, Failed("NoServerSelected", "nobody"), (Dropped(A, "stale"),), steps)) == [
        "filtered out  a: stale",
        "js:a.js  among 12: left 10: n0, n1, n2, n3, n4, n5, n6, n7 and 2 more  (1.2 ms)",
        "builtin:local  among 10: no opinion  (0.0 ms)",
        "js:b.js  among 10: left none  (0.0 ms)",
        "no server: NoServerSelected: nobody",
    ]
    assert explain(Decision(A, None, (), (Step("e", 1, Chosen(A), 0.0),))) == ["e  among 1: chose a  (0.0 ms)"]


def test_a_scripts_traceback_stands_below_its_line() -> None:
    failure = Failed("RuntimeError", "boom", 'Traceback (most recent call last):\n  File "site.py", line 4, in pick\nRuntimeError: boom\n')
    assert explain(Decision(None, failure, (), (Step("python:site:pick", 3, failure, 0.0),))) == [
        "python:site:pick  among 3: failed: RuntimeError: boom  (0.0 ms)",
        "    Traceback (most recent call last):",
        '      File "site.py", line 4, in pick',
        "    RuntimeError: boom",
        "no server: RuntimeError: boom",
    ]


def test_what_a_record_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="not a recorded decision: 'version' is missing"):
        decode_recording("{}")


@given(st.text(), st.text(), st.text())
def test_hostile_text_is_made_printable(name: str, message: str, detail: str) -> None:
    failure = Failed(name + "\x1b[2J\r\n", message, detail)
    lines = explain(Decision(None, failure, (), (Step(f"js:{name}\x1b", 1, failure, 0.0),)))
    assert len(lines) == 2 + len([line for line in detail.splitlines()[-40:] if line.strip()])
    assert all(line.isprintable() for line in lines)
