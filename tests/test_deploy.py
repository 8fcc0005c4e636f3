"""The systemd units are as closed as the documentation says, and the certificate script works."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fxgateway import setup
from fxtunnel.kit import launcher

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


def test_there_is_a_unit_for_each_daemon():
    assert {unit.name for unit in UNITS} == {"fxgateway.service", "fxrelay.service"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_exposure_is_at_most_1_5(unit: Path):
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-400:] + result.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_let_the_old_process_finish(unit: Path):
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#"))
    assert " launch --config " in settings["ExecStart"]
    # Only the launcher is signalled; it alone speaks to systemd, and keeps sockets there.
    assert (settings["Type"], settings["KillMode"], settings["NotifyAccess"]) == ("notify", "process", "main")
    assert settings["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(settings["TimeoutStopSec"]) > launcher.RELEASE_S
    most = launcher.MAX_KEPT if unit.name == "fxgateway.service" else 16
    assert int(settings["FileDescriptorStoreMax"]) == most


def test_issue_renews_the_certificate_from_the_same_authority(tmp_path: Path):
    setup.write_gateway(tmp_path, "wss://gw.example.com:8443", 7, 0.0)
    before = (tmp_path / "server.pem").read_text()
    command = [sys.executable, str(ROOT / "certs" / "issue.py"), "--ca", str(tmp_path / "ca.pem"), "--ca-key", str(tmp_path / "ca.key")]
    subprocess.run(
        [*command, "--host", "gw.example.com", "--out", str(tmp_path)], check=True, timeout=60, cwd=ROOT, env={"PYTHONPATH": "."}
    )
    assert (tmp_path / "server.pem").read_text() != before
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600
    verified = subprocess.run(
        ["openssl", "verify", "-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "server.pem")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
