"""A real systemd, as the first process of namespaces of its own: its units, its journal, its watchdog. The network is the machine's.

Its machine has the files of this one, but /etc, /opt, /run, /tmp, /usr/local and /var are copies or empty, and gone when it ends. There
are no other units than those a test puts there and the few that these need.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Final, Self

import psutil

from tests.system.stack import wait_until

ROOT: Final = Path(__file__).resolve().parents[2]
BOOT_S: Final = 60.0
COMMAND_S: Final = 180.0
_EMPTY: Final = ("/opt", "/run", "/tmp", "/usr/local", "/var")
_TARGETS: Final = ("basic", "multi-user", "network", "network-online", "shutdown", "sockets", "sysinit", "umount", "final")
_JOURNAL: Final = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
_OWN_UNITS: Final = (*_JOURNAL, "dbus.service", "dbus.socket")
_NEEDED: Final = "systemd-journald.service dbus.service"
# $1: a directory of the test's; $2: the repository; $3: Python's prefix; $4: where the libraries are.
_BOOT: Final = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/etc
cp -a /etc/. /mnt/etc
for number in 1 2 3 4; do
    mkdir "/mnt/$number"
    mount --bind "$1" "/mnt/$number"
    mount -o remount,bind,ro "/mnt/$number"
    shift
done
for place in EMPTY; do mount -t tmpfs -o mode=755 tmpfs "$place"; done
mkdir -p /var/lib /var/log /var/tmp /usr/local/bin /usr/local/sbin /run/lock /opt/stage /opt/source /opt/python /opt/libraries
chmod 1777 /tmp /var/tmp
ln -s /run /var/run
mount --move /mnt/1 /opt/stage
mount --move /mnt/2 /opt/source
mount --move /mnt/3 /opt/python
mount --move /mnt/4 /opt/libraries
mount --bind /mnt/etc /etc
rm -rf /etc/systemd
mkdir -p /etc/systemd/system
cp /opt/stage/units/* /etc/systemd/system/
cp /opt/stage/*.conf /etc/systemd/
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --make-rshared /
export SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/transient container=fx
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
""".replace("EMPTY", " ".join(_EMPTY))


def why_not() -> str:
    """Why there can be no systemd here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can run a systemd"
    for needed in (Path("/lib/systemd/systemd"), *(Path("/lib/systemd/system") / name for name in _OWN_UNITS)):
        if not needed.exists():
            return f"{needed} is not installed"
    if _cgroup() is None:
        return "no cgroup2 is mounted"
    tried = subprocess.run(["unshare", "-mpfuiC", "--mount-proc", "true"], capture_output=True, text=True, check=False, timeout=COMMAND_S)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else ""


class Machine:
    """One that has booted. With `with`; at the end every process of it is gone, and so are its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "systemd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._init: psutil.Process | None = None
        self._cgroup = (_cgroup() or Path()) / f"fx-systemd-{os.getpid()}"

    def __enter__(self) -> Self:
        units = self.directory / "units"
        units.mkdir(parents=True)
        for name in _TARGETS:
            (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
        with (units / "multi-user.target").open("a") as target:
            target.write(f"Requires={_NEEDED}\nAfter={_NEEDED}\n")
        for name in _OWN_UNITS:
            shutil.copy(Path("/lib/systemd/system") / name, units)
        # Where this Python keeps its library may be hidden from services (ProtectHome=).
        (self.directory / "system.conf").write_text("[Manager]\nDefaultEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n")
        (self.directory / "journald.conf").write_text("[Journal]\nReadKMsg=no\nStorage=volatile\n")
        self._cgroup.mkdir()
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _boot(self) -> None:
        enter = f'echo $$ >"{self._cgroup}/cgroup.procs"; exec unshare -mpfuiC --kill-child --mount-proc sh -c "$0" sh "$@"'
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-euc", enter, _BOOT, str(self.directory), str(ROOT), sys.base_prefix, sysconfig.get_path("purelib")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._has_booted, BOOT_S, "a systemd that runs")

    def _has_booted(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        children = psutil.Process(self._process.pid).children()
        if not children or children[0].name() != "systemd":
            return False
        self._init = children[0]
        return self.run("systemctl", "is-active", "multi-user.target", check=False).stdout.strip() == "active"

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # Its first process takes all others with it, and is waited for by `unshare`, which ends then.
            (self._init or psutil.Process(self._process.pid)).kill()
            self._process.wait(BOOT_S)
        deadline = time.monotonic() + BOOT_S
        (self._cgroup / "cgroup.kill").write_text("1")
        while self._cgroup.exists() and time.monotonic() < deadline:
            for path in sorted(self._cgroup.rglob("*"), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            time.sleep(0.02)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command on that machine, as its root, in the repository (/opt/source)."""
        assert self._init is not None
        enter = ["nsenter", "-t", str(self._init.pid), "-m", "-p", "-u", "-i", "-C", "--wdns=/opt/source"]
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": "/opt/python/lib"}
        ran = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=COMMAND_S, env=env, check=False)
        assert not check or ran.returncode == 0, f"{command}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}\n{self.journal()[-4000:]}"
        return ran

    def systemctl(self, *arguments: str) -> None:
        """Until it is done. Fails if it fails."""
        self.run("systemctl", *arguments)

    def shows(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", key, unit).stdout.strip()

    def journal(self, unit: str = "") -> str:
        """What was logged so far."""
        return self.run("journalctl", "--no-pager", "-o", "cat", *(("-u", unit) if unit else ()), check=False).stdout

    def processes(self, unit: str) -> list[psutil.Process]:
        """Those of a unit, as this machine numbers them: the launcher, the daemon, and those before it that drain."""
        listed = self._cgroup / "system.slice" / unit / "cgroup.procs"
        return [psutil.Process(int(line)) for line in listed.read_text().split()] if listed.exists() else []


def _cgroup() -> Path | None:
    """Where this process is in the tree of cgroup2."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = [line.split()[4] for line in lines if " - cgroup2 " in line]
    paths = [line.removeprefix("0::/") for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")]
    return Path(mounts[0]) / paths[0] if mounts and paths else None
