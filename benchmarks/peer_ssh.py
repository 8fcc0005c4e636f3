"""Task: OpenSSH's reverse tunnel, `ssh -R`, against an sshd of its own on 127.0.0.1."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks import processes
from benchmarks.peers import STREAMS, Interpose, Running, nothing_between
from benchmarks.processes import BenchmarkError

_SSHD: Final = """\
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding yes
MaxStartups 1000
MaxSessions 1000
UseDNS no
PrintMotd no
PrintLastLog no
LogLevel ERROR
"""
_PRIVSEP: Final = Path("/run/sshd")


class Ssh:
    """One ssh process that offers the service to one sshd, with the default cipher.

    With a tty the connection counts as interactive and has TCP_NODELAY; with plain `-N` it has not, and small writes wait for
    each other (Nagle). Both are measured: the tty is the fair one, plain `-N` the usual one.
    """

    def __init__(
        self, name: str, label: str, options: tuple[str, ...], command: tuple[str, ...], measures: frozenset[str] = STREAMS
    ) -> None:
        self.name = name
        self.label = label
        self.measures = measures
        self._options = options
        self._command = command
        self._folder: Path | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def why_not(self) -> str | None:
        """Needs ssh, sshd and ssh-keygen."""
        if not (self._sshd() and shutil.which("ssh") and shutil.which("ssh-keygen")):
            return "no sshd or ssh: apt-get install openssh-server openssh-client"
        if not _PRIVSEP.is_dir() and os.geteuid() == 0:
            _PRIVSEP.mkdir(mode=0o755, parents=True)  # what the package's service does at boot; sshd as root insists on it
        return None

    def version(self) -> str:
        """As `ssh -V` says it."""
        return subprocess.run(["ssh", "-V"], capture_output=True, text=True, timeout=10, check=False).stderr.strip()

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """Start sshd (the gateway's part), then ssh -R (the relay's part), as the caller."""
        self._folder = folder = Path(tempfile.mkdtemp(prefix="fxbench-ssh-"))
        door, tunnel = processes.free_port(), processes.free_port()
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True, timeout=20)
        config = folder / "sshd_config"
        config.write_text(_SSHD.format(port=tunnel, folder=folder))
        server = processes.start([self._sshd() or "sshd", "-D", "-e", "-f", str(config)], folder / "sshd.log")
        self._running.append(server)
        self._wait_for_banner(tunnel)
        settings = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", "ExitOnForwardFailure=yes", "IdentitiesOnly=yes"]
        client = processes.start(
            [
                *("ssh", "-F", "none", "-p", str(interpose(tunnel)), "-i", str(folder / "user_key")),
                *(word for setting in settings for word in ("-o", setting)),
                *(*self._options, "-R", f"127.0.0.1:{door}:127.0.0.1:{service_port}", f"{getpass.getuser()}@127.0.0.1", *self._command),
            ],
            folder / "ssh.log",
        )
        self._running.append(client)
        processes.wait_for_echo(door, self._running, [folder / "ssh.log", folder / "sshd.log"])
        return Running(door, {"sshd": server.pid, "ssh": client.pid})

    def stop(self) -> None:
        """End ssh and sshd with its session processes."""
        processes.stop(reversed(self._running))
        self._running = []
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _sshd(self) -> str | None:
        return shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")  # an absolute path: sshd starts itself again

    def _wait_for_banner(self, port: int) -> None:
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
                    if probe.recv(8).startswith(b"SSH-"):
                        return
            except OSError:
                time.sleep(0.02)
        assert self._folder is not None
        raise BenchmarkError("sshd does not answer:\n" + processes.tail(self._folder / "sshd.log"))


def with_tty() -> Ssh:
    """`ssh -tt -R`."""
    return Ssh("ssh-tty", "ssh -tt -R", ("-tt",), ("cat",))


def plain() -> Ssh:
    """`ssh -N -R`."""
    return Ssh("ssh", "ssh -N -R", ("-N",), (), STREAMS - {"rtt"})


def with_aes128() -> Ssh:
    """`ssh -tt -R` with the cipher that costs it least."""
    return Ssh("ssh-aes128", "ssh -tt -R, aes128-gcm", ("-tt", "-c", "aes128-gcm@openssh.com"), ("cat",), frozenset({"bulk"}))
