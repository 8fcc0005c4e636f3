"""Task: from TLS to a control link: bounded HTTP heads, answers, and the WebSocket upgrade of either end (PROTOCOL.md, 1 and 8)."""

import base64
import binascii
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeGuard

import h11
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream
from wsproto.utilities import generate_accept_token

from fxtunnel.codes import Code, Refusal
from fxtunnel.control.guard import GuardedStream
from fxtunnel.control.messages import MESSAGE_BYTES, TEXT_CHARS
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed, TunnelError

SUBPROTOCOL: Final = "fx-control.1"
CONTROL_PATH: Final = "/.fx/control"
ENROL_PATH: Final = "/.fx/enrol"
HEAD_BYTES: Final = 8192
HEAD_HEADERS: Final = 64
BODY_BYTES: Final = 8192
_RECEIVE_BYTES: Final = 4096
_END_OF_HEAD: Final = b"\r\n\r\n"
_KEY_SENT: Final = re.compile(rb"\r\nSec-WebSocket-Key: *([A-Za-z0-9+/=]+)\r\n", re.IGNORECASE)
_REASONS: Final = {200: "OK", 101: "Switching Protocols", 404: "Not Found"}


@dataclass(frozen=True, slots=True)
class Head:
    """A request or status line with its headers, and the bytes that came behind them."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """The value of a header, None without one.

        Raises:
            PeerRefused: it is there twice; which one counts must never be a matter of taste.
        """
        values = [value for key, value in self.headers if key == name]
        if len(values) > 1:
            raise PeerRefused(Refusal.BAD_REQUEST, f"more than one {name} header")
        return values[0] if values else None


async def read_head(stream: trio.abc.Stream, *, max_bytes: int = HEAD_BYTES, max_headers: int = HEAD_HEADERS) -> Head:
    """The head of the request a client sends. Set a deadline around it. A cancelled read leaves the stream unusable.

    Raises:
        PeerRefused: not HTTP/1.1, not ASCII, too long, too many headers.
        TunnelClosed: the client left before its head was complete.
    """
    try:
        raw, rest = await _receive_head(stream, max_bytes)
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=max_bytes)
        request = _parse(parser, raw)
    except RemoteProtocolError as exc:
        raise PeerRefused(Refusal.BAD_REQUEST, str(exc)) from exc
    if not isinstance(request, h11.Request) or request.http_version != b"1.1":
        raise PeerRefused(Refusal.BAD_REQUEST, "HTTP/1.1 is spoken here")
    headers = tuple((name.decode("ascii"), value.decode("ascii")) for name, value in request.headers)
    if len(headers) > max_headers:
        raise PeerRefused(Refusal.BAD_REQUEST, f"more than {max_headers} headers")
    return Head(request.method.decode("ascii"), request.target.decode("ascii"), headers, rest)


async def read_body(stream: trio.abc.Stream, head: Head, *, max_bytes: int = BODY_BYTES) -> bytes:
    """The body a head announces with Content-Length. Set a deadline around it.

    Raises:
        PeerRefused: no length, chunked, or more than `max_bytes`.
        TunnelClosed: the client left before it was complete.
    """
    length = head.header("content-length")
    if head.header("transfer-encoding") is not None or length is None or not length.isdecimal() or len(length) > 9:
        raise PeerRefused(Refusal.BAD_REQUEST, "the body needs a Content-Length")
    if int(length) > max_bytes:
        raise PeerRefused(Refusal.BAD_REQUEST, f"a body of more than {max_bytes} bytes")
    body = bytearray(head.body)
    while len(body) < int(length):
        body += await _receive(stream)
    return bytes(body[: int(length)])


async def answer(stream: trio.abc.Stream, status: int, fields: Mapping[str, object]) -> None:
    """Send a complete JSON answer after which the connection is to be closed (by the caller)."""
    body = json.dumps(dict(fields), separators=(",", ":")).encode()
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Refused')}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    await stream.send_all(head.encode("ascii") + body)


def refusal_fields(refused: PeerRefused, now_unix: float) -> dict[str, object]:
    """The JSON of an HTTP error (PROTOCOL.md, 8); its status is `refused.refusal.status`."""
    return {
        "error": refused.refusal.value,
        "message": str(refused),
        "gateway_time_unix": int(now_unix),
        "retry_after_s": refused.retry_after_s,
    }


def refusal_from(status: int, fields: Mapping[str, object]) -> PeerRefused:
    """The error a gateway's answer stands for. A wrong clock is told with its distance from this machine's."""
    name, message = fields.get("error"), str(fields.get("message", ""))[:TEXT_CHARS]
    if not isinstance(name, str) or name not in Refusal.__members__.values():
        return PeerRefused(Refusal.BAD_REQUEST, f"the gateway answered {status}: {message or 'no reason given'}")
    retry_after_s, gateway_unix = fields.get("retry_after_s"), fields.get("gateway_time_unix")
    if name == Refusal.CLOCK_SKEW and _is_number(gateway_unix):
        ahead_s = time.time() - gateway_unix
        message = f"this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the gateway's: set it"
    return PeerRefused(
        Refusal(name), message or name, retry_after_s=min(max(retry_after_s, 0.0), 3600.0) if _is_number(retry_after_s) else 0.0
    )


async def accept_websocket(nursery: trio.Nursery, stream: trio.abc.Stream, head: Head) -> WebSocketConnection:
    """Answer a checked upgrade request with 101. The WebSocket's reader runs in `nursery`. Set a deadline around it.

    The caller closes the WebSocket, and `stream` behind it.

    Raises:
        PeerRefused: `head` is no proper upgrade; nothing was answered yet.
        trio.BrokenResourceError: the client left.
    """
    key = _checked_key(head)
    # The WebSocket library sees this head instead of the client's: nothing the client chose but a checked key reaches its parser.
    canonical = (
        f"GET {CONTROL_PATH} HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
    )
    guarded = GuardedStream(stream, head=canonical.encode("ascii"), rest=b"", max_payload_bytes=MESSAGE_BYTES)
    request = await wrap_server_stream(nursery, guarded, max_message_size=MESSAGE_BYTES)
    try:
        return await request.accept(subprotocol=SUBPROTOCOL)
    except ConnectionClosed as exc:
        raise trio.BrokenResourceError("the relay left during the upgrade") from exc


async def post_json(stream: trio.abc.Stream, host: str, path: str, body: Mapping[str, object]) -> tuple[int, dict[str, object]]:
    """Send `body` to the gateway; its status and JSON answer. Set a deadline around it; the stream is of no use afterwards.

    Raises:
        TunnelClosed: the connection ended before the answer was complete.
        RemoteProtocolError: the answer is no HTTP or no JSON object.
    """
    payload = json.dumps(dict(body), separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    try:
        await stream.send_all(head.encode("ascii") + payload)
    except trio.BrokenResourceError as exc:
        raise TunnelClosed(Code.LINK_LOST, f"the connection was lost: {exc}", by_peer=True) from exc
    status, headers, rest = await _read_response(stream, "POST")
    return status, await _read_fields(stream, headers, rest)


async def open_websocket(
    nursery: trio.Nursery, stream: trio.abc.Stream, host: str, path: str, headers: Mapping[str, str]
) -> WebSocketConnection:
    """Upgrade to a WebSocket whose reader runs in `nursery`. Set a deadline around it.

    The caller closes the WebSocket, and `stream` behind it, also when this raises.

    Raises:
        PeerRefused: the gateway said no.
        TunnelClosed: the connection ended.
        RemoteProtocolError: the answer is not what PROTOCOL.md says.
    """
    guarded = _UpgradingStream(stream)
    opened: list[WebSocketConnection] = []

    async with trio.open_nursery() as opening:

        async def shake_hands() -> None:
            extra = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
            opened.append(
                await wrap_client_stream(
                    nursery,
                    guarded,  # type: ignore[arg-type]  # any Stream will do; the library's annotation is too narrow
                    host,
                    path,
                    subprotocols=[SUBPROTOCOL],
                    extra_headers=extra,
                    max_message_size=MESSAGE_BYTES,
                )
            )
            opening.cancel_scope.cancel()

        opening.start_soon(shake_hands)
        # The library's own handshake never ends when the connection does, and throws refusals into the nursery.
        await guarded.failed.wait()
        opening.cancel_scope.cancel()
    if guarded.failure is not None:
        raise guarded.failure
    return opened[0]


class _UpgradingStream(GuardedStream):
    """Checks the answer to an upgrade before the WebSocket library sees one; a refusal becomes `failure`."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream, head=b"", rest=b"", max_payload_bytes=MESSAGE_BYTES)
        self.failed = trio.Event()
        self.failure: TunnelError | None = None
        self._key_sent = b""
        self._is_upgraded = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self._key_sent and (key := _KEY_SENT.search(bytes(data))):
            self._key_sent = key[1]
        try:
            await super().send_all(data)
        except trio.BrokenResourceError as exc:
            self._fail(TunnelClosed(Code.LINK_LOST, str(exc), by_peer=True))
            raise

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._is_upgraded:
            try:
                await self._check_upgrade()
            except TunnelError as exc:
                self._fail(exc)
                raise trio.BrokenResourceError(str(exc)) from exc
        return await super().receive_some(max_bytes)

    async def _check_upgrade(self) -> None:
        status, headers, rest = await _read_response(self._stream, "GET")
        if status != 101:
            raise refusal_from(status, await _read_fields(self._stream, headers, rest))
        accept = generate_accept_token(self._key_sent)
        if headers.get("sec-websocket-accept") != accept.decode("ascii") or headers.get("sec-websocket-protocol") != SUBPROTOCOL:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"the gateway does not speak {SUBPROTOCOL}")
        self._head = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\nSec-WebSocket-Protocol: " + SUBPROTOCOL.encode("ascii") + _END_OF_HEAD
        )
        self._rest = rest
        self._is_upgraded = True

    def _fail(self, failure: TunnelError) -> None:
        if not self._is_upgraded and self.failure is None:
            self.failure = failure
            self.failed.set()


def _checked_key(head: Head) -> str:
    """The Sec-WebSocket-Key of a complete upgrade request (RFC 6455, 4.2.1)."""
    key, version = head.header("sec-websocket-key"), head.header("sec-websocket-version")
    if (head.header("upgrade") or "").lower() != "websocket" or "upgrade" not in _tokens(head.header("connection") or ""):
        raise PeerRefused(Refusal.BAD_REQUEST, "expected an upgrade to a WebSocket")
    if head.body or head.header("content-length") is not None:
        # RFC 6455, 4.1: the client waits for the answer. What is sent earlier could be meant for another parser.
        raise PeerRefused(Refusal.BAD_REQUEST, "bytes before the upgrade was answered")
    if version != "13" or head.header("host") is None:
        raise PeerRefused(Refusal.BAD_REQUEST, "expected WebSocket version 13")
    if SUBPROTOCOL not in _tokens(head.header("sec-websocket-protocol") or ""):
        raise PeerRefused(Refusal.VERSION_MISMATCH, f"subprotocol {SUBPROTOCOL} is spoken here")
    try:
        if key is not None and len(base64.b64decode(key, validate=True)) == 16:
            return key
    except binascii.Error:
        pass
    raise PeerRefused(Refusal.BAD_REQUEST, "a malformed Sec-WebSocket-Key")


def _tokens(value: str) -> set[str]:
    return {token.strip().lower() for token in value.split(",")}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


async def _receive(stream: trio.abc.Stream) -> bytes:
    try:
        data = bytes(await stream.receive_some(_RECEIVE_BYTES))
    except trio.BrokenResourceError as exc:
        raise TunnelClosed(Code.LINK_LOST, f"the connection was lost: {exc}", by_peer=True) from exc
    if not data:
        raise TunnelClosed(Code.LINK_LOST, "the peer closed the connection", by_peer=True)
    return data


async def _receive_head(stream: trio.abc.Stream, max_bytes: int) -> tuple[bytes, bytes]:
    """The bytes of a head, and what came behind it."""
    buffer = bytearray()
    while (end := buffer.find(_END_OF_HEAD)) < 0:
        if len(buffer) >= max_bytes:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"a head of more than {max_bytes} bytes")
        buffer += await _receive(stream)
    raw, rest = bytes(buffer[: end + len(_END_OF_HEAD)]), bytes(buffer[end + len(_END_OF_HEAD) :])
    if len(raw) > max_bytes:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"a head of more than {max_bytes} bytes")
    # A bare LF ends a line for some parsers and not for others; such a head has no business here.
    if not raw.isascii() or raw.count(b"\n") != raw.count(b"\r\n"):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "a head that is not plain ASCII lines")
    return raw, rest


def _parse(parser: h11.Connection, raw: bytes) -> object:
    try:
        parser.receive_data(raw)
        return parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"not HTTP: {exc}") from exc


async def _read_response(stream: trio.abc.Stream, method: str) -> tuple[int, dict[str, str], bytes]:
    raw, rest = await _receive_head(stream, HEAD_BYTES)
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
    upgrade = [("Upgrade", "websocket"), ("Connection", "Upgrade")] if method == "GET" else []
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "gateway"), *upgrade]))
    parser.send(h11.EndOfMessage())
    response = _parse(parser, raw)
    if not isinstance(response, h11.Response | h11.InformationalResponse):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the gateway's answer is not HTTP")
    return response.status_code, {name.decode("ascii"): value.decode("ascii") for name, value in response.headers}, rest


async def _read_fields(stream: trio.abc.Stream, headers: Mapping[str, str], rest: bytes) -> dict[str, object]:
    length = headers.get("content-length", "")
    if not length.isdecimal() or len(length) > 9 or int(length) > BODY_BYTES:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the gateway's answer has no proper length")
    body = bytearray(rest)
    while len(body) < int(length):
        body += await _receive(stream)
    try:
        fields = json.loads(body[: int(length)])
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the gateway's answer is not JSON") from exc
    if not isinstance(fields, dict):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the gateway's answer is not a JSON object")
    return fields
