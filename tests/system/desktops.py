"""Programs with a page to look at: noVNC before TigerVNC's Xvnc, Jupyter, shellinabox and xpra, each on loopback, as Debian has them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.servers import need, program, running

NOVNC = Path("/usr/share/novnc")


@dataclass(frozen=True, slots=True)
class Desktop:
    """An X screen with one xterm; `port` is websockify's, which serves noVNC as well."""

    port: int
    home: Path

    @property
    def visits(self) -> int:
        """How many VNC clients there have been."""
        return (self.home / "xvnc.log").read_text().count("accepted:")


@contextmanager
def desktop(home: Path) -> Iterator[Desktop]:
    """An xterm with a shell that works in `home`, shown by noVNC."""
    need("Xvnc", "xterm", "websockify")
    if not (NOVNC / "vnc.html").exists():
        pytest.skip("not installed: novnc")
    home.mkdir(parents=True, exist_ok=True)
    rfb_port, web_port = free_port(), free_port()
    display = f":{rfb_port}"  # unix sockets only, so any number will do
    xvnc = [program("Xvnc"), display, "-rfbport", str(rfb_port), "-localhost", "-nolisten", "tcp", "-SecurityTypes", "None"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C", "DISPLAY": display, "PS1": "$ "}
    with running([*xvnc, "-geometry", "640x480", "-depth", "24", "-AlwaysShared"], rfb_port, home / "xvnc.log"):
        with (home / "xterm.log").open("ab") as log:
            xterm = subprocess.Popen(
                [program("xterm"), "-geometry", "100x30+0+0", "-e", "/bin/sh"], cwd=home, env=environment, stdout=log, stderr=log
            )
        try:
            websockify = [program("websockify"), "--web", str(NOVNC), f"127.0.0.1:{web_port}", f"127.0.0.1:{rfb_port}"]
            with running(websockify, web_port, home / "websockify.log"):
                yield Desktop(web_port, home)
        finally:
            xterm.terminate()
            xterm.wait(10)
