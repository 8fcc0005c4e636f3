"""Pure: heads on their way on: what belongs to one connection is taken out, and who asked is written in (RFC 9110, 7.6.1; RFC 7239)."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fxrelay.web.bodies import BodyReader, ClosingBody, LengthBody, response_body
from fxrelay.web.heads import BadHead, Field, RequestHead, ResponseHead
from fxrelay.web.targets import Target

UPGRADES: Final = frozenset({b"websocket", b"fx-stream"})
"""Protocols to which a connection may be switched. Others are not asked for: the service answers as if nobody had (RFC 9110, 7.8)."""
_PER_CONNECTION: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings"}
)
_NOT_FROM_OUTSIDE: Final = frozenset({b"proxy", b"proxy-authorization"})
"""CGI would make HTTP_PROXY of the first (httpoxy); the second is not for a service."""
_READ: Final = frozenset({b"host", b"content-length", b"expect", b"cookie", b"authorization"})
"""What a request's values say to this relay, besides those above: the target, the body's length, a wish, a node, a user."""
_FORWARDED: Final = (b"forwarded", b"x-forwarded-", b"x-real-ip")
_KEPT_PREFIXES: Final = (b"x-", b"sec-", b"content-", b"accept", b"if-", b"access-control-", b"fx-")
_KEPT: Final = frozenset(
    {
        b"host",
        b"authorization",
        b"cookie",
        b"expect",
        b"forwarded",
        b"origin",
        b"referer",
        b"user-agent",
        b"range",
        b"date",
        b"cache-control",
    }
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asks, as the gateway and this relay's own TLS know it. `client` is an IP address, or empty."""

    client: str
    scheme: str

    @classmethod
    def of(cls, client: str, scheme: str) -> "Origin":
        """From OPEN's `ip:port` or `[ip6]:port`; what is no address becomes none."""
        host = client.rpartition(":")[0].strip("[]")
        try:
            return cls(str(ipaddress.ip_address(host)), scheme)
        except ValueError:
            return cls("", scheme)


@dataclass(frozen=True, slots=True)
class Onward:
    """How a request goes on. `upgrade` is the protocol it asks for, if it may; `prefix` was taken from its path."""

    path: bytes
    prefix: bytes = b""
    upgrade: bytes = b""


def wanted_upgrade(head: RequestHead) -> bytes:
    """The protocol to which the request wants to switch, or nothing.

    Raises:
        BadHead: it has a body: what follows the head could then be read in two ways.
    """
    if head.method != b"GET" or head.version != b"1.1" or b"upgrade" not in head.tokens(b"connection"):
        return b""
    wanted = head.tokens(b"upgrade")
    if len(wanted) != 1 or not wanted <= UPGRADES:
        return b""
    if head.has_body:
        raise BadHead(400, "a request for an upgrade has a body")
    return next(iter(wanted))


def request_onward(head: RequestHead, target: Target, origin: Origin, onward: Onward, *, trusts_forwarded: bool, own_host: str) -> bytes:
    """The request's head for the service, complete. `own_host` is named where the client named no host."""
    named = _named_by_connection(head.fields)
    lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (head.method, onward.path, target.authority or own_host.encode())]
    before: list[Field] = []
    for field in head.fields:
        name = field.name
        if name in _PER_CONNECTION or name == b"host" or name in named or name in _NOT_FROM_OUTSIDE:
            continue
        # CGI and WSGI cannot tell X_Forwarded_For from X-Forwarded-For.
        if name.replace(b"_", b"-").startswith(_FORWARDED):
            if trusts_forwarded and b"_" not in name:
                before.append(field)
            continue
        if name == b"expect" and (head.version == b"1.0" or field.value.lower() != b"100-continue"):
            continue
        if name == b"content-length":
            continue
        lines.append(b"%b: %b\r\n" % (field.raw, field.value))
    if head.length is None:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    elif head.length or head.get(b"content-length") is not None:
        lines.append(b"Content-Length: %d\r\n" % head.length)
    lines += _forwarded(target, origin, before)
    if onward.prefix:
        lines.append(b"X-Forwarded-Prefix: %b\r\n" % onward.prefix)
    lines.append(b"Connection: upgrade\r\nUpgrade: %b\r\n\r\n" % onward.upgrade if onward.upgrade else b"\r\n")
    return b"".join(lines)


def free_fields(head: RequestHead) -> list[int]:
    """Which fields go on as they are, whatever their values, and say nothing to anybody here: by their places.

    The others decide where the request goes, how its body is read, who asks, or which fields go on at all.
    """
    named = _named_by_connection(head.fields)
    return [
        place
        for place, field in enumerate(head.fields)
        if not (
            (name := field.name) in _READ
            or name in _PER_CONNECTION
            or name in named
            or name in _NOT_FROM_OUTSIDE
            or name.replace(b"_", b"-").startswith(_FORWARDED)
        )
    ]


@dataclass(frozen=True, slots=True)
class Backward:
    """How a response goes back. `is_chunked`: its body is sent in chunks; `connection` is our own Connection field's value, or empty."""

    is_chunked: bool = False
    connection: bytes = b""
    extra: Sequence[bytes] = ()


def response_back(head: ResponseHead, backward: Backward) -> bytes:
    """The response's head for the client, complete."""
    named = _named_by_connection(head.fields)
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    no_length = backward.is_chunked or head.status == 204 or head.status < 200
    for field in head.fields:
        name = field.name
        if name in _PER_CONNECTION or name in named or (no_length and name == b"content-length"):
            continue
        lines.append(b"%b: %b\r\n" % (field.raw, field.value))
    if backward.is_chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    lines += backward.extra
    if backward.connection:
        lines.append(b"Connection: %b\r\n" % backward.connection)
    lines.append(b"\r\n")
    return b"".join(lines)


@dataclass(frozen=True, slots=True)
class Answer:
    """A final response on its way back. `wire` is its head for the client. `keeps_client` and `keeps_link`: the connection may be used
    again, if nothing else speaks against it.
    """

    wire: bytes
    body: BodyReader
    is_chunked: bool
    keeps_client: bool
    keeps_link: bool


def answer_back(head: ResponseHead, request: RequestHead, *, keeps_alive: bool, cookies: Sequence[bytes] = ()) -> Answer:
    """The final response with this head, for the client that made the request.

    Raises:
        BadHead: it leaves open where its body ends.
    """
    body = response_body(request.method, head)
    has_end = isinstance(body, LengthBody)
    is_old = request.version == b"1.0"
    keeps_client = keeps_alive and (has_end or not is_old)
    connection = b"close" if not keeps_client else b"keep-alive" if is_old else b""
    is_chunked = not has_end and not is_old
    wire = response_back(head, Backward(is_chunked, connection, cookies))
    keeps_link = head.version == b"1.1" and not isinstance(body, ClosingBody) and b"close" not in head.tokens(b"connection")
    return Answer(wire, body, is_chunked, keeps_client, keeps_link)


def switched_back(head: ResponseHead, upgrade: bytes) -> bytes:
    """The 101 for the client.

    Raises:
        BadHead: the service switches to something else than was asked for.
    """
    if head.tokens(b"upgrade") != {upgrade} or b"upgrade" not in head.tokens(b"connection"):
        raise BadHead(502, "the service switches to a protocol that nobody asked for")
    return response_back(head, Backward(connection=b"upgrade", extra=(b"Upgrade: %b\r\n" % (head.get(b"upgrade") or upgrade),)))


def _named_by_connection(fields: tuple[Field, ...]) -> frozenset[bytes]:
    """The fields that a Connection field declares to be for one connection only, without those by whose loss something could be gained."""
    names = {
        part.strip(b" \t")
        for field in fields
        if field.name == b"connection"
        for part in field.value.lower().split(b",")
        if part.strip(b" \t")
    }
    return frozenset(name for name in names if name not in _KEPT and not name.startswith(_KEPT_PREFIXES))


def _forwarded(target: Target, origin: Origin, before: list[Field]) -> list[bytes]:
    known = {field.name: field.value for field in before}
    client = origin.client.encode() or b"unknown"
    shown = b'"[%b]"' % client if b":" in client else client
    element = b"for=%b;proto=%b" % (shown, origin.scheme.encode())
    if target.authority:
        element += b';host="%b"' % target.authority
    values = {
        b"X-Forwarded-For": _joined(before, b"x-forwarded-for", client),
        b"X-Forwarded-Proto": known.get(b"x-forwarded-proto", origin.scheme.encode()),
        b"X-Forwarded-Host": known.get(b"x-forwarded-host", target.authority),
        b"X-Real-IP": known.get(b"x-real-ip", client),
        b"Forwarded": _joined(before, b"forwarded", element),
    }
    lines = [b"%b: %b\r\n" % pair for pair in values.items() if pair[1]]
    written = {name.lower() for name in values}
    return lines + [b"%b: %b\r\n" % (field.raw, field.value) for field in before if field.name not in written]


def _joined(before: list[Field], name: bytes, last: bytes) -> bytes:
    return b", ".join([*(field.value for field in before if field.name == name), last])
