"""The script processes themselves: how they end, are replaced, and go when the relay goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from balance_samples import Bench, eventually, failed, is_running, no_threads, open_bench, worker_pids

from fxrelay.balance.answers import Answer
from fxrelay.balance.entries import Script
from fxrelay.balance.model import Chosen
from fxrelay.balance.niceness import NICE
from fxrelay.balance.script_process import ScriptProcess
from fxrelay.balance.workers import ScriptLimits
from fxrelay.cluster.priority import SLICE_NS
from fxtunnel.model import RelayId
from tests.scheduling import nice_of_session, slice_ns

pytestmark = pytest.mark.xdist_group("balance-workers")
A = Chosen(RelayId("a"))
SHORT = ScriptLimits(timeout_s=1.0)


def pid_in(path: Path) -> int:
    return int(path.read_text()) if path.exists() and path.read_text().strip() else 0


@pytest.mark.parametrize("body", ["while True: pass", "import os; os._exit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
async def test_a_python_function_that_ends_or_holds_its_process(tmp_path: Path, body: str) -> None:
    async with open_bench(tmp_path, SHORT) as bench:
        bench.write("site_rules.py", f"def choose(input):\n    {body}\n")
        assert failed(await bench.ask(bench.entry("python:site_rules:choose"))).name in ("ScriptTimeout", "ScriptDied")
        assert await bench.ask(bench.js("() => 'a'")) == A
        assert bench.workers.started == 2
        assert len(worker_pids()) == 1


async def test_a_killed_process_is_replaced_at_the_next_call(bench: Bench) -> None:
    entry = bench.js("() => 'a'")
    assert await bench.ask(entry) == A
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not is_running(pid))
    assert await bench.ask(entry) == A
    assert bench.workers.started == 2


@pytest.mark.parametrize("is_warm", [False, True])
async def test_a_script_that_no_thread_can_ask_is_a_failure_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    bench.write("site_rules.py", "def choose(input): return 'a'\n")
    entry = bench.entry("python:site_rules:choose")
    if is_warm:
        assert await bench.ask(entry) == A
    with no_threads(monkeypatch):
        verdict = failed(await bench.ask(entry))
    assert (verdict.name, verdict.detail) == ("NoThread", "can't start new thread")
    assert await bench.ask(entry) == A


async def test_modules_that_lie_about_do_not_replace_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.directory / "fxrelay").mkdir()
    for name in ("fxrelay/__init__.py", "json.py", "fractions.py"):
        bench.write(name, f"open('{bench.directory}/loaded', 'w')")
    monkeypatch.chdir(bench.directory)
    bench.write("site_rules.py", "import fractions\ndef choose(input):\n    return 'a'\n")
    assert await bench.ask(bench.entry("python:site_rules:choose")) == A
    assert not (bench.directory / "loaded").exists()


async def test_script_processes_give_way(bench: Bench) -> None:
    assert await bench.ask(bench.js("() => 'a'")) == A
    (pid,) = worker_pids()
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, pid) == wanted
    assert nice_of_session(pid) in (None, wanted)
    assert slice_ns(pid) in (None, SLICE_NS)


async def test_each_kind_has_processes_of_its_own(bench: Bench) -> None:
    bench.write(
        "site_rules.py",
        "import threading, time\ndef choose(input):\n    threading.Thread(target=time.sleep, args=(1000,)).start()\n    return 'a'\n",
    )
    for entry in (bench.entry("python:site_rules:choose"), bench.js("() => 'a'"), bench.sh("echo a")) * 2:
        assert await bench.ask(entry) == A
    assert bench.workers.started == 3


async def test_a_javascript_process_has_one_thread(bench: Bench) -> None:
    assert await bench.ask(bench.js("() => 'a'")) == A
    (pid,) = worker_pids()
    assert os.listdir(f"/proc/{pid}/task") == [str(pid)]


async def test_fifty_decisions_use_one_process(bench: Bench) -> None:
    entry = bench.js("() => 'a'")
    assert [await bench.ask(entry) for _ in range(50)] == [A] * 50
    assert bench.workers.started == 1


async def test_a_javascript_call_in_a_copy_ends_with_its_process(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.ask, bench.js("async () => { for (;;); }"))
        await eventually(lambda: any(map(worker_pids, worker_pids())))
        (worker,) = worker_pids()
        (child,) = worker_pids(worker)
        os.kill(worker, signal.SIGKILL)
        await eventually(lambda: not is_running(child))


LONELY = """
import os, socket, sys, time
from fxrelay.balance.forked import in_child

def work():
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)

relay, other = socket.socketpair()
in_child(work, 1000, relay, 100)
"""


async def test_a_child_ends_with_its_process_though_nobody_else_kills_it(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", LONELY, str(marker)], env=environment) as process:  # noqa: ASYNC220 - it is killed
        try:
            await eventually(lambda: pid_in(marker) > 0)
        finally:
            process.kill()
    await eventually(lambda: not is_running(pid_in(marker)), 10)


async def test_a_process_that_dies_leaves_its_last_words(bench: Bench) -> None:
    bench.write("site_rules.py", "import os\ndef choose(input):\n    os.write(2, b'x' * 10**6)\n    os._exit(3)\n")
    verdict = failed(await bench.ask(bench.entry("python:site_rules:choose")))
    assert verdict.name == "ScriptDied"
    assert verdict.detail.endswith("xxx")
    assert len(verdict.detail) < 2_500
    assert "x" * 9 not in verdict.message


async def test_many_decisions_at_once_share_two_processes(bench: Bench) -> None:
    entry = bench.js("() => 'a'")
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(bench.ask, entry)
    assert bench.workers.started == 2


@pytest.mark.parametrize("kind", ["js", "exec", "python"])
async def test_a_cancelled_call_leaves_nothing_behind(bench: Bench, kind: str) -> None:
    marker = bench.directory / "pid"
    bench.write(
        "site_rules.py", f"import os\ndef choose(input):\n    open('{marker}', 'w').write(str(os.getpid()))\n    while True: pass\n"
    )
    if kind == "js":
        entry = bench.js("() => { for (;;); }")
    elif kind == "exec":
        entry = bench.sh(f"sleep 1000 & echo $! > {marker}; wait")
    else:
        entry = bench.entry("python:site_rules:choose")
    assert await bench.ask(bench.js("() => 'a'", "warm.js")) == A
    others = worker_pids() if kind != "js" else set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.ask, entry)
        if kind != "js":
            await eventually(lambda: pid_in(marker) > 0)
        else:
            await trio.sleep(0.2)
        nursery.cancel_scope.cancel()
    await eventually(lambda: worker_pids() == others)
    if kind != "js":
        await eventually(lambda: not is_running(pid_in(marker)))
    assert await bench.ask(bench.js("() => 'a'", "warm.js")) == A


async def test_a_process_whose_call_was_over_when_it_was_cancelled_is_collected(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = bench.js("() => 'a'")
    call, scope = ScriptProcess.call, trio.CancelScope()
    token = trio.lowlevel.current_trio_token()
    workers: list[ScriptProcess] = []

    def answered(worker: ScriptProcess, *given: Any) -> Answer:
        answer = call(worker, *given)
        workers.append(worker)
        token.run_sync_soon(scope.cancel)
        time.sleep(0.2)
        return answer

    monkeypatch.setattr(ScriptProcess, "call", answered)
    with scope:
        await bench.ask(entry)
    assert scope.cancelled_caught
    (worker,) = workers
    assert worker._process is not None
    assert worker._process.returncode is not None
    assert not worker_pids()


BEGUN_S = 1.5
PARENT = """
import sys
import trio
from pathlib import Path
from balance_samples import open_bench
from fxrelay.balance.workers import ScriptLimits

async def main():
    async with open_bench(Path(sys.argv[1]), ScriptLimits(timeout_s=float(sys.argv[2]))) as bench, trio.open_nursery() as nursery:
        await bench.ask(bench.entry("python:quick:choose"))
        for spec in sys.argv[3:]:
            nursery.start_soon(bench.ask, bench.entry(spec))
        print("asked", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize(
    ("spec", "timeout_s"),
    [
        ("idle", 60.0),
        ("python:loop:choose", 60.0),
        ("python:loop:sleep", 60.0),
        ("exec:hang.sh", 60.0),
        ("js:loop.js", 60.0),
    ],
)
async def test_a_killed_relay_leaves_no_script_behind(bench: Bench, spec: str, timeout_s: float) -> None:
    marker = bench.directory / "pid"
    under_way = Path(f"{marker}.loop") if spec.startswith("python") else Path(f"{marker}.hang") if spec.startswith("exec") else marker
    bench.write("quick.py", f"import os\ndef choose(input):\n    open('{marker}', 'w').write(str(os.getpid()))\n    return 'a'\n")
    note = f"open('{marker}.loop', 'w').write(str(os.getpid()))"
    bench.write(
        "loop.py", f"import os, time\ndef choose(_):\n    {note}\n    while True: pass\ndef sleep(_):\n    {note}\n    time.sleep(1000)"
    )
    bench.write("loop.js", "() => { for (;;); }", 0o644)
    bench.write("hang.sh", f"#!/bin/sh\nsleep 1000 & echo $! > {marker}.hang\nwait\n")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(Path(__file__).parent)))}
    arguments = [sys.executable, "-c", PARENT, str(bench.directory), str(timeout_s), *([spec] if spec != "idle" else [])]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as parent:  # noqa: ASYNC220 - it is killed, not waited for
        try:
            assert parent.stdout is not None
            assert await trio.to_thread.run_sync(parent.stdout.readline) == b"asked\n"
            await eventually(lambda: pid_in(under_way) > 0)
            if spec == "js:loop.js":  # which runs when its process has taken more time than it needs to begin
                await eventually(lambda: any(psutil.Process(pid).cpu_times().user > BEGUN_S for pid in worker_pids(parent.pid)))
            workers = worker_pids(parent.pid)
            workers |= {child for worker in workers for child in worker_pids(worker)}
            assert workers
        finally:
            parent.kill()
    await eventually(lambda: not any(map(is_running, {*workers, pid_in(under_way)})))


async def test_closing_ends_the_processes(bench: Bench) -> None:
    entry = bench.js("() => 'a'")
    assert isinstance(entry, Script)
    assert await bench.ask(entry) == A
    bench.scripts.close()
    bench.scripts.close()
    assert not worker_pids()
