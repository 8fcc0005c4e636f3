"""What a returned value means, as Python values and as JavaScript's own."""

import math
from pathlib import Path
from typing import Any

import pytest
from balance_samples import Bench, candidates, failed, ids, open_bench
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.model import Chosen, Failed, Narrowed, Passed, Verdict
from fxrelay.balance.verdicts import BAD_RETURN, UNKNOWN_SERVER, verdict_of, verdict_of_output
from fxtunnel.model import RelayId

KNOWN = frozenset(ids("a", "b", "0"))
A = Chosen(RelayId("a"))

VALUES: list[tuple[Any, Verdict | str]] = [
    ("a", A),
    ("0", Chosen(RelayId("0"))),
    (" a", UNKNOWN_SERVER),
    ("A", UNKNOWN_SERVER),
    ("zebra", UNKNOWN_SERVER),
    ("", Passed()),
    (None, Passed()),
    (False, Passed()),
    (0, Passed()),
    (0.0, Passed()),
    (-0.0, Passed()),
    (math.nan, Passed()),
    ([], Narrowed(())),
    (["b", "a"], Narrowed(ids("b", "a"))),
    (["b", "a", "b"], Narrowed(ids("b", "a"))),
    ([{"serverId": "b"}, "a"], Narrowed(ids("b", "a"))),
    ([{"serverId": "b", "sessions": -1}], Narrowed(ids("b"))),
    (["a", "zebra"], UNKNOWN_SERVER),
    ([{}], UNKNOWN_SERVER),
    ([{"serverId": 7}], UNKNOWN_SERVER),
    ([None], UNKNOWN_SERVER),
    ([["a"]], UNKNOWN_SERVER),
    ([0], UNKNOWN_SERVER),
    ([False], UNKNOWN_SERVER),
    ({}, BAD_RETURN),
    ({"serverId": "a"}, BAD_RETURN),
    (True, BAD_RETURN),
    (1, BAD_RETURN),
    (-1, BAD_RETURN),
    (3.5, BAD_RETURN),
    (math.inf, BAD_RETURN),
    (10**400, BAD_RETURN),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=[repr(value)[:40] for value, _ in VALUES])
def test_every_row_of_the_table(value: Any, expected: Verdict | str) -> None:
    verdict = verdict_of(value, KNOWN)
    assert (verdict.name if isinstance(verdict, Failed) else verdict) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a", "b", "0"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["serverId", "x"]) | st.text(), inner),
)


@given(JSON)
def test_whatever_is_returned_only_known_servers_come_out(value: Any) -> None:
    match verdict_of(value, KNOWN):
        case Chosen(server_id):
            assert server_id in KNOWN
        case Narrowed(server_ids):
            assert KNOWN.issuperset(server_ids)
            assert len(set(server_ids)) == len(server_ids)
        case Failed(name, message):
            assert name in (UNKNOWN_SERVER, BAD_RETURN)
            assert len(message) < 300
            assert message.isprintable()
            assert message.isascii()


OUTPUTS: list[tuple[str, Verdict | str]] = [
    ("a", A),
    ("a\n", A),
    (" a \r\n", A),
    ("\n\na\n\n", A),
    ("", BAD_RETURN),
    ("\n \n", BAD_RETURN),
    ("a\nb\n", BAD_RETURN),
    ("a\na\n", BAD_RETURN),
    ("zebra\n", UNKNOWN_SERVER),
    ('"a"\n', UNKNOWN_SERVER),
    ("a b\n", UNKNOWN_SERVER),
]


@pytest.mark.parametrize(("text", "expected"), OUTPUTS, ids=[repr(text) for text, _ in OUTPUTS])
def test_what_an_executable_prints(text: str, expected: Verdict | str) -> None:
    verdict = verdict_of_output(text, KNOWN)
    assert (verdict.name if isinstance(verdict, Failed) else verdict) == expected


IN_JAVASCRIPT: list[tuple[str, Verdict | str]] = [
    ("return 'a'", A),
    ("return '0'", Chosen(RelayId("0"))),
    ("return input.servers[1].serverId", A),
    ("return 'zebra'", UNKNOWN_SERVER),
    ("return ''", Passed()),
    ("return new String('a')", BAD_RETURN),
    ("", Passed()),
    ("return undefined", Passed()),
    ("return null", Passed()),
    ("return 0", Passed()),
    ("return -0", Passed()),
    ("return 0n", Passed()),
    ("return NaN", Passed()),
    ("return 0/0", Passed()),
    ("return false", Passed()),
    ("return []", Narrowed(())),
    ("return input.servers", Narrowed(ids("0", "a", "b"))),
    ("return input.servers.filter(s => s.serverId > 'a')", Narrowed(ids("b"))),
    ("return input.servers.map(s => s.serverId).reverse()", Narrowed(ids("b", "a", "0"))),
    ("return input.servers.concat(input.servers)", Narrowed(ids("0", "a", "b"))),
    ("return [{serverId: 'a'}, 'b']", Narrowed(ids("a", "b"))),
    ("return ['a', 'zebra']", UNKNOWN_SERVER),
    ("return [undefined]", UNKNOWN_SERVER),
    ("return [null, 'a']", UNKNOWN_SERVER),
    ("return [,'a']", UNKNOWN_SERVER),
    ("return new Array(3)", UNKNOWN_SERVER),
    ("return [{}]", UNKNOWN_SERVER),
    ("return {}", BAD_RETURN),
    ("return {serverId: 'a'}", BAD_RETURN),
    ("return true", BAD_RETURN),
    ("return 3", BAD_RETURN),
    ("return -1", BAD_RETURN),
    ("return 1n", BAD_RETURN),
    ("return Infinity", BAD_RETURN),
    ("return () => 'a'", BAD_RETURN),
    ("return Symbol('a')", BAD_RETURN),
    ("const o = {}; o.o = o; return o", BAD_RETURN),
    ("const l = ['a']; l.push(l); return l", UNKNOWN_SERVER),
    ("return {toJSON() { return 'a' }}", BAD_RETURN),
    ("return Promise.resolve('a')", A),
    ("return Promise.resolve().then(() => ['b'])", Narrowed(ids("b"))),
    ("return Promise.resolve(0)", Passed()),
    ("return Promise.resolve(true)", BAD_RETURN),
    ("return Promise.reject(new TypeError('no'))", "TypeError"),
    ("return Promise.reject()", "Error"),
    ("return new Promise(() => {})", BAD_RETURN),
    ("throw new Error('x')", "Error"),
    ("throw 'words'", "Error"),
    ("throw null", "ScriptMemory"),  # so the engine reports that memory ran out
    ("throw undefined", "Error"),
    ("throw {}", "Error"),
    ("throw Symbol('s')", "Error"),
    ("throw {get name() { throw 1 }}", "Error"),
    ("return Promise.resolve([{get serverId() { throw new RangeError('r') }}])", "RangeError"),
    ("return {get then() { throw new RangeError('r') }}", "RangeError"),
    ("return [{get serverId() { throw new RangeError('r') }}]", "RangeError"),
    ("return {then(f) { f('a') }}", A),
    ("return {then() { throw new RangeError('r') }}", "RangeError"),
    ("Array.prototype.map = 0; JSON.stringify = 0; JSON.parse = 0; String = 0; return ['a']", Narrowed(ids("a"))),
    (
        "Object.prototype.toJSON = () => 7; Array.prototype.toJSON = () => 7; String.prototype.toJSON = () => 7; return ['a']",
        Narrowed(ids("a")),
    ),
    ("Object.prototype.kind = 'x'; return 'a'", A),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts")


async def test_javascripts_own_values(directory: Path) -> None:
    wrong = []
    async with open_bench(directory) as bench:
        for body, expected in IN_JAVASCRIPT:
            entry = bench.js(f"function (input) {{ {body} }}")
            verdict = await bench.ask(entry, among=candidates("0", "a", "b"))
            if (verdict.name if isinstance(verdict, Failed) else verdict) != expected:
                wrong.append(f"{body}: {verdict}, not {expected}")
        assert bench.workers.started <= 2
    assert not wrong, "\n".join(wrong)


async def test_a_bad_value_is_shown_shortened(bench: Bench) -> None:
    verdict = failed(await bench.ask(bench.js("() => 'x\\n\\u001b'.repeat(1000)")))
    assert verdict.name == UNKNOWN_SERVER
    assert verdict.message.isprintable()
    assert len(verdict.message) < 200
