"""System: the demo does what it says, and leaves nothing behind."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_the_demo(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": tempfile.mkdtemp(prefix="fx-", dir=tempfile.gettempdir())}
    env.pop("KEEP", None)
    answer = subprocess.run([sys.executable, "-m", "examples.demo"], capture_output=True, text=True, timeout=240, env=env, check=False)
    left = list(Path(env["TMPDIR"]).iterdir())
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Nothing was lost" in answer.stdout
    assert answer.stdout.count("sha256 as at the source") == 2
    assert left == []
    Path(env["TMPDIR"]).rmdir()
