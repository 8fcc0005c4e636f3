"""An application with logins on a node: a form with a session cookie, and a login of several requests that ends in a JWT."""

import http.client
import http.server
import json
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY = Ed25519PrivateKey.generate()


def public_pem() -> bytes:
    return KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def password_of(user: str) -> str:
    return f"pw-{user}"


class LoginNode:
    """The application on one node. `hold`: answers to successful logins wait for `go`; what was asked is in `asked`."""

    def __init__(self, address: str, port: int, name: str, lifetime_s: float = 3_600) -> None:
        self.name = name
        self.lifetime_s = lifetime_s
        self.sessions: dict[str, str] = {}
        self.stages: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.let_in: list[str] = []
        self.hold = False
        self.go = threading.Event()
        node = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Nothing: what matters is in `asked`."""

            def do_GET(self) -> None:
                node.serve(self, b"")

            def do_POST(self) -> None:
                node.serve(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A connection that was given up is no error here."""

        self._server = Server((address, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def serve(self, asked: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        path = asked.path.partition("?")[0]
        said = json.loads(body) if body.startswith(b"{") else dict(parse_qsl(body.decode()))
        user = said.get("username", "")
        self.asked.append((path, user))
        if path == "/login":
            if said.get("password") != password_of(user):
                self._answer(asked, 200, b"wrong, try again")
            else:
                session = self._let_in(user)
                self._answer(asked, 302, b"", {"Location": "/", "Set-Cookie": f"session={session}; HttpOnly"})
        elif path == "/v3/api/auth/ssh":
            self._answer(asked, 200, json.dumps(self._stage(said)).encode(), {"Content-Type": "application/json"})
        elif path in ("/logout", "/v3/api/auth/logout"):
            ended = self.sessions.pop(self._shown(asked), None)
            self._answer(asked, 200 if ended else 401, b"{}")
        elif path == "/whoami":
            who = self.sessions.get(self._shown(asked), "")
            self._answer(asked, 200 if who else 401, f"{self.name} {who}".encode())
        else:
            self._answer(asked, 200, self.name.encode())

    def _stage(self, said: dict) -> dict:
        if "authtoken" in said:
            user = self.stages.get(said["authtoken"], "")
        elif said.get("basic"):
            user = said["username"]
        else:
            token = secrets.token_urlsafe(12)
            self.stages[token] = said["username"]
            return {"result": {"stage": "password", "authtoken": token}}
        if not user or said.get("password") != password_of(user):
            return {"error": {"name": "Denied", "message": "wrong password"}}
        now = time.time()
        claims = {"sub": user, "iss": self.name, "iat": int(now), "exp": int(now + self.lifetime_s), "jti": secrets.token_hex(8)}
        if said.get("daemon"):
            claims["fastx/daemon"] = False
        return {"result": {"stage": "success", "token": self._let_in(user, jwt.encode(claims, KEY, algorithm="EdDSA"))}}

    def _let_in(self, user: str, token: str = "") -> str:
        token = token or secrets.token_urlsafe(12)
        if self.hold:
            assert self.go.wait(30)
        self.sessions[token] = user
        self.let_in.append(user)
        return token

    def _shown(self, asked: http.server.BaseHTTPRequestHandler) -> str:
        bearer = asked.headers.get("Authorization", "").removeprefix("Bearer ")
        cookies = dict(part.strip().partition("=")[::2] for part in asked.headers.get("Cookie", "").split(";"))
        return bearer or cookies.get("session", "")

    def _answer(self, asked: http.server.BaseHTTPRequestHandler, status: int, body: bytes, fields: dict | None = None) -> None:
        with suppress(OSError):
            asked.send_response(status)
            for name, value in {**(fields or {}), "Content-Length": str(len(body))}.items():
                asked.send_header(name, value)
            asked.end_headers()
            asked.wfile.write(body)


@dataclass
class Told:
    """An answer."""

    status: int
    fields: http.client.HTTPMessage
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json()["error"]["name"]


@dataclass
class Browser:
    """A client with an address and cookies of its own; each request is on a connection of its own."""

    port: int
    number: int
    user: str = ""
    token: str = ""
    cookies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.user = self.user or f"user{self.number}"

    def ask(self, method: str, path: str, body: str | dict | None = None, timeout_s: float = 30) -> Told:
        fields = {"Accept": "application/json"}
        if self.cookies:
            fields["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if self.token:
            fields["Authorization"] = f"Bearer {self.token}"
        if isinstance(body, dict):
            body = json.dumps(body)
        elif body is not None:
            fields["Content-Type"] = "application/x-www-form-urlencoded"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s, source_address=(f"127.0.1.{self.number}", 0))
        try:
            connection.request(method, path, body, fields)
            answer = connection.getresponse()
            told = Told(answer.status, answer.headers, answer.read())
        finally:
            connection.close()
        for line in told.fields.get_all("Set-Cookie") or ():
            name, _, value = line.partition(";")[0].partition("=")
            if value:
                self.cookies[name] = value
            else:
                self.cookies.pop(name, None)
        return told

    def log_in_by_form(self, password: str = "", timeout_s: float = 30) -> Told:
        return self.ask("POST", "/login", f"username={self.user}&password={password or password_of(self.user)}", timeout_s)

    def stage(self, **said: object) -> Told:
        return self.ask("POST", "/v3/api/auth/ssh", dict(said))

    def log_in(self, **extra: object) -> Told:
        """By API, in two requests."""
        first = self.stage(username=self.user, **extra)
        if first.status != 200:
            return first
        return self.finish(first.json()["result"]["authtoken"], **extra)

    def finish(self, authtoken: str, **extra: object) -> Told:
        told = self.stage(authtoken=authtoken, password=password_of(self.user), **extra)
        if told.status == 200 and "result" in told.json():
            self.token = told.json()["result"]["token"]
        return told

    def where(self) -> str:
        """The node that knows this user; empty if none does."""
        told = self.ask("GET", "/whoami")
        name, _, user = told.body.decode().partition(" ")
        return name if told.status == 200 and user == self.user else ""
