"""Functions called in the engine that is kept see what they would see in a copy of it, and leave nothing behind."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from balance_samples import server_text

from fxrelay.balance import javascript
from fxrelay.balance.javascript import Engine
from fxrelay.balance.script_input import Count, ScriptInput

pytestmark = pytest.mark.xdist_group("balance-workers")
pytest.importorskip("_quickjs")
LIMITS = (5.0, 64 << 20)
SERVERS = tuple(
    server_text(each, sessions=number, staticData={"group": f"g{number % 2}", "tags": ["b", "a"]}, disable=[], cpu=None)
    for number, each in enumerate("abcd")
)
GIVEN = ScriptInput('{"action": "user/login", "user": {"login": "ann"}, "local": {"serverId": "a"}}', SERVERS, (Count(1, 9, 8),))


class Caller:
    """An engine, and how often it was asked for a copy and made anew."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.relay, self._other = socket.socketpair()
        self.engine = Engine()
        self._path = directory / "choose.js"
        self.copies = 0
        self._first = self.engine._shared
        in_child = javascript.in_child

        def counted(*given: Any) -> bytes:
            self.copies += 1
            return in_child(*given)

        monkeypatch.setattr(javascript, "in_child", counted)

    @property
    def is_first_engine(self) -> bool:
        return self.engine._shared is self._first

    def call(self, source: str, given: ScriptInput = GIVEN, limits: tuple[float, int] = LIMITS) -> dict[str, Any]:
        self._path.write_text(source)
        return self.engine.run(str(self._path), given, limits, self.relay)

    def close(self) -> None:
        javascript_children()
        self.relay.close()
        self._other.close()


def javascript_children() -> None:
    from fxrelay.balance.forked import collect_children

    collect_children()


@pytest.fixture
def caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caller]:
    caller = Caller(tmp_path, monkeypatch)
    yield caller
    caller.close()


# What each makes of the input is what it answers.
WAYS = [
    "i.servers.map((s) => s.serverId).join()",
    "JSON.stringify(i)",
    "JSON.stringify(i.servers.map((s) => ({ ...s, x: 1 })))",
    "Object.keys(i.servers[0]).join() + Object.entries(i.servers[0].staticData).length",
    "(() => { const seen = []; for (const key in i.servers[0]) seen.push(key); return seen.join() })()",
    "[i.servers[1].sessions, i.servers[1].inflight, 'inflight' in i.servers[0], i.servers[0].nothing, i.servers[0].cpu].join()",
    "String(i.servers[0].staticData === i.servers[0].staticData && i.servers[0].staticData !== i.servers[2].staticData)",
    "(() => { const s = i.servers[0]; s.score = 7; s.staticData.score = 8; s.staticData.tags.push('c'); return JSON.stringify(s) })()",
    "(() => { const s = i.servers[0]; delete s.cpu; delete s.staticData.group; return JSON.stringify(s) + ('cpu' in s) })()",
    "(() => { const t = i.servers[0].staticData.tags; t.sort(); t.splice(0, 1, 'x', 'y'); t.length = 2; return JSON.stringify(i) })()",
    "(() => { const s = i.servers[0]; s.staticData = { new: [1] }; s.staticData.new.push(2); return JSON.stringify(s) })()",
    "(() => { i.servers[0].twin = i.servers[1]; i.servers[1].sessions = 5; return JSON.stringify(i.servers[0].twin) })()",
    "JSON.stringify([i.servers[0].hasOwnProperty('sessions'), Array.isArray(i.servers[0].disable), `${i.servers[0]}`])",
    "[...i.servers[0].staticData.tags, ...i.servers[0].staticData.tags.map((t) => t + t)].concat(i.servers[0].staticData.tags).join()",
    "(() => { Object.freeze(i.servers[0]); i.servers[0].x = 1; return JSON.stringify(i.servers[0]) + Object.isFrozen(i.servers[0]) })()",
    "(() => { Object.defineProperty(i.servers[0], 'x', { get() { return 5 } }); return String(i.servers[0].x) })()",
    "(() => { Object.defineProperty(i.servers[0], 'x', { value: 6 }); return Object.keys(i.servers[0]).join() + i.servers[0].x })()",
    "(() => { const o = Object.create(i.servers[0]); o.own = 1; return JSON.stringify([o, o.sessions, i.servers[0].own]) })()",
    "(() => { Object.assign(i.servers[0], { sessions: 99 }); return JSON.stringify(i.servers.sort((a, b) => b.sessions - a.sessions)) })()",
    "JSON.stringify(Object.getOwnPropertyDescriptor(i.servers[0].staticData.tags, 'length'))",
    "JSON.stringify(Object.getOwnPropertyDescriptors(i.servers[0].staticData))",
    "new Map(i.servers.map((s) => [s, s.serverId])).get(i.servers[2])",
    "(() => { console.log(i.servers[0].serverId, [1]); return typeof console.error })()",
    "typeof missing + typeof module + typeof exports",
    "(() => { throw new RangeError('of my own') })()",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_view_shows_what_a_copy_shows_and_the_next_call_sees_nothing_of_it(caller: Caller, way: str) -> None:
    here, copied = caller.call(f"(i) => {way}"), caller.call(f"/* eval */ (i) => {way}")
    assert caller.copies >= 1
    here.pop("detail", None), copied.pop("detail", None)
    assert here == copied
    assert caller.call("(i) => JSON.stringify(i)") == caller.call("/* eval */ (i) => JSON.stringify(i)")


LEAVING = [
    "n = (typeof n === 'undefined' ? 0 : n) + 1; return n",
    "this.n = (this.n || 0) + 1; return this.n",
    "Math.n = (Math.n || 0) + 1; return Math.n",
    "Math.max.n = (Math.max.n || 0) + 1; return Math.max.n",
    "const { keys } = Object; Object.keys = () => keys([1, 2]); return keys(i).length === 4 ? Object.keys(i).length - 1 : 0",
    "JSON.parse = JSON.stringify; return 1",
    "Object.defineProperty(Object, 'n', { value: 1, configurable: true }); return Object.n",
    "Object.freeze(Math); return 1",
    "Array = { n: (Array.n || 0) + 1 }; return Array.n",
    "console.log.n = (console.log.n || 0) + 1; return console.log.n",
    "module.n = (module.n || 0) + 1; return module.n",
    "Array.prototype.n = (Array.prototype.n || 0) + 1; return [].n",
    "[].constructor.n = ([].constructor.n || 0) + 1; return Array.n",
    "[].filter.n = ([].filter.n || 0) + 1; return [].filter.n",
    "''.trim.n = (''.trim.n || 0) + 1; return ''.trim.n",
    "i.servers.map.call.n = (i.servers.map.call.n || 0) + 1; return (() => 1).call.n",
    "const at = [].values(); at.next.n = (at.next.n || 0) + 1; return [].values().next.n",
    "const p = 'proto' + 'type'; Array[p].n = (Array[p].n || 0) + 1; return [].n",
    "const c = 'const' + 'ructor'; [][c].n = ([][c].n || 0) + 1; return [][c].n",
    "const c = 'const' + 'ructor'; return (() => 1)[c]('return this.n = (this.n || 0) + 1')()",
    "function* g() { yield 1 } const at = g(); at.next.n = (at.next.n || 0) + 1; return g().next.n",
    "Error.stackTraceLimit = 7; const was = Error.n; Error.n = 1; return was === undefined ? 1 : 2",
    "const was = Error.stackTraceLimit; Error.stackTraceLimit = 77; return was === 77 ? 2 : 1",
    "Error.prepareStackTrace = Error.prepareStackTrace ? () => 2 : () => 1; return Error.prepareStackTrace()",
    "module = { n: (module.n || 0) + 1 }; return module.n",
    "exports.n = (exports.n || 0) + 1; return exports.n",
    "console = { n: (console.n || 0) + 1 }; return console.n",
    "console.n = (console.n || 0) + 1; return console.n",
    "choose.n = (choose.n || 0) + 1; return choose.n",
    "TypeError.prototype.name = TypeError.prototype.name + '1'; return TypeError.prototype.name.replace('TypeError', '')",
]


@pytest.mark.parametrize("body", LEAVING)
def test_a_call_leaves_nothing_for_the_next(caller: Caller, body: str) -> None:
    function = f"function choose(i) {{ const value = (() => {{ {body} }}).call(this); return String(value) }}"
    for source in (f"// one\n{function} /* and only */\n", f"module.exports = {function}"):
        for _ in range(3):
            assert caller.call(source)["value"] == "1"
    assert caller.call("(i) => String(typeof n + Object.keys(i).length + Math.max(1, 2))")["value"] == "undefined42"


KEEPING = [
    "class Fit { constructor(s) { this.s = s } get id() { return this.s.serverId } } return new Fit(i.servers[1]).id",
    "return Object.prototype.hasOwnProperty.call(i.servers[1], 'cpu') ? 'b' : 'a'",
    "return Array.prototype.slice.call(i.servers, 1)[0].serverId",
    "const e = new TypeError('b'); e.name = 'Mine'; e.message += ''; return `${e}` + Object.keys(e) === 'Mine: bname' ? 'b' : `${e}`",
    "const list = []; list[3] = 1; list.push(2); list.length = 1; list[1] = i.servers[1].serverId; return list.sort()[0]",
    "return [...new Map([['b', 1]]).keys(), ...new Set('c')].join('').replace(/c$/, (found) => '').trim()",
]


@pytest.mark.parametrize("body", KEEPING)
def test_what_is_frozen_is_in_nobodys_way(caller: Caller, body: str) -> None:
    assert caller.call(f"function (i) {{ {body} }}")["value"] == "b"
    assert caller.copies == 0


def test_a_function_that_keeps_to_itself_needs_no_copy(caller: Caller) -> None:
    source = "let n = 0\nfunction helper() { n++ }\nfunction choose(i) { helper(); return i.servers[n].serverId }"
    assert [caller.call(source)["value"] for _ in range(5)] == ["b"] * 5
    assert caller.copies == 0
    assert caller.is_first_engine


def test_servers_that_changed_are_read_and_the_others_are_not(caller: Caller) -> None:
    source = "(i) => i.servers.map((s) => s.serverId + s.sessions).join()"
    assert caller.call(source)["value"] == "a0,b9,c2,d3"
    changed = json.loads(SERVERS[2]) | {"sessions": 7}
    given = ScriptInput(GIVEN.base, (SERVERS[3], json.dumps(changed)))
    assert caller.call(source, given)["value"] == "d3,c7"
    assert caller.call(source)["value"] == "a0,b9,c2,d3"
    assert caller.is_first_engine


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("() => { for (;;); }", "ScriptTimeout"),
        ("() => { const l = []; for (;;) l.push('x'.repeat(1 << 20) + l.length) }", "ScriptMemory"),
        ("() => { function f() { return f() + 1 } return f() }", "ScriptStack"),
    ],
)
def test_an_engine_that_was_at_its_limits_is_not_used_again(caller: Caller, source: str, name: str) -> None:
    assert caller.call(source, limits=(0.5, 16 << 20))["name"] == name
    assert not caller.is_first_engine
    assert caller.call("(i) => i.servers[1].serverId")["value"] == "b"


@pytest.mark.parametrize(
    ("body", "copies"),
    [
        ("return i.servers[0].staticData.tags[0]", 0),
        ("i.servers.sort((a, b) => b.sessions - a.sessions); i.servers.pop(); i.user.login = 'x'; return 'b'", 0),
        ("i.servers.forEach((s) => { s.score = s.sessions * 2 }); return String(i.servers[3].score) && 'b'", 0),
        ("i.servers[0].staticData.tags.sort(); return 'b'", 3),
        ("delete i.servers[0].staticData.group; return 'b'", 3),
        ("n = 1; return 'b'", 3),
        ("try { i.servers[0].staticData.n = 1 } catch (e) {} return i.servers[0].staticData.n ? 'b' : 'a'", 3),
    ],
)
def test_the_first_way_that_works_is_used_from_then_on(caller: Caller, body: str, copies: int) -> None:
    for _ in range(3):
        assert caller.call(f"function (i) {{ {body} }}")["value"] == "b"
    assert caller.copies == copies


def test_an_error_of_the_script_is_told_without_asking_again(caller: Caller) -> None:
    source = "function (i) { const e = new Error('no licences'); e.name = 'LicenceError'; throw e }"
    found = caller.call(source)
    assert (found["name"], found["message"], caller.copies) == ("LicenceError", "no licences", 0)


def test_a_call_in_a_copy_for_which_there_can_be_no_process_leaves_the_engine_alone(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # a limit of tasks

    source = "async () => 'a'"
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        answer = caller.call(source)
    assert (answer["kind"], answer["name"]) == ("failed", "NoProcess")
    assert len(os.listdir("/proc/self/fd")) == before
    assert caller.call(source)["value"] == "a"
