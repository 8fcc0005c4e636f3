"""Metrics: executables and functions of administrators, good ones and bad ones."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from fxrelay.cluster.metrics import Metrics
from fxrelay.cluster.plain_json import size_of
from fxrelay.cluster.priority import SLICE_NS
from fxrelay.cluster.programs import NICE, ProgramBounds, json_of, why_not_run
from fxrelay.cluster.server import MAX_METRICS_BYTES
from fxtunnel.errors import ScriptError
from tests.scheduling import nice_of_session, slice_ns

BOUNDS = ProgramBounds(timeout_s=20.0)
QUICK = ProgramBounds(timeout_s=0.5)
MakeProgram = Callable[..., Path]


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    def make(name: str, body: str, mode: int = 0o755) -> Path:
        directory = tmp_path / "metrics.d"
        directory.mkdir(exist_ok=True, mode=0o755)
        path = directory / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(mode)
        return path

    return make


def make_metrics(
    directory: Path, functions: dict[str, str] | None = None, bounds: ProgramBounds = BOUNDS, period_s: float = 10.0
) -> Metrics:
    return Metrics(directory, functions or {}, period_s, bounds, os.environ)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.02)


async def test_programs_print_any_json_under_their_name(make_program: MakeProgram) -> None:
    directory = make_program("queue.sh", "echo '{\"waiting\": 3}'").parent
    make_program("plain", "echo 7")
    metrics = make_metrics(directory)
    assert metrics.fields() == {"metrics": {}, "metricErrors": {}}
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {"queue": {"waiting": 3}, "plain": 7}, "metricErrors": {}}


async def test_programs_see_little_and_are_nice(make_program: MakeProgram) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    until_nicer = f'for i in $(seq 100); do [ "$(nice)" = {own} ] || break; sleep 0.1; done'  # it is made so once it runs
    look = 'printf \'{"nice": %s, "cwd": "%s", "names": "%s"}\' "$(nice)" "$(pwd)" "$(env | cut -d= -f1 | sort | tr "\\n" " ")"'
    body = f"{until_nicer}\n{look}"
    path = make_program("look", body)
    found = await json_of(path, BOUNDS, {**os.environ, "SECRET": "x", "FXRELAY__A__B": "y"})
    assert found["cwd"] == "/"
    assert set(found["names"].split()) - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "LANG", "HOME"}
    assert found["nice"] == min(19, own + 10)


async def test_programs_give_way_however_the_kernel_groups_processes(make_program: MakeProgram, tmp_path: Path) -> None:
    told, go = tmp_path / "pid", tmp_path / "go"
    path = make_program("wait", f"echo $$ > {told}\nuntil [ -e {go} ]; do sleep 0.05; done\necho 1")
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(json_of, path, BOUNDS, os.environ)
        await until(lambda: told.exists() and told.read_text().endswith("\n"))
        pid = int(told.read_text())
        await until(lambda: os.sched_getscheduler(pid) == os.SCHED_BATCH)
        await until(lambda: slice_ns(pid) in (None, SLICE_NS))
        await until(lambda: nice_of_session(pid) in (None, wanted))
        assert os.getpriority(os.PRIO_PROCESS, pid) == wanted
        go.touch()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("echo 1; echo no such queue >&2; exit 3", "exit status 3: no such queue"),
        ("kill -9 $$", "exit status -9"),
        ("true", "no JSON"),
        ("echo '{'", "no JSON"),
        ("echo NaN", "no JSON"),
        ("printf '\\377'", "no JSON"),
        ("head -c 70000 /dev/zero", "more than 65536 bytes"),
        ("cat /dev/zero", "more than 65536 bytes"),
        ("cat /dev/zero >&2 & sleep 0.1; kill $!; echo '\x1b[31mred' >&2; exit 1", "exit status 1"),
    ],
)
async def test_failures_are_told(make_program: MakeProgram, body: str, told: str) -> None:
    path = make_program("bad", body)
    with pytest.raises(ScriptError) as caught:
        await json_of(path, BOUNDS, os.environ)
    assert told in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 200


async def test_a_program_that_takes_too_long_is_killed_with_its_children(make_program: MakeProgram, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    path = make_program("slow", f"sleep 600 & echo $! $$ > {pids}; wait")
    with pytest.raises(ScriptError, match=r"took longer than 4 s"):
        await json_of(path, ProgramBounds(timeout_s=4.0), os.environ)
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 2
    await until(lambda: not any(is_alive(pid) for pid in found))


async def test_cancelling_kills_the_program(make_program: MakeProgram, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    path = make_program("slow", f"echo $$ > {pids}.new; mv {pids}.new {pids}; exec sleep 600")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(json_of, path, BOUNDS, os.environ)
        await until(pids.exists)
        nursery.cancel_scope.cancel()
    assert not is_alive(int(pids.read_text()))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_what_others_could_have_written_is_not_run(make_program: MakeProgram, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_program("good.sh", "echo 1").parent
    make_program("group", "echo 2", 0o775)
    make_program("world", "echo 2", 0o757)
    make_program("plain.txt", "echo 2", 0o644)
    make_program(".hidden", "echo 2")
    make_program("good.txt", "echo 2")
    make_program("bad name", "echo 2")
    (directory / "link").symlink_to(directory / "good.sh")
    (directory / "folder").mkdir()
    os.mkfifo(directory / "fifo", 0o755)
    metrics = make_metrics(directory)
    for _ in range(2):
        await metrics.measure_once()
        assert metrics.fields() == {"metrics": {"good": 1}, "metricErrors": {}}
    told = {record.message.removeprefix(f"{directory}/").partition(" is skipped")[0] for record in caplog.records}
    assert told == {"group", "world", "plain.txt", "good.txt", "bad name", "link", "fifo"}
    assert len(caplog.records) == 7, "once each"


async def test_a_directory_that_others_may_write_to_is_not_trusted(make_program: MakeProgram) -> None:
    path = make_program("good", "echo 1")
    assert why_not_run(path) == ""
    path.parent.chmod(0o777)
    assert "its directory is writable" in why_not_run(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_a_program_of_another_user_is_not_trusted(make_program: MakeProgram) -> None:
    path = make_program("good", "echo 1")
    os.chown(path, 12_345, 12_345)
    assert "belongs to uid 12345" in why_not_run(path)


async def test_no_directory_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = make_metrics(tmp_path / "none")
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {}, "metricErrors": {}}
    assert not caplog.records


async def test_the_last_good_value_stands_for_three_periods(make_program: MakeProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_program("queue", "echo 5")
    now = [1_000.0]
    monkeypatch.setattr("fxrelay.cluster.metrics.trio.current_time", lambda: now[0])
    metrics = make_metrics(path.parent)
    await metrics.measure_once()
    make_program("queue", "exit 1")
    now[0] += 10
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {"queue": 5}, "metricErrors": {"queue": "exit status 1"}, "metricAges": {"queue": 10.0}}
    now[0] += 20.1
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {"queue": None}, "metricErrors": {"queue": "exit status 1"}}
    make_program("queue", "echo 6")
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {"queue": 6}, "metricErrors": {}}
    path.unlink()
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {}, "metricErrors": {}}


async def test_what_does_not_fit_is_left_out_and_told(make_program: MakeProgram) -> None:
    for name in "abcdef":
        directory = make_program(name, "printf '\"'; head -c 9000 /dev/zero | tr '\\0' x; printf '\"'").parent
    metrics = make_metrics(directory)
    await metrics.measure_once()
    fields = metrics.fields()
    assert [name for name, value in fields["metrics"].items() if value is None] == ["d", "e", "f"]
    assert set(fields["metricErrors"]) == {"d", "e", "f"}
    assert size_of(fields["metrics"]) <= MAX_METRICS_BYTES


async def test_a_slow_metric_delays_no_other(make_program: MakeProgram) -> None:
    directory = make_program("slow", "sleep 600").parent
    make_program("quick", "echo 1")
    metrics = make_metrics(directory)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics.run)
        await until(lambda: metrics.fields()["metrics"].get("quick") == 1)
        assert metrics.fields()["metrics"]["slow"] is None
        nursery.cancel_scope.cancel()


@pytest.fixture
def site_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cluster_site_metrics.py").write_text(
        """
import os, sys, threading, time
print("not part of the answer")
def good(): return {"a": [1, None]}
def fails(): raise RuntimeError("no\\nqueue")
def leaves(): sys.exit(3)
def odd(): return object()
def nan(): return float("nan")
def long(): return "x" * 70_000
def loop():
    value = []
    value.append(value)
    return value
def hangs():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    with open(os.path.join(os.path.dirname(__file__), "pid"), "w") as file:
        file.write(str(os.getpid()))
    while True: pass
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "cluster_site_metrics"


async def test_functions_may_be_in_a_module_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "metrics_beside_it.py").write_text("def queue(): return 7\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('no module of the standard library is replaced')\n")
    functions = {"queue": "metrics_beside_it:queue"}
    metrics = make_metrics(tmp_path / "none", functions, ProgramBounds(timeout_s=20.0, module_dir=tmp_path))
    await metrics.measure_once()
    assert metrics.fields() == {"metrics": {"queue": 7}, "metricErrors": {}}


async def test_functions_return_any_json(site_metrics: str, tmp_path: Path) -> None:
    functions = {name: f"{site_metrics}:{name}" for name in ("good", "fails", "leaves", "odd", "nan", "long", "loop", "missing")}
    metrics = make_metrics(tmp_path / "none", {**functions, "nowhere": "no_such_module_at_all:f"})
    await metrics.measure_once()
    fields = metrics.fields()
    assert fields["metrics"] == {"good": {"a": [1, None]}} | dict.fromkeys(["nowhere", *list(functions)[1:]])
    errors: dict[str, Any] = fields["metricErrors"]
    assert set(errors) == set(fields["metrics"]) - {"good"}
    assert errors["fails"] == "exit status 1: RuntimeError: no queue"
    assert errors["leaves"] == "exit status 1: SystemExit: 3"
    assert errors["nowhere"].startswith("exit status 1: ModuleNotFoundError")
    assert errors["long"] == "printed more than 65536 bytes"


async def test_a_function_that_hangs_is_killed(site_metrics: str, tmp_path: Path) -> None:
    functions = {"hangs": f"{site_metrics}:hangs", "good": f"{site_metrics}:good"}
    metrics = make_metrics(tmp_path / "none", functions, ProgramBounds(timeout_s=4.0))
    await metrics.measure_once()
    fields = metrics.fields()
    assert fields["metricErrors"] == {"hangs": "took longer than 4 s"}
    assert fields["metrics"]["good"] == {"a": [1, None]}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert site_metrics not in sys.modules
