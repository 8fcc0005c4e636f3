"""Real daemons on loopback: a gateway, relays, and what stands between them, each started and stopped by the test."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from examples.cutter import Cutter
from tests.ports import free_port
from tests.system import forks

READY_S = 90.0
STOP_S = 60.0
"""On a busy machine; both are a second or two on one that is not."""
SLOWNESS_SAMPLE_S = 0.2


def wait_until(condition, timeout_s: float = 20.0, what: str = "the condition") -> None:
    """Poll `condition` until it holds. `timeout_s` is for a machine that does nothing else; see `slowness`."""
    began, limit_s = time.monotonic(), timeout_s
    while not condition():
        if time.monotonic() - began > limit_s:
            limit_s = timeout_s * slowness()
            assert time.monotonic() - began < limit_s, f"{what} did not come true in {limit_s:.1f} s"
        time.sleep(0.02)


def slowness() -> float:
    """How many times longer than alone on the machine a program takes, at least 1: for limits that promise something to users.

    Now, or in the last minute by the kernel's own count of those who want to run: what is judged afterwards happened in a worse moment.
    """
    began, cpu_s = time.monotonic(), time.thread_time()
    while time.thread_time() - cpu_s < SLOWNESS_SAMPLE_S:
        hashlib.sha256(bytes(4_096)).digest()
    return max(1.0, (time.monotonic() - began) / SLOWNESS_SAMPLE_S, os.getloadavg()[0] / (os.cpu_count() or 1))


class Daemon:
    """One of our daemons. It prints one line when it is ready."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.log = log
        environ = {**os.environ, **(env or {})}
        with log.open("ab") as stderr:
            if prefix or pass_fds or not forks.suits(arguments, env):
                self.process = subprocess.Popen(
                    [*prefix, sys.executable, "-m", *arguments],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=environ,
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
            else:
                self.process = forks.start(arguments, environ, stderr.fileno())
        self.ready_line = ""

    def wait_ready(self) -> Self:
        """Until it says that it is."""
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(self.process.stdout.readline()), daemon=True)
        reader.start()
        reader.join(READY_S)
        self.ready_line = lines[0].strip() if lines else ""
        if not self.ready_line:
            self.kill()
            raise AssertionError(f"did not get ready (exit {self.process.poll()}):\n{self.log.read_text()[-4000:]}")
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running {STOP_S} s after SIGTERM:\n{self.log.read_text()[-4000:]}") from None
        finally:
            self.process.stdout.close()

    def kill(self) -> None:
        """SIGKILL. May be repeated."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Until it ends by itself; the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.log.read_text()[-4000:]}") from None


@dataclass
class Stack:
    """A gateway and its relays. The relays reach the gateway through `cutter`, so the tunnel can be cut."""

    directory: Path
    doors: dict[str, int]
    gateway_extra: str = ""
    cutter: Cutter = field(default_factory=Cutter)
    tunnel_port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)
    gateway: Daemon | None = None
    relays: dict[str, Daemon] = field(default_factory=dict)
    daemons: list[Daemon] = field(default_factory=list)
    relay_prefix: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.cutter.start(self.tunnel_port)
        cli(["fxgateway.cli", "init", "--dir", str(self.directory), "--public-url", f"wss://127.0.0.1:{self.cutter.port}"])
        self.write_gateway_config()

    @property
    def gateway_config(self) -> Path:
        return self.directory / "gateway.toml"

    def write_gateway_config(self) -> None:
        doors = "".join(f'[[door]]\nlisten = "127.0.0.1:{port}"\nservice = "{service}"\n' for service, port in self.doors.items())
        id_line = next(line for line in self.gateway_config.read_text().splitlines() if line.startswith("gateway_id"))
        self.gateway_config.write_text(
            f'[tunnel]\nlisten = "127.0.0.1:{self.tunnel_port}"\npublic_url = "wss://127.0.0.1:{self.cutter.port}"\n{id_line}\n'
            f'{doors}[admin]\nlisten = "127.0.0.1:{self.admin_port}"\n{self.gateway_extra}\n'
        )

    def start_gateway(self, env: dict[str, str] | None = None, prefix: tuple[str, ...] = (), pass_fds: tuple[int, ...] = ()) -> Daemon:
        return self.launch_gateway(env, prefix, pass_fds).wait_ready()

    def launch_gateway(self, env: dict[str, str] | None = None, prefix: tuple[str, ...] = (), pass_fds: tuple[int, ...] = ()) -> Daemon:
        """For one that is not ready by itself."""
        arguments = ["fxgateway.cli", "run", "--config", str(self.gateway_config)]
        self.gateway = Daemon(arguments, self.directory / "gateway.log", env, prefix, pass_fds)
        self.daemons.append(self.gateway)
        return self.gateway

    def relay_config(self, name: str) -> Path:
        return self.directory / name / "relay.toml"

    def write_relay_config(self, name: str, services: dict[str, str], extra: str = "") -> Path:
        home = self.directory / name
        if not home.exists():
            home.mkdir(mode=0o700)
            shutil.copy(self.directory / "gateway.json", home / "gateway.json")
        parts = "".join(f'[[service]]\nname = "{service}"\nprotocol = "tcp"\ntarget = "{target}"\n' for service, target in services.items())
        config = self.relay_config(name)
        config.write_text(f'[relay]\nid = "{name}"\nstate_dir = "state"\n[[gateway]]\nfile = "gateway.json"\n{parts}{extra}\n')
        return config

    def start_relay(self, name: str, services: dict[str, str] | None = None, extra: str = "", env: dict[str, str] | None = None) -> Daemon:
        """Returns when its tunnel is up."""
        if services is not None:
            self.write_relay_config(name, services, extra)
        return self.launch_relay(name, env).wait_ready()

    def launch_relay(self, name: str, env: dict[str, str] | None = None) -> Daemon:
        """For a relay that does not get as far, or not soon."""
        arguments = ["fxrelay.cli", "run", "--config", str(self.relay_config(name))]
        self.relays[name] = Daemon(arguments, self.directory / f"{name}.log", env, self.relay_prefix)
        self.daemons.append(self.relays[name])
        return self.relays[name]

    def launch_twin(self, name: str, config: Path) -> Daemon:
        """Another process of a relay, with another configuration."""
        twin = Daemon(["fxrelay.cli", "run", "--config", str(config)], self.directory / f"{name}-twin.log")
        self.daemons.append(twin)
        return twin

    def gateway_cli(self, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`fxgateway COMMAND …` with this stack's configuration."""
        return cli(["fxgateway.cli", command, "--config", str(self.gateway_config), *arguments], check)

    def relay_cli(self, name: str, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`fxrelay COMMAND …` with this relay's configuration."""
        return cli(["fxrelay.cli", command, "--config", str(self.relay_config(name)), *arguments], check)

    def status(self) -> dict:
        """What `fxgateway relays --json` says."""
        return json.loads(self.gateway_cli("relays", "--json").stdout)

    def relay_page(self, name: str, path: str) -> str:
        """What this relay's status socket serves there; much quicker than `fxrelay status --json`, which tells what is at /status."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(READY_S)
            sock.connect(str(self.directory / name / "state" / "status.sock"))
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n".encode())
            with sock.makefile("rb") as answer:
                return answer.read().decode().partition("\r\n\r\n")[2]

    def relay_status(self, name: str) -> dict:
        """What the relay says of itself."""
        return json.loads(self.relay_page(name, "/status"))

    def believed(self, relay: str, node: str) -> dict:
        """What this relay believes of a node of its cluster; empty if it has not heard of it."""
        page = self.relay_page(relay, f"/nodes/{node}")
        return json.loads(page) if page.startswith("{") else {}

    def page(self, path: str) -> str:
        """What the gateway's admin address serves there; empty if it serves nothing."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=20) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    def live_relays(self) -> dict[str, dict]:
        """The relays as the gateway sees them now, by id; much quicker than `status`."""
        return {relay["relay_id"]: relay for relay in json.loads(self.page("/relays") or '{"relays": []}')["relays"]}

    def wait_for_relays(self, *names: str, timeout_s: float = 20.0) -> None:
        """Until each has a link that is up."""

        def are_up() -> bool:
            relays = self.live_relays()
            return all(name in relays and relays[name]["state"] == "up" for name in names)

        wait_until(are_up, timeout_s, f"relays {names} up")

    def logs(self) -> str:
        """Everything the daemons have written to standard error."""
        return "".join(log.read_text() for log in sorted(self.directory.glob("*.log")))

    def stop(self) -> None:
        """Everything, by its pid."""
        for daemon in self.daemons:
            daemon.kill()
        self.cutter.close()


def cli(arguments: list[str], check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of our commands."""
    environ = {**os.environ, **(env or {})}
    if forks.suits(arguments, env):
        result = forks.run(arguments, environ, timeout_s=120)
    else:
        result = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, env=environ, check=False)
    assert not check or result.returncode == 0, f"{arguments}: exit {result.returncode}\n{result.stdout}{result.stderr}"
    return result
