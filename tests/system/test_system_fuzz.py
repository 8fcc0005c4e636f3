"""System: the short form of `python -m tests.fuzz --live`: malformed frames on the links of running daemons."""

import pytest

from tests.fuzz.live import attack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("fuzz")]

FRAMES = 5_000


def test_malformed_frames_hurt_nobody_else() -> None:
    findings = attack(FRAMES, seed=1)
    assert findings.frames >= FRAMES
    assert findings.echoes > 20
    assert {name.partition(":")[0] for name in findings.ends} == {"gateway data", "gateway control", "relay data", "relay control"}
    assert not any("stuck" in name for name in findings.ends)
