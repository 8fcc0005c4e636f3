"""The systemd units are as closed as the documentation says, and the certificate script works."""

import os
import re
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


@pytest.mark.parametrize("form", ["certificate", "key", "both"])
def test_issue_says_so_of_files_that_are_not_pem(tmp_path: Path, form: str):
    setup.write_gateway(tmp_path, "wss://gw.example.com:8443", 7, 0.0)
    ca, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    if form != "key":
        der(["x509"], ca)
    if form != "certificate":
        der(["pkey"], key)
    command = [sys.executable, str(ROOT / "certs" / "issue.py"), "--ca", str(ca), "--ca-key", str(key), "--host", "gw.example.com"]
    told = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert told.returncode == 2
    assert "PEM" in told.stderr
    assert "Traceback" not in told.stderr


def der(kind: list[str], path: Path) -> None:
    command = ["openssl", *kind, "-in", str(path), "-outform", "DER"]
    path.write_bytes(subprocess.run(command, check=True, timeout=60, capture_output=True).stdout)


SERVICE_UID = 61_234 if os.geteuid() == 0 else os.geteuid()
"""As systemd gives one to a dynamic user."""


def documented(page: str, begin: str) -> str:
    """The commands of one indented block of a README: the one with `begin` in it."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    (block,) = [block for block in blocks if begin in block]
    return block


def walk(commands: str, home: Path) -> None:
    """Run them as they are written, with `home` for the machine's directories, but for what systemd does."""
    commands = re.sub(r"^ +(systemctl|cp deploy/systemd).*$", "", commands, flags=re.MULTILINE)
    commands = re.sub(r"(?<=[\s=])(?=/var/lib/|/etc/fxgateway-ca)", str(home), commands)
    commands = commands.replace("…/", f"{ROOT}/").replace("/opt/fxgateway/bin/", f"{Path(sys.executable).parent}/")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-euc", commands], check=True, timeout=60, env=env, cwd=home)


def test_a_certificate_is_renewed_by_the_steps_for_the_units(tmp_path: Path):
    service, authority = tmp_path / "var/lib/private/fxgateway", tmp_path / "etc/fxgateway-ca"
    (tmp_path / "var/lib").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    walk(documented("deploy/systemd/README.md", "fxgateway init"), tmp_path)
    assert not (service / "ca.key").exists()  # before the service has ever run
    assert authority.stat().st_mode & 0o777 == 0o700
    before = (service / "server.pem").read_text()
    for path in (service, *service.iterdir()):
        os.chown(path, SERVICE_UID, -1)
    # Whoever has the service can put links there.
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (service / "server.key").unlink()
    (service / "server.key").symlink_to(victim)

    walk(documented("certs/README.md", "--ca ca.pem --ca-key ca.key --host gw.example.com --out /var/lib/private"), tmp_path)

    assert victim.read_text() == "untouched"
    assert victim.stat().st_uid == os.geteuid()
    assert (service / "server.pem").read_text() != before
    for name in ("server.pem", "server.key"):
        assert (service / name).lstat().st_uid == SERVICE_UID
    verified = ["openssl", "verify", "-CAfile", str(service / "ca.pem"), str(service / "server.pem")]
    assert subprocess.run(verified, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("page", ["deploy/systemd/README.md", "certs/README.md"])
def test_root_is_never_told_to_give_away_what_a_link_leads_to(page: str):
    told = re.findall(r"^ {4}chown .*$", (ROOT / page).read_text(), re.MULTILINE)
    assert told
    for command in told:
        assert "chown -h " in command
        assert not re.search(r" -\w*R| --recursive", command)
        # Whose it becomes is read from the directory: within it, the service decides what a name leads to.
        assert re.search(r" --reference=/var/lib/private/\w+ ", command)
