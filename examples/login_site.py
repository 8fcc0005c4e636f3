"""An application with a login page, to try reservations of HTTP services with: any user, password `secret`.

`python -m examples.login_site 127.0.0.2:8080 node-2` runs it; docs/RESERVATIONS.md has the relay's part.
"""

import http.server
import secrets
import sys
from urllib.parse import parse_qs

FORM = '<form method="post" action="/login"><input name="username"><input name="password" type="password"><button>Log in</button></form>'


class Site(http.server.ThreadingHTTPServer):
    """Knows who is logged in by a cookie."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], name: str) -> None:
        self.name = name
        self.sessions: dict[str, str] = {}
        super().__init__(address, Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    """`/login`, `/logout`, and a page that says where and who one is."""

    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        user = self.server.sessions.get(self._session())
        page = f"{self.server.name}: {user} <a href=/logout>Log out</a>" if user else f"{self.server.name}: nobody {FORM}"
        if self.path == "/logout":
            self.server.sessions.pop(self._session(), None)
            self._answer(302, "", [("Location", "/"), ("Set-Cookie", "session=; Max-Age=0")])
        else:
            self._answer(200, page)

    def do_POST(self) -> None:
        said = parse_qs(self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 4_096)).decode("utf-8", "replace"))
        user = said.get("username", [""])[0]
        if self.path != "/login" or not user.isalnum() or said.get("password") != ["secret"]:
            self._answer(200, f"Not so. {FORM}")
            return
        session = secrets.token_urlsafe(16)
        self.server.sessions[session] = user
        self._answer(302, "", [("Location", "/"), ("Set-Cookie", f"session={session}; Path=/; HttpOnly")])

    def _session(self) -> str:
        pairs = (part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";"))
        return next((value for name, _, value in pairs if name == "session"), "")

    def _answer(self, status: int, page: str, fields: list[tuple[str, str]] | None = None) -> None:
        body = page.encode()
        self.send_response(status)
        for name, value in [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body))), *(fields or [])]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until Ctrl-C."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m examples.login_site ADDRESS:PORT NAME")
    host, _, port = sys.argv[1].rpartition(":")
    Site((host, int(port)), sys.argv[2]).serve_forever()


if __name__ == "__main__":
    main()
