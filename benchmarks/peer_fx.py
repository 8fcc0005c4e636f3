"""Task: FX Gateway itself, set up by its own commands in a temporary folder, as an administrator would."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks import processes
from benchmarks.peers import STREAMS, Interpose, Running, nothing_between
from benchmarks.processes import BenchmarkError

ROOT: Final = Path(__file__).resolve().parent.parent

RESUME_OFF: Final[Mapping[str, str]] = {"FXGATEWAY__RESUME__ENABLED": "false", "FXRELAY__RESUME__ENABLED": "false"}

_RELAY: Final = """\
[relay]
id = "bench"
state_dir = "state"

[[gateway]]
file = "gateway.json"

[[service]]
name = "bench"
protocol = "tcp"
target = "127.0.0.1:{service_port}"
"""


class FxGateway:
    """One fxgateway with one door and one fxrelay with one service, with their defaults: loopback is exempt from limits by source."""

    def __init__(self, name: str, label: str, environ: Mapping[str, str], measures: frozenset[str] = STREAMS) -> None:
        self.name = name
        self.label = label
        self.measures = measures
        self._environ = environ
        self._folder: Path | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def why_not(self) -> str | None:
        """Needs both daemons beside this folder or installed."""
        for module in ("fxgateway.cli", "fxrelay.cli"):
            if importlib.util.find_spec(module) is None:
                return f"no module {module}"
        return None

    def version(self) -> str:
        """The version of the wire package both share, and the interpreter: whose build it is makes a fifth of a connection's CPU."""
        import fxtunnel

        whose = "the distribution's" if sys.base_prefix == "/usr" else "not the distribution's"
        return f"fx-gateway {getattr(fxtunnel, '__version__', 'unknown')}, Python {sys.version.split()[0]} ({whose})"

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """`fxgateway init`, both daemons, and the relay's enrolment with gateway.json."""
        self._folder = folder = Path(tempfile.mkdtemp(prefix="fxbench-fx-"))
        door, tunnel = processes.free_port(), processes.free_port()
        environ = {
            **_environ(),
            "FXGATEWAY__TUNNEL__LISTEN": f"127.0.0.1:{tunnel}",
            "FXGATEWAY__DOOR__0__LISTEN": f"127.0.0.1:{door}",
            "FXGATEWAY__DOOR__0__SERVICE": "bench",
            "FXGATEWAY__ADMIN__LISTEN": f"127.0.0.1:{processes.free_port()}",
            **self._environ,
        }
        public_url = f"wss://127.0.0.1:{interpose(tunnel)}"
        init = [sys.executable, "-m", "fxgateway.cli", "init", "--dir", str(folder / "gateway"), "--public-url", public_url]
        done = subprocess.run(init, capture_output=True, text=True, env=_environ(), timeout=60, check=False)
        if done.returncode:
            raise BenchmarkError(f"fxgateway init: {done.stderr.strip()}")
        relay = folder / "relay"
        relay.mkdir(mode=0o700)
        (relay / "relay.toml").write_text(_RELAY.format(service_port=service_port))
        shutil.copy2(folder / "gateway" / "gateway.json", relay / "gateway.json")
        pids = {
            "gateway": self._daemon("fxgateway", folder / "gateway" / "gateway.toml", environ),
            "relay": self._daemon("fxrelay", relay / "relay.toml", environ),
        }
        self.wait(door, [folder / "fxgateway.log", folder / "fxrelay.log"])
        return Running(door, pids)

    def wait(self, door: int, logs: Sequence[Path]) -> None:
        """Until the service answers through the tunnel."""
        processes.wait_for_echo(door, self._running, logs)

    def stop(self) -> None:
        """End both daemons."""
        processes.stop(reversed(self._running))
        self._running = []
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _daemon(self, module: str, config: Path, environ: Mapping[str, str]) -> int:
        assert self._folder is not None
        command = [sys.executable, "-m", f"{module}.cli", "run", "--config", str(config)]
        process = processes.start(command, self._folder / f"{module}.log", environ=environ)
        self._running.append(process)
        return process.pid


def _environ() -> dict[str, str]:
    """The caller's environment with this checkout's packages first, and without settings of a gateway or relay of the caller's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FXGATEWAY__", "FXRELAY__"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))}


def usual() -> FxGateway:
    """With its defaults."""
    return FxGateway("fx", "FX Gateway", {}, STREAMS | {"crowd"})


def without_resumption() -> FxGateway:
    """With resumption off: what resumption costs."""
    return FxGateway("fx-noresume", "FX Gateway, resumption off", RESUME_OFF, frozenset({"bulk", "bulk16"}))


def with_aes128() -> FxGateway:
    """With the cheapest cipher that TLS 1.3 has, as an administrator chooses it: by OpenSSL's own configuration."""
    environ = {"OPENSSL_CONF": str(ROOT / "deploy" / "openssl-aes128.cnf")}
    return FxGateway("fx-aes128", "FX Gateway, aes128-gcm", environ, frozenset({"bulk", "bulk16"}))


def with_workers() -> FxGateway:
    """With two workers and one relay, so that about half of the clients come in at the worker that has not got it, and are passed on."""
    return FxGateway("workers", "FX Gateway, 2 workers", {"FXGATEWAY__TUNNEL__WORKERS": "2"}, frozenset({"bulk", "bulk16", "conn"}))


def with_two_links() -> FxGateway:
    """With two data links, so that a stream opened beside bulk does not share its link."""
    return FxGateway("links", "FX Gateway, 2 data links", {"FXRELAY__RELAY__LINKS": "2"}, frozenset({"bulk", "bulk16", "conn", "echo"}))
