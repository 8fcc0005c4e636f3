"""sshd, nginx and redis-server as they come with Debian, each from a configuration of the test's own, as whoever runs the test."""

import contextlib
import hashlib
import os
import pwd
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.stack import wait_until

START_S = 60.0


def need(*programs: str) -> None:
    """Skip the test where one of these is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def program(name: str) -> str:
    """Where it is; daemons are often not on a user's PATH."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None
    return found


@contextmanager
def running(
    arguments: Sequence[str], port: int, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the foreground, from the moment it listens on `port`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True, env=env, cwd=cwd
        )
    try:

        def listens() -> bool:
            assert process.poll() is None, f"{arguments[0]} ended:\n{log.read_text()[-2000:]}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        wait_until(listens, START_S, f"{arguments[0]} listening")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Ssh:
    """An sshd, and how to reach it: as the user who runs the test, with a key of the test's own."""

    home: Path
    port: int

    def options(self, port: int) -> list[str]:
        """For ssh and scp, without the host. `port` is a door's, or sshd's own."""
        return [
            *("-F", "none", "-i", str(self.home / "user_key"), "-o", f"Port={port}", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
            *("-o", f"UserKnownHostsFile={self.home / 'known_hosts'}", "-o", "HostKeyAlias=test", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=30", "-o", "KexAlgorithms=curve25519-sha256"),
        ]

    @property
    def login(self) -> str:
        """user@host."""
        return f"{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1"


@contextmanager
def ssh_server(home: Path) -> Iterator[Ssh]:
    """An sshd on loopback."""
    need("sshd", "ssh", "scp", "ssh-keygen")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    home.mkdir(mode=0o700)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True)
    (home / "known_hosts").write_text("test " + (home / "host_key.pub").read_text())
    shutil.copy(home / "user_key.pub", home / "authorized_keys")
    port = free_port()
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {home}/host_key\nPidFile none\nAuthorizedKeysFile {home}/authorized_keys\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "MaxStartups 500:30:1000\nMaxSessions 500\nUseDNS no\nPrintMotd no\nPrintLastLog no\n"
        "Subsystem sftp internal-sftp\nLoginGraceTime 120\n"
    )
    with running([program("sshd"), "-D", "-e", "-f", str(home / "sshd_config")], port, home / "sshd.log"):
        yield Ssh(home, port)


@contextmanager
def nginx_server(home: Path, extra: str = "") -> Iterator[tuple[int, Path]]:
    """An nginx that serves a directory; its port and that directory. `extra` goes into its `server`."""
    need("nginx")
    files = home / "files"
    files.mkdir(parents=True)
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    temporary = "".join(f"{kind}_temp_path {home}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (home / "nginx.conf").write_text(
        f"{user}\ndaemon off;\nworker_processes 1;\npid {home}/nginx.pid;\nerror_log {home}/error.log;\n"
        f"events {{ worker_connections 1024; }}\n"
        f"http {{\naccess_log off;\nsendfile on;\nkeepalive_requests 100000;\n{temporary}"
        f"server {{ listen 127.0.0.1:{port}; root {files}; {extra} }}\n}}\n"
    )
    arguments = [program("nginx"), "-p", str(home), "-c", str(home / "nginx.conf"), "-e", str(home / "error.log")]
    with running(arguments, port, home / "nginx.log"):
        yield port, files


@contextmanager
def redis_server(home: Path) -> Iterator[int]:
    """A redis-server that writes nothing to disk; its port."""
    need("redis-server")
    home.mkdir(parents=True)
    port = free_port()
    arguments = [
        program("redis-server"),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(home),
    ]
    with running(arguments, port, home / "redis.log"):
        yield port


def random_file(path: Path, size_bytes: int) -> str:
    """Write random bytes; returns their SHA-256. The block repeats with a number in it, so that no two are alike."""
    block = bytearray(random.Random(str(path)).randbytes(1 << 20))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for number in range(size_bytes >> 20):
            block[:8] = number.to_bytes(8, "big")
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_for_size(path: Path, size_bytes: int, process: subprocess.Popen, timeout_s: float) -> None:
    """Until a file that `process` writes has grown to that."""
    deadline = time.monotonic() + timeout_s
    while not path.exists() or path.stat().st_size < size_bytes:
        assert process.poll() is None, f"ended with {process.returncode} before {path.name} had {size_bytes} bytes"
        assert time.monotonic() < deadline
        time.sleep(0.02)
