"""The systemd units are as closed as the documentation says, and the certificate script works."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fxgateway import setup
from fxtunnel.kit import launcher
from tests.system import confinement

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
BOTH = {"eventfd2", "epoll_create1", "epoll_pwait", "accept4", "prlimit64", "flock", "fchmod", "clone", "execve", "kill", "recvmsg"}
CALLS = {
    "fxgateway.service": {*BOTH, "prctl", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"},
    # Scripts, owners and metrics: fxrelay/balance/worker_main.py, executable.py, forked.py and fxrelay/cluster/programs.py.
    "fxrelay.service": {
        *BOTH,
        "prctl",
        "setpriority",
        "getpriority",
        "sched_setscheduler",
        "setsid",
        "pidfd_open",
        "vfork",
        "pipe2",
        "fdatasync",
    },
}
"""System calls that the daemons and what they start ask for by name, or could not do without."""


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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_filter_lets_through_what_is_called(unit: Path):
    allowed = confinement.allowed_calls(confinement.settings_of(unit))
    assert CALLS[unit.name] <= allowed
    assert not {"chown", "mount", "ptrace", "bpf", "reboot", "init_module"} & allowed


def test_a_relay_sees_what_it_tells_of_the_machine():
    """/proc/stat and /proc/meminfo are no process's; without them no relay starts (fxrelay/cluster/machine.py)."""
    settings = confinement.settings_of(ROOT / "deploy" / "systemd" / "fxrelay.service")
    assert settings["ProcSubset"] == ["all"]
    assert "AF_NETLINK" in settings["RestrictAddressFamilies"][0].split()  # its own addresses, psutil.net_if_addrs


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
