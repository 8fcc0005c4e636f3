"""Programs with a page to look at: noVNC before TigerVNC's Xvnc, Jupyter, shellinabox and xpra, each on loopback, as Debian has them."""

import json
import os
import secrets
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
    xvnc = [
        program("Xvnc"),
        display,
        "-rfbport",
        str(rfb_port),
        "-localhost",
        "-nolisten",
        "tcp",
        "-SecurityTypes",
        "None",
        "-desktop",
        "node-a",
    ]
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


@dataclass(frozen=True, slots=True)
class Jupyter:
    """A Jupyter server; its pages begin with `base`."""

    port: int
    home: Path
    base: str
    token: str
    is_lab: bool


@contextmanager
def jupyter(home: Path, base: str) -> Iterator[Jupyter]:
    """Debian's notebook, or the JupyterLab that FX_JUPYTERLAB names. Its only document is new.ipynb."""
    lab = os.environ.get("FX_JUPYTERLAB")
    if not lab:
        need("jupyter-notebook")
    port, token = free_port(), secrets.token_hex(16)
    home.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    cell = {"cell_type": "code", "execution_count": None, "id": "one", "metadata": {}, "outputs": [], "source": []}
    (home / "new.ipynb").write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    application = "ServerApp" if lab else "NotebookApp"
    arguments = [
        *(lab or program("jupyter-notebook"), "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
        *(f"--{application}.{key}={value}" for key, value in (("base_url", base), ("allow_remote_access", "True"))),
        *(f"--{application}.port_retries=0", f"--{application}.terminals_enabled=False"),
    ]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "JUPYTER_PLATFORM_DIRS": "1", "JUPYTER_TOKEN": token}
    with running(arguments, port, home / "jupyter.log", environment, home):
        yield Jupyter(port, home, base, token, bool(lab))


@contextmanager
def shellinabox(home: Path) -> Iterator[int]:
    """A shell in a page, by long polls; works in `home`. Its port."""
    need("shellinaboxd")
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    # As root it becomes somebody else for its pages, and whom the service names for the shell.
    shell = f"/:{os.getuid()}:{os.getgid()}:{home}:/bin/sh"
    arguments = [program("shellinaboxd"), "-t", "--disable-ssl-menu", "-p", str(port), "--localhost-only", "-s", shell]
    with running(arguments, port, home / "shellinabox.log"):
        yield port


@contextmanager
def xpra(home: Path) -> Iterator[int]:
    """An xterm shown by xpra, with its HTML5 client; its port speaks HTTP, WebSocket and a protocol of its own."""
    need("xpra", "xterm")
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "XPRA_ALLOW_ROOT": "1", "XDG_RUNTIME_DIR": str(home)}
    options = ("html=on", "daemon=no", "mdns=no", "pulseaudio=no", "systemd-run=no", "notifications=no", "dbus-launch=", "webcam=no")
    arguments = [program("xpra"), "start", f":{port}", f"--bind-tcp=127.0.0.1:{port}", "--start=xterm -e /bin/sh"]
    with running([*arguments, *(f"--{option}" for option in options)], port, home / "xpra.log", environment, home):
        yield port
