"""Task: what a reservation adds to a login by HTTP, for `benchmarks.reservations`: the same login with and without, in turn."""

import http.client
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import processes
from benchmarks.processes import BenchmarkError

ROOT: Final = Path(__file__).resolve().parent.parent
SERVICES: Final = ("with", "without")
_RELAY: Final = """[relay]
id = "bench"
state_dir = "state"
[[gateway]]
file = "gateway.json"
[cluster]
lease_s = 1
{broker}
[[service]]
name = "without"
protocol = "http"
port = {port}
[[service]]
name = "with"
protocol = "http"
port = {port}
reservations = true
[service.login]
preset = "form"
success_status = [302]
success_cookie = "session"
"""


class Site:
    """A gateway, a relay, and an application with a login page on its node. `broker` None: on SQLite."""

    def __init__(self, folder: Path, broker: Path | None) -> None:
        self._folder = folder
        self.doors = {service: processes.free_port() for service in SERVICES}
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("FXGATEWAY__", "FXRELAY__"))}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
        tunnel, port = processes.free_port(), processes.free_port()
        init = [
            sys.executable,
            "-m",
            "fxgateway.cli",
            "init",
            "--dir",
            str(folder / "gateway"),
            "--public-url",
            f"wss://127.0.0.1:{tunnel}",
        ]
        subprocess.run(init, check=True, capture_output=True, env=environ, timeout=60)
        environ |= {"FXGATEWAY__TUNNEL__LISTEN": f"127.0.0.1:{tunnel}", "FXGATEWAY__ADMIN__LISTEN": f"127.0.0.1:{processes.free_port()}"}
        for number, (service, door) in enumerate(self.doors.items()):
            environ |= {f"FXGATEWAY__DOOR__{number}__LISTEN": f"127.0.0.1:{door}", f"FXGATEWAY__DOOR__{number}__SERVICE": service}
        relay = folder / "relay"
        relay.mkdir(mode=0o700)
        (relay / "relay.toml").write_text(_RELAY.format(port=port, broker=f'broker = "{broker}"' if broker is not None else ""))
        shutil.copy2(folder / "gateway" / "gateway.json", relay / "gateway.json")
        commands = {
            "site": ["examples.login_site", f"127.0.0.1:{port}", "bench"],
            "gateway": ["fxgateway.cli", "run", "--config", str(folder / "gateway" / "gateway.toml")],
            "relay": ["fxrelay.cli", "run", "--config", str(relay / "relay.toml")],
        }
        self._running = [
            processes.start([sys.executable, "-m", *command], folder / f"{name}.log", environ=environ) for name, command in commands.items()
        ]

    def close(self) -> None:
        """End everything."""
        processes.stop(reversed(self._running))

    def wait(self) -> None:
        """Until both services let somebody in: a store that is new gives nothing out for one lease."""
        ends = time.monotonic() + 30
        while True:
            try:
                for service in SERVICES:
                    self.login(service)
                return
            except (OSError, http.client.HTTPException, BenchmarkError) as exc:
                if time.monotonic() > ends:
                    logs = [processes.tail(self._folder / f"{name}.log") for name in ("gateway", "relay")]
                    raise BenchmarkError(f"no login: {exc}; {logs}") from exc
                time.sleep(0.2)

    def login(self, service: str) -> float:
        """Milliseconds of a login on a connection that stands; logs out again."""
        connection = http.client.HTTPConnection("127.0.0.1", self.doors[service], timeout=10)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            began = time.perf_counter()
            fields = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/login", "username=ann&password=secret", fields)
            answer = connection.getresponse()
            answer.read()
            took_ms = (time.perf_counter() - began) * 1e3
            if answer.status != 302:
                raise BenchmarkError(f"{service}: status {answer.status}")
            cookies = "; ".join(line.partition(";")[0] for line in answer.headers.get_all("Set-Cookie") or ())
            connection.request("GET", "/logout", headers={"Cookie": cookies})
            connection.getresponse().read()
            return took_ms
        finally:
            connection.close()


def http_logins(folder: Path, broker: Path | None, rounds: int) -> dict[str, float]:
    """Median milliseconds of a login with and without reservations."""
    site = Site(folder, broker)
    try:
        site.wait()
        seen: dict[str, list[float]] = {service: [] for service in SERVICES}
        for _ in range(rounds):
            for service in SERVICES:
                seen[service].append(site.login(service))
    finally:
        site.close()
    return {f"http_login_{service}_p50_ms": median(found) for service, found in seen.items()}
