"""Pure: answers of a daemon itself to HTTP clients: what went wrong, and the mark under which the log tells more."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

_TEXTS: Final = {421: "Misdirected Request", 431: "Request Header Fields Too Large"}
NAMES: Final = {
    405: "MethodNotAllowed",
    408: "Timeout",
    414: "TooLong",
    426: "UpgradeRequired",
    431: "TooLarge",
    501: "NotImplemented",
    505: "Version",
}
"""The one word for a request that cannot be served as it is, where the status says more than BadRequest."""
_PAGE: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{status} {text}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:4em auto;padding:0 1em;color:#222}}small{{color:#666}}</style></head>
<body><h1>{text}</h1><p>{message}</p><p><small>{status} {name} &middot; trace {trace}</small></p></body></html>
"""


class Refused(Exception):
    """A request that is answered here. `name` is one word, `str()` a sentence; both are shown to the client."""

    def __init__(
        self, status: int, name: str, message: str, *, retry_after_s: float = 0.0, detail: str = "", fields: Sequence[bytes] = ()
    ) -> None:
        self.status = status
        self.name = name
        self.message = message
        self.retry_after_s = retry_after_s
        self.detail = detail
        self.fields = tuple(fields)
        """Header fields to add to the answer, each with its line's end."""
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: the head without Connection field and closing empty line, and the body."""

    head: bytes
    body: bytes


def render(refused: Refused, trace: str, accept: bytes) -> Answer:
    """The answer, as HTML or, where the client asks for JSON and not for HTML, as JSON."""
    text = status_text(refused.status)
    wanted = accept.lower()
    if b"json" in wanted and b"text/html" not in wanted:
        error = {"name": refused.name, "message": refused.message, "status": refused.status, "trace": trace}
        kind, body = "application/json", json.dumps({"error": error}).encode() + b"\n"
    else:
        kind = "text/html; charset=utf-8"
        body = _PAGE.format(
            status=refused.status,
            text=html.escape(text),
            name=html.escape(refused.name),
            message=html.escape(refused.message),
            trace=html.escape(trace),
        ).encode("utf-8", "replace")
    retry = f"Retry-After: {max(1, round(refused.retry_after_s))}\r\n" if refused.retry_after_s else ""
    more = "Allow: GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS\r\n" if refused.status == 405 else ""
    if refused.status == 401:
        more = "WWW-Authenticate: Bearer\r\n"  # RFC 9110, 11.6.1: a 401 has to say what is wanted
    head = (
        f"HTTP/1.1 {refused.status} {text}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nCache-Control: no-store\r\n"
        f"X-Content-Type-Options: nosniff\r\nContent-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n{retry}{more}"
    )
    return Answer(head.encode("ascii") + b"".join(refused.fields), body)


def status_text(status: int) -> str:
    """The words for a status."""
    if status in _TEXTS:
        return _TEXTS[status]
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
