"""Faults that have tests of their own, played from there: exceptions at every await, whoever breaks into the gateway."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.chaos.figures import Outcome
from tests.chaos.stage import Fault, Scale, Stage, Unplayable

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {
    "an exception at every await": "tests/faults",
    "a gateway in wrong hands, in its sandbox": "tests/system/test_system_sandbox.py tests/workers/test_workers_sandbox.py",
}


def known(stage: Stage, outcome: Outcome) -> None:
    """Each in a pytest of its own. What this machine lacks is skipped there."""
    if stage.scale is Scale.SHORT:
        raise Unplayable("these tests run by themselves")
    for number, (what, paths) in enumerate(KNOWN.items()):
        stage.show(what, number / len(KNOWN))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CI": "1"}, timeout=900, check=False)
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
        passed = counts.get("passed", done.stdout.count("."))
        outcome.add(f"{what}: tests passed", passed, "> 0" if not counts.get("skipped") else "")
        outcome.add(f"{what}: failed", counts.get("failed", 0) + counts.get("error", 0) + (done.returncode not in (0, 1)), "= 0")


KNOWN_FAULTS = Fault("known", "exceptions at every await; a gateway in wrong hands opens nothing: as their tests say", known)
