"""System: a fork of a template is what an interpreter would be that was started with the same words."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system import forks
from tests.system.stack import Stack, cli

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("config")]


@pytest.mark.parametrize("words", [["--version"], ["nonsense"], ["check", "--config", "/nowhere.toml"], ["run", "--help"]])
def test_it_says_what_an_interpreter_says_and_ends_as_it_does(words: list[str]) -> None:
    forked = cli(["fxgateway.cli", *words], check=False)
    started = subprocess.run([sys.executable, "-m", "fxgateway.cli", *words], capture_output=True, text=True, timeout=60, check=False)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_a_daemon_has_what_an_interpreter_has(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    forked = stack.start_gateway()
    found = {"fork": seen(forked.pid)}
    assert forked.stop() == 0
    started = stack.start_gateway(prefix=("env",))
    found["start"] = seen(started.pid)
    assert started.stop() == 0
    assert found["fork"] == found["start"]
    assert found["fork"]["session"] == "its own"


def seen(pid: int) -> dict[str, object]:
    """What a process was given: kinds of open files, directory, session, signals that it does not get."""
    kinds = sorted(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0].replace(str(pid), "PID") for fd in os.listdir(f"/proc/{pid}/fd"))
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "files": kinds,
        "directory": os.readlink(f"/proc/{pid}/cwd"),
        "session": "its own" if os.getsid(pid) == pid else "another's",
        "signals": {name: status[name] for name in ("SigBlk", "SigIgn", "SigCgt")},
    }


def test_its_end_is_told_whether_it_ends_or_is_killed(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    gateway = stack.start_gateway()
    assert gateway.process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        gateway.process.wait(0.01)
    gateway.kill()
    gateway.kill()
    assert gateway.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # not even a zombie
        os.kill(gateway.pid, 0)


def test_the_environment_is_the_one_it_is_given(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    answer = cli(["fxgateway.cli", "relays", "--json"], env={"FXGATEWAY_CONFIG": str(stack.gateway_config)})
    assert json.loads(answer.stdout)["running"] is False


def test_what_a_fork_would_do_otherwise_is_not_forked() -> None:
    assert forks.suits(["fxgateway.cli", "run"], {"FXGATEWAY__TUNNEL__WORKERS": "2"})
    assert not forks.suits(["fxgateway.cli", "launch"], None)
    assert not forks.suits(["fxgateway.cli", "run"], {"PYTHONPATH": "x"})
    assert not forks.suits(["fxrelay.cli", "run"], {"LD_PRELOAD": "x"})
    assert not forks.suits(["tests.chaos.load", "clients"], None)
