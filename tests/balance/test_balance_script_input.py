"""What scripts are told: the same whether in one piece, in parts, or out of what a process has kept from earlier calls."""

import json
from dataclasses import replace
from typing import Any

import pytest
from balance_samples import LOGIN, START, Bench, candidate, failed, server_text
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance import javascript
from fxrelay.balance.javascript import _Kept
from fxrelay.balance.model import Candidate
from fxrelay.balance.script_input import ScriptInput, fastx4_input, script_input, without_secrets
from fxrelay.cluster.server import parse_server
from fxtunnel.model import RelayId

A = RelayId("a")


@st.composite
def some_candidates(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for name in sorted(draw(st.sets(st.sampled_from("abcd")))):
        text = json.dumps(
            candidate(name, sessions=draw(st.integers(0, 5)), extra=draw(st.text())).server.document(), indent=draw(st.none() | st.just(1))
        )
        found.append(
            Candidate(
                parse_server(draw(st.sampled_from(["", "\n"])) + text + draw(st.sampled_from(["", " \r\n\t"]))), draw(st.integers(0, 2))
            )
        )
    return found


@given(some_candidates())
def test_sessions_count_what_is_on_its_way_and_all_else_is_as_published(among: list[Candidate]) -> None:
    told = script_input(LOGIN, among, A)
    expected = [
        each.server.document() | ({"sessions": each.load_sessions, "inflight": each.in_flight} if each.in_flight else {}) for each in among
    ]
    assert json.loads(told.whole())["servers"] == expected
    nodes = json.loads(fastx4_input(told))["nodes"]
    assert [node["nodeData"]["health"]["process"]["sessions"] for node in nodes] == [each.load_sessions for each in among]
    assert [len(node["nodeData"]["sessions"]) for node in nodes] == [each.load_sessions for each in among]


def test_the_fastx4_lists_hold_as_many_sessions_as_there_are() -> None:
    among = [candidate("a", 1, sessions=3, sessionList=[{"owner": "ann"}]), candidate("b", sessions=5_000), candidate("c", sessionList="x")]
    lists = [node["nodeData"]["sessions"] for node in json.loads(fastx4_input(script_input(LOGIN, among, A)))["nodes"]]
    assert lists[0] == [{"owner": "ann"}, {}, {}, {}]
    assert (len(lists[1]), lists[2]) == (1_000, [])


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "Password",
        "oldPassword",
        "password2",
        "passwd",
        "authtoken",
        "auth_token",
        "X-FASTX-TOKEN",
        "access.token",
        "token",
        "secret",
        "client_secret",
        "passphrase",
        "pass-phrase",
        "jwt",
        "otp",
        "PIN",
        "cookie",
        "Authorization",
        "credentials",
        "private_key",
        "apiKey",
    ],
)
def test_secrets_are_left_out_at_any_depth(key: str) -> None:
    data = {key: "s", "start": {key: ["s"], "list": [{key: {"x": "s"}, "keep": 1}]}}
    assert without_secrets(data) == {"start": {"list": [{"keep": 1}]}}


def test_what_only_resembles_a_secret_stays() -> None:
    data = {"spin": 1, "pinned": True, "geometry": "1x1", "name": "my password", "compass": "N", "": 2}
    assert without_secrets(data) == data


def test_what_javascript_cannot_read_is_null() -> None:
    assert without_secrets({"a": float("nan"), "b": [float("inf"), 1.5]}) == {"a": None, "b": [None, 1.5]}


def test_deep_data_is_cut_off() -> None:
    data: dict[str, Any] = {"token": "s"}
    for _ in range(100):
        data = {"x": [data]}
    assert "token" not in json.dumps(without_secrets(data))


@pytest.mark.parametrize(
    ("data", "claims", "expected"),
    [({}, {}, ""), ({"serverId": "b"}, {"serverId": "c"}, "b"), ({}, {"serverId": "c"}, "c"), ({"serverId": 7}, {}, "")],
)
def test_the_server_the_user_asked_for(data: dict[str, Any], claims: dict[str, Any], expected: str) -> None:
    told = script_input(replace(START, data=data, claims=claims), [], A)
    assert json.loads(told.base)["user"]["serverId"] == expected


async def told_by(bench: Bench, among: list[Candidate]) -> Any:
    entry = bench.js(
        "(i) => { throw new Error(JSON.stringify(i.servers.map(s => [s.serverId, s.sessions, s.inflight || 0, s.mark || 0]))) }"
    )
    return json.loads(failed(await bench.ask(entry, among=among)).message)


async def test_javascript_is_told_the_present_state_call_after_call(bench: Bench) -> None:
    first = [candidate("a", sessions=1), candidate("b", sessions=2)]
    assert await told_by(bench, first) == [["a", 1, 0, 0], ["b", 2, 0, 0]]
    spoil = bench.js("(i) => { for (const s of i.servers) { s.mark = 1; s.sessions = 99 } Array.prototype.map = null }", "spoil.js")
    await bench.ask(spoil, among=first)
    assert await told_by(bench, first) == [["a", 1, 0, 0], ["b", 2, 0, 0]]
    flown = [replace(first[0], in_flight=3), first[1]]
    assert await told_by(bench, flown) == [["a", 4, 3, 0], ["b", 2, 0, 0]]
    assert await told_by(bench, first) == [["a", 1, 0, 0], ["b", 2, 0, 0]]
    changed = [candidate("c", sessions=7), candidate("a", sessions=5)]
    assert await told_by(bench, changed) == [["c", 7, 0, 0], ["a", 5, 0, 0]]
    assert await told_by(bench, first) == [["a", 1, 0, 0], ["b", 2, 0, 0]]
    assert bench.workers.started == 1


async def test_a_script_that_changes_the_language_as_it_loads_gets_its_input(bench: Bench) -> None:
    source = "Array.prototype.map = null; Array.prototype[Symbol.iterator] = null; JSON.parse = null; (i) => i.servers[1].serverId"
    assert await bench.ask(bench.js(source), among=[candidate("a", 1), candidate("b", 2)]) == await bench.ask(bench.js("() => 'b'", "b.js"))


def test_of_each_server_only_the_newest_object_is_kept() -> None:
    kept = _Kept("learn")
    used: set[int] = set()
    for number in range(10, 40):
        texts = tuple(candidate(f"n{n:02}", sessions=number, x="y" * 10_000).server.text for n in range(50))
        kept.choose(ScriptInput("{}", texts))
        used.add(kept.used_bytes)
    assert [kept._places[text] for text in texts] == list(range(50))
    assert len(kept._places) == len(kept._texts) == 50
    assert len(used) == 1


def test_with_too_many_servers_all_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(javascript, "MAX_KEPT", 20)
    kept = _Kept("learn")
    for number in range(100):
        text = server_text(f"n{number}")
        kept.choose(ScriptInput("{}", (text,)))
        assert kept._places[text] <= 21
