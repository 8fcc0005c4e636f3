"""Pure: the first frames of a data link (PROTOCOL.md, 4). JSON, at most 4 KiB, not part of the counted sequence."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from fxtunnel.codes import Code, Refusal
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.model import SessionId
from fxtunnel.protocol.frames import DENIED, HEADER, HEADER_BYTES, HELLO, MAX_HELLO_BYTES, WELCOME, encode

VERSION: Final = 1
CAP_RESUME: Final = "resume"
KNOWN_CAPS: Final = frozenset({CAP_RESUME})
_SESSION: Final = re.compile(r"[0-9a-f]{32}")
_MAX_COUNTER: Final = 2**63
_MAX_LIST: Final = 32
_MAX_MESSAGE: Final = 256
_MAX_RETRY_S: Final = 3_600

__all__ = [
    "CAP_RESUME",
    "HEADER_BYTES",
    "KNOWN_CAPS",
    "VERSION",
    "Denied",
    "Hello",
    "Welcome",
    "decode_hello",
    "decode_reply",
    "encode_denied",
    "encode_hello",
    "encode_welcome",
    "parse_header",
]


@dataclass(frozen=True, slots=True)
class Hello:
    """The relay's first frame. `session` None asks for a new session; `received` is its receive counter; `window` is reserved."""

    ticket: str
    session: SessionId | None = None
    received: int = 0
    window: int = 65_536
    caps: tuple[str, ...] = (CAP_RESUME,)
    need: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Welcome:
    """The gateway's answer: the session, and its own receive counter; `window` is reserved."""

    session: SessionId
    received: int = 0
    window: int = 65_536
    caps: tuple[str, ...] = (CAP_RESUME,)


@dataclass(frozen=True, slots=True)
class Denied:
    """The gateway's answer when this data link may not be."""

    code: Refusal
    message: str = ""
    retry_after_s: float = 0.0


def encode_hello(hello: Hello) -> bytes:
    """A whole HELLO frame."""
    return _encode(HELLO, {"v": VERSION, **asdict(hello)})


def encode_welcome(welcome: Welcome) -> bytes:
    """A whole WELCOME frame."""
    return _encode(WELCOME, {"v": VERSION, **asdict(welcome)})


def encode_denied(denied: Denied) -> bytes:
    """A whole DENIED frame; the message is cut to what the relay reads."""
    return _encode(DENIED, asdict(denied) | {"message": denied.message[:_MAX_MESSAGE]})


def parse_header(header: bytes) -> tuple[int, int, int]:
    """Type, length and stream id of a hello frame's eight header bytes.

    Raises:
        RemoteProtocolError: not a hello frame, or too long; nothing of it needs to be read.
    """
    word, stream_id = HEADER.unpack(header)
    kind, length = word >> 24, word & 0xFF_FFFF
    if kind not in (HELLO, WELCOME, DENIED) or stream_id:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the first frame of a data link is not a hello")
    if not 2 <= length <= MAX_HELLO_BYTES:
        raise RemoteProtocolError(Code.FRAME_SIZE, f"hello of {length} bytes")
    return kind, length, stream_id


def decode_hello(payload: bytes) -> Hello:
    """What the relay said.

    Raises:
        RemoteProtocolError: not JSON, or a field is missing or out of bounds.
    """
    fields = _decode(payload)
    _check_version(fields)
    ticket = fields.get("ticket")
    if not isinstance(ticket, str) or not 1 <= len(ticket) <= 256 or not ticket.isascii():
        raise _bad("ticket")
    session = fields.get("session")
    return Hello(
        ticket,
        None if session is None else _session(session),
        _integer(fields, "received", 0, _MAX_COUNTER),
        _integer(fields, "window", 1, 2**31 - 1),
        _names(fields, "caps"),
        _names(fields, "need"),
    )


def decode_reply(kind: int, payload: bytes) -> Welcome | Denied:
    """What the gateway answered.

    Raises:
        RemoteProtocolError: not JSON, or a field is missing or out of bounds.
    """
    fields = _decode(payload)
    if kind == WELCOME:
        _check_version(fields)
        return Welcome(
            _session(fields.get("session")),
            _integer(fields, "received", 0, _MAX_COUNTER),
            _integer(fields, "window", 1, 2**31 - 1),
            _names(fields, "caps"),
        )
    if kind != DENIED:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the gateway answered with a HELLO")
    code, message, retry_after_s = fields.get("code"), fields.get("message", ""), fields.get("retry_after_s", 0)
    if not isinstance(code, str) or not isinstance(message, str) or type(retry_after_s) not in (int, float):
        raise _bad("code")
    known = code in Refusal.__members__.values()
    return Denied(Refusal(code) if known else Refusal.UNSUPPORTED, message[:_MAX_MESSAGE], float(min(max(retry_after_s, 0), _MAX_RETRY_S)))


def _encode(kind: int, fields: dict[str, Any]) -> bytes:
    return encode(kind, 0, json.dumps(fields, separators=(",", ":")).encode())


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(payload, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "hello is not JSON") from None
    if not isinstance(fields, dict):
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, "hello is not a JSON object")
    return fields


def _check_version(fields: dict[str, Any]) -> None:
    version = fields.get("v")
    if type(version) is not int or version != VERSION:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"protocol version {VERSION} is spoken here")


def _bad(key: str) -> RemoteProtocolError:
    return RemoteProtocolError(Code.PROTOCOL_ERROR, f"hello: {key} is missing or out of bounds")


def _integer(fields: dict[str, Any], key: str, low: int, high: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not low <= value <= high:
        raise _bad(key)
    return value


def _session(value: object) -> SessionId:
    if not isinstance(value, str) or _SESSION.fullmatch(value) is None:
        raise _bad("session")
    return SessionId(value)


def _names(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key, [])
    if not isinstance(value, list) or len(value) > _MAX_LIST or not all(isinstance(v, str) and len(v) <= 64 for v in value):
        raise _bad(key)
    return tuple(value)
