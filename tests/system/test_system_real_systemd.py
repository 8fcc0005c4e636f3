"""System: the units of deploy/systemd below a real systemd, installed, upgraded and restarted by the commands of the documents."""

import contextlib
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fxtunnel.kit.launcher import LIVED_S
from tests.ports import free_port
from tests.system import real_systemd
from tests.system.peers import Service, dial, echo, is_served, say
from tests.system.real_systemd import ROOT, Machine
from tests.system.stack import slowness, wait_until
from tests.system.test_system_upgrades import BACK_S, Flow, through
from tests.test_deploy import documented

WHY_NOT = real_systemd.why_not()
pytestmark = [pytest.mark.system, pytest.mark.xdist_group("real-systemd"), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

INSTALLED_S = 60.0
RESTARTS = 3
UNITS = ("fxgateway", "fxrelay")
README = "deploy/systemd/README.md"
# The libraries are those the tests run with; nothing is fetched.
INSTALL = """
/opt/python/bin/python3 -m venv --without-pip /opt/fxgateway
echo /opt/libraries >"$(/opt/fxgateway/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/libraries.pth"
printf '#!/bin/sh\\nexec /opt/fxgateway/bin/python -m pip --disable-pip-version-check "$@" --no-index\\n' >/opt/fxgateway/bin/pip
chmod 755 /opt/fxgateway/bin/pip
"""
LIMITS = "[limits]\ndrain_s = 600\n"


@dataclass
class Site:
    """Both hosts in one: a gateway with a door for an echo service, a relay, and the systemd that runs them."""

    machine: Machine
    port: int
    service: Service

    def sh(self, commands: str) -> str:
        """Root's commands there, in the repository's directory; what they print."""
        return self.machine.run("sh", "-euc", commands).stdout

    def install(self, source: str) -> None:
        """The commands that README has, but for the requirements, which are there."""
        (step,) = (line for line in documented(README, "python3 -m venv").splitlines() if line.endswith(" ."))
        self.sh(f"cd {source}; {step}")

    def edit(self, unit: str, change: Callable[[str], str]) -> None:
        """A configuration, as an administrator edits it: the file's owner stays."""
        path = f"/var/lib/private/{unit}/{'gateway' if unit == 'fxgateway' else 'relay'}.toml"
        text = change(self.sh(f"cat {path}"))
        self.sh(f"cat >{path} <<'END'\n{text}\nEND")

    def daemon(self, unit: str) -> psutil.Process:
        """The process that serves now, below the launcher."""
        inner = int(self.machine.shows(unit, "MainPID"))
        (launcher,) = (each for each in self.machine.processes(f"{unit}.service") if inner == _inner_pid(each))
        return launcher.children()[-1]

    def count(self, unit: str) -> int:
        """Its processes, those that drain included."""
        return len(self.machine.processes(f"{unit}.service"))


def _inner_pid(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)[1])


def set_up(site: Site) -> None:
    """Both daemons, by README's commands."""
    tunnel = free_port()
    site.sh(INSTALL)
    (copied, linked) = (line for line in documented(README, "python3 -m venv").splitlines() if "install -m" in line or "ln -s" in line)
    site.install("/opt/source")
    site.sh(f"{copied}\n{linked}")

    *steps, enable = documented(README, "fxgateway init").replace("gw.example.com:8443", f"127.0.0.1:{tunnel}").splitlines()
    site.sh("\n".join(steps))
    door = f'listen = "127.0.0.1:{site.port}"'
    admin = f"127.0.0.1:{free_port()}"

    def change(text: str) -> str:
        return (
            re.sub(r"^listen = .*:2222.*$", door, text, flags=re.MULTILINE).replace("127.0.0.1:9101", admin).replace("[limits]\n", LIMITS)
        )

    site.edit("fxgateway", change)
    site.sh(enable)
    relay = '[relay]\nid = "node-a"\nstate_dir = "state"\n[[gateway]]\nfile = "gateway.json"\n' + (
        f'[[service]]\nname = "ssh"\nprotocol = "tcp"\ntarget = "{site.service.target}"\n{LIMITS}'
    )
    steps = documented(README, "install -m 600 gateway.json relay.toml").replace("cp deploy", "cp /opt/source/deploy")
    site.sh("mkdir /run/carried; cp /var/lib/private/fxgateway/gateway.json /run/carried/")
    site.sh(f"cd /run/carried; cat >relay.toml <<'END'\n{relay}\nEND\n{steps}")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    service = Service(echo)
    with tempfile.TemporaryDirectory(prefix="fx-") as directory, Machine(Path(directory)) as machine:
        site = Site(machine, free_port(), service)
        set_up(site)
        wait_until(lambda: is_served(site.port), INSTALLED_S, "a first client served")
        yield site
    service.close()


@pytest.fixture(autouse=True)
def _both_serve(site: Site) -> Iterator[None]:
    yield
    for unit in UNITS:
        site.machine.systemctl("start", unit)
    wait_until(lambda: is_served(site.port), INSTALLED_S, "a client served after the test")


def test_what_is_installed_by_the_documents_runs_as_its_own_user_and_answers(site: Site) -> None:
    for unit in UNITS:
        assert site.machine.shows(unit, "ActiveState") == "active"
        assert site.daemon(unit).uids().real >= 61_184  # systemd's dynamic users, systemd.exec(5)
        site.sh(f"as-service {unit} check" + (" --no-bind" if unit == "fxgateway" else ""))
    assert "node-a" in site.sh("as-service fxgateway relays")
    assert "node-a" in site.sh("fxgateway relays --config /var/lib/fxgateway/gateway.toml")
    assert "node-a" in site.sh("fxrelay status --config /var/lib/fxrelay/relay.toml")
    # The gateway confines itself where the unit lets it.
    assert "sandbox" in site.machine.journal("fxgateway")


@pytest.mark.parametrize("unit", UNITS)
def test_restarts_lose_and_refuse_nobody(site: Site, unit: str) -> None:
    through(site.port, lambda: site.machine.systemctl("restart", unit), RESTARTS)
    wait_until(lambda: site.count(unit) == 2, 60, "the end of the old processes")


def test_reloads_lose_and_refuse_nobody(site: Site) -> None:
    through(site.port, lambda: site.machine.systemctl("reload", *UNITS), RESTARTS)


@pytest.mark.parametrize("unit", UNITS)
def test_a_reload_says_that_a_file_is_wrong(site: Site, unit: str) -> None:
    before = site.daemon(unit).pid
    site.edit(unit, lambda text: text + "\nwrong")
    refused = site.machine.run("systemctl", "reload", unit, check=False)
    site.edit(unit, lambda text: text.rstrip().removesuffix("wrong"))
    assert refused.returncode == 1
    assert "is not valid TOML" in site.machine.journal(unit)
    assert site.daemon(unit).pid == before
    site.machine.systemctl("reload", unit)


def test_a_key_that_is_kept_elsewhere_is_the_commands_too(site: Site) -> None:
    """As README has it: LoadCredential= and a variable. `as-service` has both, and is in the service's directory."""
    extra, key = "/etc/systemd/system/fxgateway.service.d", "/etc/fxgateway-ca/server.key"
    lines = re.findall(r"`((?:LoadCredential|Environment)=[^`]+)`", (ROOT / README).read_text())
    assert len(lines) == 2
    text = "\n".join(["[Service]", *lines]).replace("/etc/ssl/private/fxgateway.key", key)
    home = "/var/lib/private/fxgateway"
    site.sh(f"mv {home}/server.key {key}; chown 0 {key}; mkdir {extra}; cat >{extra}/key.conf <<'END'\n{text}\nEND")
    site.machine.systemctl("daemon-reload")
    site.machine.systemctl("restart", "fxgateway")
    wait_until(lambda: is_served(site.port), 60, "a client served")
    assert "ok: " in site.sh("as-service fxgateway check --no-bind")
    site.sh("as-service fxgateway withdraw gateway.json")
    site.sh(f"mv {key} {home}/; chown -h --reference={home} {home}/server.key; rm -r {extra}")
    site.machine.systemctl("daemon-reload")
    site.machine.systemctl("restart", "fxgateway")


def test_a_package_upgrade_loses_and_refuses_nobody(site: Site) -> None:
    newer = "9.9.9"
    site.sh(
        "mkdir /run/newer; cp -r pyproject.toml README.md LICENSE fxgateway fxrelay fxtunnel certs /run/newer/;"
        f"""sed -i 's/^__version__: Final = ".*"$/__version__: Final = "{newer}"/' /run/newer/fxtunnel/__init__.py"""
    )

    def upgrade() -> None:
        site.install("/run/newer")
        for unit in UNITS:
            site.sh(f"as-service {unit} check" + (" --no-bind" if unit == "fxgateway" else ""))
            site.machine.systemctl("restart", unit)

    before = [site.daemon(unit).pid for unit in UNITS]
    through(site.port, upgrade, 1)
    assert newer in site.sh("fxgateway --version")
    assert not set(before) & {site.daemon(unit).pid for unit in UNITS}


def test_a_stream_outlives_a_stop(site: Site) -> None:
    """Stopped and started again later: what was open goes on, who comes in between is refused, the next is served."""
    flow = Flow(site.port, 1)
    try:
        site.machine.systemctl("stop", "fxgateway")
        assert site.machine.shows("fxgateway", "ActiveState") == "inactive"
        with pytest.raises(ConnectionRefusedError):
            dial(site.port, 5)
        sent_bytes = flow.received_bytes
        wait_until(lambda: flow.received_bytes > sent_bytes + 100_000, 20, "bytes that still pass")
        site.machine.systemctl("start", "fxgateway")
        wait_until(lambda: is_served(site.port), 20, "a client served again")
    finally:
        problem = flow.finish()
    assert problem == ""
    wait_until(lambda: site.count("fxgateway") == 2, 60, "the end of the old process")


def wait_in_queue(port: int) -> None:
    """A client that connects while nobody serves; the door's socket is kept."""
    with dial(port, INSTALLED_S) as client:
        say(client)


@pytest.mark.parametrize("unit", UNITS)
def test_a_daemon_that_is_killed_is_replaced_at_once(site: Site, unit: str) -> None:
    site.machine.systemctl("restart", unit)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > LIVED_S, 60, "a daemon that has lived for a while")
    killed = site.daemon(unit)
    gone = time.monotonic()
    killed.kill()
    if unit == "fxgateway":
        wait_in_queue(site.port)
    wait_until(lambda: is_served(site.port) and site.daemon(unit) != killed, 30, "a client served by another")
    back_s = time.monotonic() - gone
    sys.stdout.write(f"\n{unit}'s daemon was killed: served again after {back_s:.2f} s\n")
    assert back_s < BACK_S * slowness()
    assert site.machine.shows(unit, "NRestarts") == "0"


@pytest.mark.parametrize("unit", UNITS)
def test_a_launcher_that_is_killed_is_started_again(site: Site, unit: str) -> None:
    """Together with its daemon, as the kernel does it when a unit's memory is full. Who connects to the gateway meanwhile waits."""
    patience_s = {"fxgateway": 0.5, "fxrelay": 15.0}[unit]  # RestartSec
    daemon = site.daemon(unit)
    gone = time.monotonic()
    for process in (daemon.parent(), daemon):
        process.kill()
    if unit == "fxgateway":
        wait_in_queue(site.port)
    wait_until(lambda: is_served(site.port), patience_s + 30, "a client served")
    back_s = time.monotonic() - gone
    sys.stdout.write(f"\n{unit}'s processes were killed: served again after {back_s:.2f} s\n")
    assert back_s < patience_s + BACK_S * slowness()


def test_a_daemon_that_hangs_is_replaced(site: Site) -> None:
    extra = "/etc/systemd/system/fxgateway.service.d"
    site.sh(f"mkdir {extra}; printf '[Service]\\nWatchdogSec=5\\n' >{extra}/watchdog.conf")
    site.machine.systemctl("daemon-reload")
    site.machine.systemctl("restart", "fxgateway")
    wait_until(lambda: is_served(site.port), 20, "a client served")
    hanging = site.daemon("fxgateway")
    hanging.send_signal(signal.SIGSTOP)
    wait_until(lambda: not hanging.is_running(), 30, "the end of who hangs")
    assert "Watchdog timeout" in site.machine.journal("fxgateway")
    wait_until(lambda: is_served(site.port), 30, "a client served")
    site.sh(f"rm -r {extra}")
    site.machine.systemctl("daemon-reload")
    site.machine.systemctl("restart", "fxgateway")


def test_ports_below_1024_are_systemds(site: Site) -> None:
    low = low_port()
    address = f"127.0.0.1:{low}"
    site.edit("fxgateway", lambda text: text + f'\n[[door]]\nlisten = "{address}"\nservice = "ssh"\n')
    unit = "fxgateway-doors.socket"
    text = re.sub(r"^ListenStream=.*$", f"ListenStream={address}", (ROOT / "deploy/systemd" / unit).read_text(), flags=re.MULTILINE)
    site.sh(f"cat >/etc/systemd/system/{unit} <<'END'\n{text}\nEND\n{documented(README, f'enable --now {unit}')}")
    wait_until(lambda: is_served(low), 20, "a client served at the low port")
    through(low, lambda: site.machine.systemctl("restart", "fxgateway"), 1)


def low_port() -> int:
    for port in range(1023, 600, -1):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no low port is free")


def test_several_processes_are_restarted_alike(site: Site) -> None:
    site.edit("fxgateway", lambda text: text.replace("[tunnel]\n", "[tunnel]\nworkers = 2\n", 1))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(site.port)) for _ in range(8)]
        for client in clients:
            say(client)
        through(site.port, lambda: site.machine.systemctl("restart", "fxgateway"), 2)
        for client in clients:
            say(client)
