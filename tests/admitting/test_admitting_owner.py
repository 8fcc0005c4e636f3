"""Owner scripts in their processes: what they are asked, and that whatever goes wrong keeps out."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import trio

from fxrelay.admitting.owner import OwnerQuery, owner_of
from fxrelay.balance.workers import ScriptLimits, Workers

QUESTION = OwnerQuery("alice", ("cad",), "desk", "node-a", "192.0.2.7", "5f1")
Why = Callable[..., "AsyncIterator[str | None]"]


@pytest.fixture
def workers(tmp_path: Path):
    workers = Workers(ScriptLimits(timeout_s=1.0), tmp_path)
    yield workers
    workers.close()


def python(tmp_path: Path, body: str) -> str:
    (tmp_path / "site_owners.py").write_text(f"import json, time\ndef may(question):\n    {body}\n")
    return "python:site_owners:may"


def shell(tmp_path: Path, body: str) -> str:
    (path := tmp_path / "owner.sh").write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return "exec:owner.sh"


async def why_not(workers: Workers, tmp_path: Path, spec: str, question: OwnerQuery = QUESTION) -> str | None:
    with trio.fail_after(30):
        return await owner_of(spec, workers, tmp_path).why_not(question)


NO = "the owner script does not allow it"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return True", None),
        ("return {'allow': True}", None),
        ("return {'allow': True, 'reason': 'x'}", None),
        ("return False", NO),
        ("return None", NO),
        ("return 1", NO),
        ("return 'allow'", NO),
        ("return [True]", NO),
        ("return {'allow': 1}", NO),
        ("return {}", NO),
        ("return {'allow': False, 'reason': 'not hers'}", "not hers"),
        ("return {'allow': False, 'reason': 'a\\nb\\x1b[31m' + 'x' * 500}", "a b [31m" + "x" * 192),
        ("return {'reason': 7}", NO),
        ("raise ValueError('secret')", "python:site_owners:may failed: ValueError"),
        ("raise SystemExit(0)", "python:site_owners:may failed: SystemExit"),
        ("import os; os._exit(0)", "python:site_owners:may failed: ScriptDied"),
        ("time.sleep(60)", "python:site_owners:may failed: ScriptTimeout"),
    ],
)
async def test_a_function_says_who_may(workers: Workers, tmp_path: Path, body: str, reason: str | None) -> None:
    assert await why_not(workers, tmp_path, python(tmp_path, body)) == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo allow", None),
        ("printf allow", None),
        ("echo deny: eve has left", "eve has left"),
        ("echo deny", NO),
        ("echo allowed", NO),
        ("echo allow; echo deny", NO),
        ("true", NO),
        ("echo allow; exit 1", "exec:owner.sh failed: ScriptFailed"),
        ("sleep 60", "exec:owner.sh failed: ScriptTimeout"),
    ],
)
async def test_an_executable_says_who_may(workers: Workers, tmp_path: Path, body: str, reason: str | None) -> None:
    assert await why_not(workers, tmp_path, shell(tmp_path, body)) == reason


async def test_both_get_the_whole_question(workers: Workers, tmp_path: Path) -> None:
    expected = json.loads(json.dumps(asdict(QUESTION)))
    body = f"return {{'allow': question == {expected!r}, 'reason': json.dumps(question)}}"
    assert await why_not(workers, tmp_path, python(tmp_path, body)) is None
    assert await why_not(workers, tmp_path, shell(tmp_path, "cat > question; echo allow".replace("question", str(tmp_path / "q")))) is None
    assert json.loads((tmp_path / "q").read_text()) == expected


async def test_a_function_that_is_not_there(workers: Workers, tmp_path: Path) -> None:
    assert "failed" in (await why_not(workers, tmp_path, "python:nowhere_at_all:may") or "")


@pytest.mark.parametrize("spec", ["", "python", "python:a", "python:a:b c", "js:owner.js", "exec:", "exec:missing", "builtin:local"])
def test_what_is_no_owner(workers: Workers, tmp_path: Path, spec: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        owner_of(spec, workers, tmp_path)


def test_a_script_that_others_may_change(workers: Workers, tmp_path: Path) -> None:
    spec = shell(tmp_path, "echo allow")
    (tmp_path / "owner.sh").chmod(0o722)
    with pytest.raises(ValueError, match="chmod go-w"):
        owner_of(spec, workers, tmp_path)
