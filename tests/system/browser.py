"""Headless Chromium, driven by WebDriver (W3C): what a user sees in a page, and what a page gets of his keys."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.ports import free_port
from tests.system.servers import need, program, running
from tests.system.stack import wait_until

COMMAND_S = 60.0
SHIFT = "\ue008"
ENTER = "\ue007"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=900,700", "--no-proxy-server"),
    "--host-resolver-rules=MAP *.test 127.0.0.1",
)


class PageError(Exception):
    """The driver's answer to a command that failed; `kind` is WebDriver's word for it."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(f"{kind}: {text.splitlines()[0] if text else ''}")


@dataclass(frozen=True, slots=True)
class Browser:
    """One window of one profile."""

    port: int
    session: str

    def open(self, url: str) -> None:
        """Load a page. Raises `PageError` if it cannot be had, or its certificate is none the browser was told of."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """The value that a function with this body returns in the page; promises are waited for."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait(self, script: str, timeout_s: float = 30.0) -> None:
        """Until the expression is true in the page."""
        wait_until(lambda: self.run(f"return !!({script});"), timeout_s, script)

    def click_on(self, element: str) -> None:
        """Click into the middle of what this expression is in the page."""
        part = f"const part = {element}; part.scrollIntoView({{block: 'center'}});"
        middle = "const box = part.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2];"
        x, y = self.run(part + middle)
        self.click(int(x), int(y))

    def click(self, x: int, y: int) -> None:
        """Press and release the mouse there, in CSS pixels of the window."""
        steps = [
            {"type": "pointerMove", "duration": 0, "x": x, "y": y},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": steps}]})

    def type(self, text: str) -> None:
        """One key after the other, as a keyboard would; \\n is Enter."""
        keys = text.replace("\n", ENTER)
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def press(self, *keys: str) -> None:
        """These keys at once."""
        steps = [{"type": "keyDown", "value": key} for key in keys] + [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def _call(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        return _call(self.port, method, f"/session/{self.session}{path}", body)


def _call(port: int, method: str, path: str, body: dict[str, object] | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=COMMAND_S)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        value = json.loads(connection.getresponse().read())["value"]
    if isinstance(value, dict) and "error" in value:
        raise PageError(value["error"], value.get("message", ""))
    return value


def key_digest(certificate: Path) -> str:
    """How Chromium is told to take a certificate: by its public key."""
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    return base64.b64encode(hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()).decode()


@contextmanager
def chromium(certificates: Sequence[Path] = ()) -> Iterator[Browser]:
    """A browser with a profile of its own that believes these certificates and the public authorities. Names in .test are this machine."""
    need("chromium", "chromedriver")
    home = Path(tempfile.mkdtemp(prefix="fx-browser-"))
    flags = [*_FLAGS, f"--user-data-dir={home}/profile"]
    if certificates:
        flags.append("--ignore-certificate-errors-spki-list=" + ",".join(map(key_digest, certificates)))
    port = free_port()
    arguments = [program("chromedriver"), f"--port={port}", "--allowed-ips=127.0.0.1"]
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home)}
    try:
        with running(arguments, port, home / "driver.log", environment):
            wanted = {"browserName": "chrome", "goog:chromeOptions": {"binary": program("chromium"), "args": flags}}
            session = _call(port, "POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            try:
                yield Browser(port, session)
            finally:
                with contextlib.suppress(OSError, PageError):
                    _call(port, "DELETE", f"/session/{session}")
    finally:
        shutil.rmtree(home, ignore_errors=True)
