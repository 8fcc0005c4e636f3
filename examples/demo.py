"""A gateway, two relays and a small service in a temporary directory; traffic through the door; the tunnel cut on purpose.

`make demo` runs it. `KEEP=1 make demo` leaves everything up until Ctrl-C, to try by hand.
"""

import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from examples.cutter import Cutter

FILE_BYTES = 256 << 20
CUTS = 3
READY_S = 20.0
console = Console(highlight=False)


class Service(http.server.ThreadingHTTPServer):
    """The "hidden service": one file of random bytes."""

    daemon_threads = True

    def __init__(self, payload: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


class Daemon:
    """One of our daemons, from its ready line to its end."""

    def __init__(self, name: str, arguments: list[str], directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
        line: list[str] = []
        assert self.process.stdout is not None
        reader = threading.Thread(target=lambda: line.append(self.process.stdout.readline()), daemon=True)
        reader.start()
        reader.join(READY_S)
        if not line or not line[0]:
            self.stop()
            raise SystemExit(f"{name} did not get ready:\n{self.log.read_text()}")
        console.print(f"  [green]●[/] {line[0].strip()}", soft_wrap=True)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def free_port() -> int:
    """A port below the range of outgoing connections that nothing listens on."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def write_configs(directory: Path, target_port: int, cutter_port: int) -> tuple[int, int]:
    """`fxgateway init`, then the few edits an administrator makes. Returns the tunnel's and the door's port."""
    tunnel_port, door_port, admin_port = free_port(), free_port(), free_port()
    subprocess.run(
        [sys.executable, "-m", "fxgateway.cli", "init", "--dir", str(directory), "--public-url", f"wss://127.0.0.1:{cutter_port}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    config = directory / "gateway.toml"
    gateway_id = re.search(r'gateway_id\s*=\s*"([^"]+)"', config.read_text())
    config.write_text(
        f"""[tunnel]
listen = "127.0.0.1:{tunnel_port}"
public_url = "wss://127.0.0.1:{cutter_port}"
{f'gateway_id = "{gateway_id[1]}"' if gateway_id else ""}

[[door]]
listen = "127.0.0.1:{door_port}"
service = "files"

[admin]
listen = "127.0.0.1:{admin_port}"
"""
    )
    for node in ("node-a", "node-b"):
        home = directory / node
        home.mkdir(mode=0o700)
        shutil.copy(directory / "gateway.json", home / "gateway.json")
        (home / "relay.toml").write_text(
            f"""[relay]
id = "{node}"
state_dir = "state"

[[gateway]]
file = "gateway.json"

[[service]]
name = "files"
target = "127.0.0.1:{target_port}"
"""
        )
    return tunnel_port, door_port


def fetch(url: str, expected: str, cutter: Cutter | None) -> None:
    """Download, cutting the tunnel on the way, and compare the hash."""
    digest = hashlib.sha256()
    received, cuts = 0, 0
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress, urllib.request.urlopen(url, timeout=60) as answer:
        task = progress.add_task("downloading", total=FILE_BYTES)
        while block := answer.read(1 << 18):
            digest.update(block)
            received += len(block)
            progress.update(task, advance=len(block))
            if cutter is not None and cuts < CUTS and received > FILE_BYTES * (cuts + 1) // (CUTS + 1):
                cuts += 1
                ended = cutter.cut()
                progress.console.print(f"  [red]✂[/] cut {cuts}: RST on {ended} tunnel connections at byte {received:,}")
    if received != FILE_BYTES or digest.hexdigest() != expected:
        raise SystemExit(f"[red]wrong:[/] {received} bytes, sha256 {digest.hexdigest()}")
    console.print(f"  [green]✓[/] {received:,} bytes, sha256 as at the source")


def run(directory: Path, daemons: list[Daemon]) -> None:
    """The whole story."""
    started = time.monotonic()
    payload = os.urandom(FILE_BYTES)
    expected = hashlib.sha256(payload).hexdigest()
    service = Service(payload)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    cutter = Cutter()
    tunnel_port, door_port = write_configs(directory, service.server_address[1], cutter.port)
    cutter.start(tunnel_port)
    url = f"http://127.0.0.1:{door_port}/"

    console.print("\n[bold]1. A gateway, and two relays that dial out to it[/]")
    daemons.append(Daemon("fxgateway", ["fxgateway.cli", "run", "--config", str(directory / "gateway.toml")], directory))
    for node in ("node-a", "node-b"):
        daemons.append(Daemon(node, ["fxrelay.cli", "run", "--config", str(directory / node / "relay.toml")], directory))

    console.print("\n[bold]2. A client comes in by the door[/]")
    fetch(url, expected, None)

    console.print("\n[bold]3. The same, with every tunnel connection cut three times in mid-transfer[/]")
    fetch(url, expected, cutter)

    console.print("\n[bold]4. What the gateway says of it[/]")
    config = ["--config", str(directory / "gateway.toml")]
    answer = subprocess.run(
        [sys.executable, "-m", "fxgateway.cli", "relays", "--json", *config], check=True, capture_output=True, text=True
    ).stdout
    for relay in json.loads(answer)["relays"]:
        resumed = sum(link["resumed"] for link in relay["links"])
        console.print(f"  {relay['relay_id']}: {relay['state']}, {resumed} times resumed, service {', '.join(relay['services'])}")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Nothing was lost.\n")
    console.print(
        "By hand, while it is up (KEEP=1 make demo):\n"
        f"  curl -o /dev/null {url}\n"
        f"  {sys.executable} -m fxgateway.cli relays --config {directory}/gateway.toml\n"
        f"  {sys.executable} -m fxrelay.cli status --config {directory}/node-a/relay.toml",
        soft_wrap=True,
    )
    if os.environ.get("KEEP") == "1":
        console.print("\nUp until Ctrl-C.")
        signal.pause()


def main() -> None:
    """Run the demo and clean up, whatever happens."""
    directory = Path(tempfile.mkdtemp(prefix="fx-demo-"))
    daemons: list[Daemon] = []
    try:
        run(directory, daemons)
    except KeyboardInterrupt:
        console.print("\nstopping")
    finally:
        for daemon in reversed(daemons):
            daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
