"""Scripts in their processes: what they may do, and what becomes of those that do something else."""

import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from balance_samples import LOGIN, START, Bench, candidate, eventually, failed, ids, is_running, open_bench, worker_pids

from fxrelay.balance.builtins import NAMES
from fxrelay.balance.entries import Scripts
from fxrelay.balance.executable import run_executable
from fxrelay.balance.forked import RelayGone
from fxrelay.balance.model import Chosen, Narrowed, Passed
from fxrelay.balance.script_input import fastx4_input, script_input
from fxrelay.balance.workers import ScriptLimits
from fxtunnel.errors import ConfigError
from fxtunnel.model import RelayId

pytestmark = pytest.mark.xdist_group("balance-scripts")
A = Chosen(RelayId("a"))
SHORT = ScriptLimits(timeout_s=1.0)


@pytest.mark.parametrize(
    "source",
    [
        "function (input) { return input.servers[0].serverId }",
        "  // which\nfunction choose(input) { return input.servers[0].serverId }\n",
        "(input) => input.servers[0].serverId",
        "input => { return input.servers[0].serverId; }",
        "(function (input) { return input.servers[0].serverId })",
        "(function (input) { return input.servers[0].serverId });",
        "input => input.servers[0].serverId;\n",
        "function first(s) { return s[0] }\nfunction choose(input) { return first(input.servers).serverId }",
        "module.exports = function (input) { return input.servers[0].serverId };",
        "'use strict';\nfunction other() {}\nmodule.exports = (input) => input.servers[0].serverId;\nfunction another() { return 'b' }",
        "async function choose(input) { return await input.servers[0].serverId }",
        "async (input) => input.servers[0].serverId",
        "const first = 0; const choose = (input) => input.servers[first].serverId; choose",
        "\ufefffunction (input) { return input.servers[0].serverId }",
    ],
)
async def test_the_ways_to_write_a_function(bench: Bench, source: str) -> None:
    assert await bench.ask(bench.js(source)) == A


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("", "ScriptInvalid"),
        ("'a'", "ScriptInvalid"),
        ("({})", "ScriptInvalid"),
        ("function (input) { return", "SyntaxError"),
        ("nothing.there", "ReferenceError"),
        ("throw new TypeError('at once')", "TypeError"),
        ("() => { function f() { return f() + 1 } return f() }", "ScriptStack"),
        ("() => { const l = []; for (;;) l.push('x'.repeat(1 << 20) + l.length) }", "ScriptMemory"),
        ("() => 'x'.repeat(10 << 20)", "BadReturn"),
        ("() => { throw new Error('x'.repeat(10 << 20)) }", "Error"),
    ],
)
async def test_scripts_that_do_not_work(bench: Bench, source: str, name: str) -> None:
    verdict = failed(await bench.ask(bench.js(source)))
    assert verdict.name == name
    assert len(verdict.message) <= 500
    assert await bench.ask(bench.js("() => 'a'")) == A


async def test_a_throw_tells_its_name_and_message_and_its_stack_only_in_the_detail(bench: Bench) -> None:
    source = "function inner() { const e = new Error('no licences left'); e.name = 'LicenceError'; throw e }\nfunction choose() { inner() }"
    verdict = failed(await bench.ask(bench.js(source)))
    assert (verdict.name, verdict.message) == ("LicenceError", "no licences left")
    assert "inner" in verdict.detail
    assert "choose" in verdict.detail


@pytest.mark.parametrize(
    ("spec", "source", "is_refusal"),
    [
        ("js", "() => { throw new Error('closed') }", True),
        ("js", "() => { throw 'closed' }", True),
        ("js", "async () => { throw new Error('closed') }", True),
        ("js", "() => { class Closed extends Error {}; const e = new Closed('x'); e.name = 'Closed'; throw e }", True),
        ("js", "(input) => input.servers.filter(s => false)[0].serverId", False),
        ("js", "() => nothing", False),
        ("js", "() => { throw new TypeError('closed') }", False),
        ("js", "() => {", False),
        ("js", "() => { for (;;); }", False),
        ("js", "() => 1", False),
        ("sh", "echo closed >&2; exit 1", True),
        ("sh", "exit 125", True),
        ("sh", "/no/such/file", False),
        ("sh", "kill -9 $$", False),
        ("sh", "true", False),
        ("python", "raise RuntimeError('closed')", True),
        ("python", "raise Exception('closed')", True),
        ("python", "raise SystemExit('closed')", True),
        ("python", "class Closed(Exception): pass\n    raise Closed", True),
        ("python", "return input['servers'][9]", False),
        ("python", "open('/no/such/file')", False),
        ("python", "import nowhere_at_all", False),
        ("python", "return 1", False),
    ],
)
async def test_whether_a_script_refuses_or_fails(tmp_path: Path, spec: str, source: str, is_refusal: bool) -> None:
    async with open_bench(tmp_path, SHORT if "for (;;)" in source else None) as bench:
        if spec == "python":
            bench.write("site_rules.py", f"def choose(input):\n    {source}\n")
        entry = {"js": bench.js, "sh": bench.sh, "python": lambda _: bench.entry("python:site_rules:choose")}[spec](source)
        assert failed(await bench.ask(entry)).is_refusal is is_refusal


@pytest.mark.parametrize(
    "source", ["() => { for (;;); }", "async () => { for (;;) await 0 }", "for (;;);", "() => /(a+)+$/.test('a'.repeat(40) + 'b')"]
)
async def test_a_loop_is_ended(tmp_path: Path, source: str) -> None:
    async with open_bench(tmp_path, SHORT) as bench:
        assert failed(await bench.ask(bench.js(source))).name == "ScriptTimeout"
        await eventually(lambda: len(worker_pids()) <= 1)
        assert await bench.ask(bench.js("() => 'a'")) == A


async def test_what_a_script_prints_is_logged_and_bounded(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    entry = bench.js("(input) => { for (let i = 0; i < 1e5; i++) console.log('line', i, 'x'.repeat(1000)); return 'a' }")
    assert await bench.ask(entry) == A
    (record,) = [record for record in caplog.records if "says" in record.message]
    assert "line 0 xxx" in record.message
    assert len(record.message) < 5_000


async def test_a_changed_source_counts_at_once(bench: Bench) -> None:
    entry = bench.js("() => 'a'")
    assert await bench.ask(entry) == A
    bench.js("() => 'b'")
    assert await bench.ask(entry) == Chosen(RelayId("b"))
    (bench.directory / "choose.js").unlink()
    assert failed(await bench.ask(entry)).name == "ScriptUnreadable"
    bench.write("choose.js", b"\xff\xfe")
    assert failed(await bench.ask(entry)).name == "ScriptUnreadable"


async def test_calls_share_nothing_but_the_process(bench: Bench) -> None:
    entry = bench.js("function (input) { globalThis.n = (globalThis.n || 0) + 1; return input.servers.slice(0, n) }")
    assert [await bench.ask(entry) for _ in range(10)] == [Narrowed(ids("a"))] * 10
    assert bench.workers.started == 1
    assert len(worker_pids()) == 1


async def test_the_input_object(bench: Bench) -> None:
    request = replace(
        START,
        claims={"mail": "ann@example.com", "login": "root"},
        groups=("cad",),
        is_admin=True,
        data={"password": "s1", "AuthToken": "s2", "auth_token": "s3", "start": {"PASS-PHRASE": "s4", "l": [{"otp": "s5", "w": 1}]}},
    )
    among = [candidate("a", 2, sessions=3, custom="c"), candidate("b", sessions=4)]
    entry = bench.js(
        """(i) => { throw new Error([i.action, i.user.login, i.user.mail, i.userGroups[0], i.isManager, i.isAdmin, i.local.serverId,
        i.servers[0].sessions, i.servers[0].inflight, i.servers[0].custom, i.servers[1].sessions, i.servers[1].inflight,
        JSON.stringify(i.data)].join('|')) }"""
    )
    told = failed(await bench.ask(entry, request, among))
    assert told.message == 'session/start|ann|ann@example.com|cad|false|true|a|5|2|c|4||{"start":{"l":[{"w":1}]}}'


async def test_before_a_login_claims_are_not_told(bench: Bench) -> None:
    entry = bench.js("(i) => { throw new Error(JSON.stringify(i.user)) }")
    verdict = failed(await bench.ask(entry, replace(LOGIN, claims={"mail": "x"}, data={"serverId": "b"})))
    assert json.loads(verdict.message) == {"login": "ann", "serverId": "b", "sessions": []}


async def test_an_executable_gets_the_fastx4_form(bench: Bench) -> None:
    entry = bench.sh(f"cat > {bench.directory}/input\necho a")
    among = [candidate("a", 1, sessions=2, cpu=12.5, availmem=7, totalmem=9, address="10.0.0.1", hostname="h", staticData={"gpu": 1})]
    assert await bench.ask(entry, replace(START, data={"jwt": "secret", "geometry": "1x1"}), among) == A
    found = json.loads((bench.directory / "input").read_text())
    assert found["params"] == {"me": {"login": "ann", "serverId": "", "sessions": []}, "start": {"geometry": "1x1"}, "jwt": ""}
    (node,) = found["nodes"]
    assert (node["id"], node["metadata"]) == ("a", {"gpu": 1})
    health = node["nodeData"]["health"]
    assert health["cpu"]["utilization"] == 12.5
    assert health["mem"] == {"free": 7, "total": 9}
    assert health["process"]["sessions"] == 3
    assert health["net"]["ip"] == ["10.0.0.1"]
    assert len(node["nodeData"]["sessions"]) == 3


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("exit 3", "ScriptFailed", "exit code 3"),
        ("echo first >&2; echo 'no licence' >&2; echo >&2; echo a; exit 1", "ScriptFailed", "no licence"),
        ("kill -9 $$", "ScriptFailed", "-9"),
        ("exec yes", "ScriptFailed", "exit code"),
        ("printf '\\377\\376'", "BadReturn", "no text"),
        ("echo a; echo b", "BadReturn", "2 lines"),
        ("exit 0", "BadReturn", "0 lines"),
        ("echo zebra", "UnknownServer", "zebra"),
    ],
)
async def test_executables_that_do_not_work(bench: Bench, source: str, name: str, message: str) -> None:
    verdict = failed(await bench.ask(bench.sh(source)))
    assert verdict.name == name
    assert message in verdict.message
    assert bench.workers.started == 1


async def test_an_executable_may_reserve_more_addresses_than_it_uses(bench: Bench) -> None:
    assert await bench.ask(bench.sh('test "$(ulimit -v)" = unlimited && test "$(ulimit -d)" != unlimited && echo a')) == A


async def test_an_executable_has_a_bound_of_time_on_the_processor(bench: Bench) -> None:
    assert await bench.ask(bench.sh('test "$(ulimit -t)" = 21 && echo a')) == A


async def test_where_a_process_cannot_be_waited_for_by_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    (path := tmp_path / "f").write_text("#!/bin/sh\nexec $0.do\n")
    (path := tmp_path / "f.do").write_text("#!/bin/sh\necho a\n")
    for each in (tmp_path / "f", path):
        each.chmod(0o755)
    given = fastx4_input(script_input(LOGIN, [candidate("a")], RelayId("a")))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert run_executable(str(tmp_path / "f"), given, 20.0, ours)["text"] == "a\n"
        path.write_text("#!/bin/sh\nsleep 1000\n")
        assert run_executable(str(tmp_path / "f"), given, 0.2, ours)["name"] == "ScriptTimeout"
        theirs.close()
        with pytest.raises(RelayGone):
            run_executable(str(tmp_path / "f"), given, 20.0, ours)


def test_scripts_run_below_tighter_limits_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("#!/bin/sh\necho a\n")
    path.chmod(0o755)
    code = f"""
import resource, socket
from fxrelay.balance.executable import run_executable
for limit, most in ((resource.RLIMIT_FSIZE, 1 << 16), (resource.RLIMIT_CPU, 9)):
    resource.setrlimit(limit, (most, most))
ours, theirs = socket.socketpair()
print(run_executable({str(path)!r}, "{{}}", 20.0, ours)["text"])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert told.stdout.strip() == "a", told.stderr


async def test_an_executable_need_not_read_its_input(bench: Bench) -> None:
    among = [candidate(f"n{number:04}", staticData={"x": "y" * 500}) for number in range(1_000)]
    assert await bench.ask(bench.sh("exec 0<&-; echo n0007"), among=among) == Chosen(RelayId("n0007"))


def pid_in(path: Path) -> int:
    return int(path.read_text()) if path.exists() and path.read_text().strip() else 0


async def test_an_executable_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    async with open_bench(tmp_path, SHORT) as bench:
        entry = bench.sh(f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
        assert failed(await bench.ask(entry)).name == "ScriptTimeout"
        child = pid_in(tmp_path / "pid")
        await eventually(lambda: not is_running(child))
        assert bench.workers.started == 1


async def test_what_an_executable_leaves_behind_is_killed(bench: Bench) -> None:
    assert await bench.ask(bench.sh(f"sleep 1000 & echo $! > {bench.directory}/pid; echo a")) == A
    child = pid_in(bench.directory / "pid")
    await eventually(lambda: not is_running(child))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 'a'", A),
        ("return None", Passed()),
        ("return float('nan')", Passed()),
        ("return []", Narrowed(())),
        ("return [s for s in input['servers'] if s['serverId'] == 'b']", Narrowed(ids("b"))),
        ("return ('b', 'a')", Narrowed(ids("b", "a"))),
        ("return {'a'}", "BadReturn"),
        ("return True", "BadReturn"),
        ("return 10**400", "BadReturn"),
        ("return 10**5000", "BadReturn"),
        ("return b'a'", "BadReturn"),
        ("l = []; l.append(l); return l", "BadReturn"),
        ("return '\\ud800'", "UnknownServer"),
        ("return 'x' * (10 << 20)", "BadReturn"),
        ("raise RuntimeError('no licence')", "RuntimeError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("print('x' * 100000); return 'a'", A),
        ("return 'x' * (4 << 30)", "ScriptMemory"),
    ],
)
async def test_python_functions(bench: Bench, body: str, expected: object) -> None:
    bench.write("site_rules.py", f"def choose(input):\n    {body}\n")
    verdict = await bench.ask(bench.entry("python:site_rules:choose"))
    assert (failed(verdict).name if isinstance(expected, str) else verdict) == expected


async def test_a_changed_module_counts_at_once(bench: Bench) -> None:
    entry = bench.entry("python:site_rules:choose")
    assert failed(await bench.ask(entry)).name == "ModuleNotFoundError"
    for server_id in "abab":
        bench.write("site_rules.py", f"def choose(input):\n    return '{server_id}'\n")
        assert await bench.ask(entry) == Chosen(RelayId(server_id))
    bench.write("site_rules.py", "def choose(")
    for _ in range(2):
        verdict = failed(await bench.ask(entry))
        assert verdict.name == "SyntaxError"
        assert "Traceback" in verdict.detail
        assert "Traceback" not in verdict.message
    assert bench.workers.started == 1


async def test_what_a_python_function_prints_is_logged_and_bounded(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.write(
        "site_rules.py",
        "import sys\ndef choose(input):\n    print('seen', len(input['servers']))\n    sys.stderr.write('x' * 10**6)\n    return 'a'\n",
    )
    assert await bench.ask(bench.entry("python:site_rules:choose")) == A
    (record,) = [record for record in caplog.records if "says" in record.message]
    assert "seen 2\nxxx" in record.message
    assert len(record.message) < 5_000


def problems(bench: Bench, *specs: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        bench.scripts.chain(specs, "desk", environ or {})
    return str(caught.value)


async def test_wrong_entries_are_refused_when_loaded(bench: Bench) -> None:
    bench.write("plain.sh", "#!/bin/sh\n", 0o644)
    bench.write("group.sh", "#!/bin/sh\n", 0o775)
    bench.write("world.js", "() => 'a'", 0o646)
    os.mkfifo(bench.directory / "pipe", 0o755)
    for spec, expected in [
        ("builtin:fewest", ", ".join(NAMES)),
        ("exec:plain.sh", "not executable"),
        ("exec:group.sh", "others may change it"),
        ("js:world.js", "others may change it"),
        ("js:none.js", "No such file"),
        ("exec:pipe", "not a file"),
        ("js:.", "not a file"),
        ("js:", "expected"),
        ("fewest-sessions", "expected"),
        ("", "expected"),
        ("python:module", "python:MODULE:FUNCTION"),
        ("python::f", "python:MODULE:FUNCTION"),
        ("ruby:x", "expected"),
    ]:
        assert expected in problems(bench, spec), spec
    assert problems(bench, "builtin:none").startswith(f"{bench.directory}/site.toml: service desk: balance: ")
    both = problems(bench, "builtin:none", "js:none.js")
    assert "builtin:none" in both
    assert "none.js" in both


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "builtin:fewest-sessions"),
        ({"LOAD_BALANCER": " "}, "builtin:fewest-sessions"),
        ({"LOAD_BALANCER": "fewest"}, "builtin:fewest-sessions"),
        ({"LOAD_BALANCER": "Round Robin"}, "builtin:round-robin"),
        ({"LOAD_BALANCER": "round_robin"}, "builtin:round-robin"),
        ({"LOAD_BALANCER": "memory"}, "builtin:most-available-memory"),
        ({"LOAD_BALANCER": "pack"}, "builtin:pack"),
        ({"LOAD_BALANCER": "custom", "LOAD_BALANCER_SCRIPT": "/bin/true"}, "exec:/bin/true"),
    ],
)
def test_without_entries_the_environment_says(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    scripts = Scripts(ScriptLimits(), tmp_path / "relay.toml")
    (entry,) = scripts.chain((), "desk", environ)
    assert entry.name == expected
    assert scripts.chain(["builtin:local"], "desk", environ)[0].name == "builtin:local"


async def test_a_wrong_environment_is_refused(bench: Bench) -> None:
    assert "there is no" in problems(bench, environ={"LOAD_BALANCER": "best"})
    assert "expected" in problems(bench, environ={"LOAD_BALANCER": "custom"})
