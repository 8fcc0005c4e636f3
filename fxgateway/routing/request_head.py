"""Pure: the head of a connection's first HTTP request, as far as routing depends on it. Reading the rest is the relay's business."""

import re
from dataclasses import dataclass
from typing import Final

import h11

from fxgateway.routing.hosts import normal_host

MAX_HEAD_BYTES: Final = 8_192
MAX_HEADERS: Final = 64
"""As relays have them for requests (fxrelay/web/heads.py): what they would refuse need not travel there."""
_HOST: Final = re.compile(r"[a-z0-9._-]{0,253}|\[[0-9a-f:.]{2,45}\]")
END_OF_HEAD: Final = b"\r\n\r\n"
_PREFACE: Final = b"PRI * HTTP/2.0\r\n"


@dataclass(frozen=True, slots=True)
class RequestHead:
    """`raw` is the head as it came, its empty line included. `ticket` is a bearer token (RFC 6750, 2.1)."""

    raw: bytes
    host: str
    path: str
    connection: tuple[str, ...]
    accept: bytes
    upgrade: str = ""
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class BadHead:
    """Not a request that could be routed; `status` is what to answer."""

    status: int
    reason: str


def read_request_head(data: bytes) -> RequestHead | BadHead | None:
    """The head at the beginning of `data`; None if it is incomplete. Strict: whatever two parsers could read differently is refused."""
    end = data.find(END_OF_HEAD, 0, MAX_HEAD_BYTES)
    if end < 0:
        if data.startswith(_PREFACE):
            return BadHead(505, "HTTP/2 without TLS")
        if len(data) >= MAX_HEAD_BYTES:
            return BadHead(431, "the head of the request is too large")
        return None
    raw = data[: end + len(END_OF_HEAD)]
    if raw.count(b"\n") != raw.count(b"\r\n") or raw.count(b"\r") != raw.count(b"\r\n"):
        return BadHead(400, "a line of the head does not end in CR LF")  # RFC 9112, 2.2: parsers disagree about it
    if b"\n " in raw or b"\n\t" in raw:
        return BadHead(400, "a folded header")  # RFC 9112, 5.2
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    try:
        parser.receive_data(raw)
        request = parser.next_event()
    except h11.RemoteProtocolError as exc:
        return BadHead(exc.error_status_hint, str(exc).partition(": bytearray(")[0])  # the client's own bytes are left out
    if not isinstance(request, h11.Request):
        return BadHead(400, "no request")
    return _checked(request, raw)


def one_request(head: RequestHead) -> bytes:
    """The head with `Connection: close`. For hosts whose paths lead to several services: the next request on the connection could be for
    another one.
    """
    lines = head.raw.removesuffix(END_OF_HEAD).split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith((b"connection:", b"keep-alive:"))]
    options = [option for option in head.connection if option not in ("keep-alive", "close")]
    return b"\r\n".join([*kept, b"Connection: " + ", ".join([*options, "close"]).encode()]) + END_OF_HEAD


def _checked(request: h11.Request, raw: bytes) -> RequestHead | BadHead:
    headers = [(name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers]
    if len(headers) > MAX_HEADERS:
        return BadHead(431, f"more than {MAX_HEADERS} headers")
    hosts = [value for name, value in headers if name == "host"]
    target = request.target.decode("ascii", "replace")
    if len(hosts) > 1 or (not hosts and request.http_version == b"1.1"):
        return BadHead(400, f"{len(hosts)} Host headers")  # RFC 9112, 3.2
    if request.method == b"CONNECT":
        return BadHead(405, "CONNECT is not spoken here")
    if target.startswith("/"):
        path = target
    elif target == "*" and request.method == b"OPTIONS":
        path = "/"
    else:
        # RFC 9112, 3.2.2: the absolute form, which overrides Host, is for proxies, and this is none.
        return BadHead(400, "the target of the request is not a path")
    host = normal_host(hosts[0]) if hosts else ""
    if not _HOST.fullmatch(host):
        return BadHead(400, "the Host header is no host")
    connection = tuple(
        option.strip().lower() for name, value in headers if name == "connection" for option in value.split(",") if option.strip()
    )
    fields = dict(headers)
    scheme, _, ticket = fields.get("authorization", "").partition(" ")
    return RequestHead(
        raw,
        host,
        path,
        connection,
        fields.get("accept", "").encode("latin-1"),
        fields.get("upgrade", "").lower(),
        ticket.strip() if scheme.lower() == "bearer" else "",
    )
