"""Pure: heads of HTTP/1 messages, read strictly: whatever another reader could take for something else is refused (RFC 9112, 2 to 6).

Requests are cut into lines and fields here, after a look at the raw bytes, and judged by h11: its connection takes bare LF for a line's
end, unfolds folded lines, and costs six times as much (docs/adr/0011).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import h11

MAX_HEAD_BYTES: Final = 8_192
MAX_FIELDS: Final = 64
MAX_ANSWER_HEAD_BYTES: Final = 32_768
"""Of a service's response: those set many cookies, and are ours."""
MAX_ANSWER_FIELDS: Final = 256

_BARE: Final = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\r\n[ \t]")
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t \x21-\x7e\x80-\xff]*))?")
_FIELD: Final = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[\t \x21-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_REQUEST_LINE: Final = re.compile(rb"([^ ]+) ([^ ]+) HTTP/([0-9]\.[0-9])")
_STATEMENTS: Final = frozenset({b"content-length", b"transfer-encoding"})
_END: Final = b"\r\n\r\n"


class BadHead(Exception):
    """A head that is not taken. `status` is the answer to a client; `str()` says why, in words of ours only."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        super().__init__(why)


class Field(NamedTuple):
    """One header field. `name` is in lower case, `raw` as it was written."""

    name: bytes
    raw: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head. `length` is its body's, None for a chunked one. `version` is b"1.0" or b"1.1"."""

    method: bytes
    target: bytes
    version: bytes
    fields: tuple[Field, ...]
    length: int | None

    @property
    def has_body(self) -> bool:
        """Whether any bytes follow."""
        return self.length != 0

    @property
    def keeps_alive(self) -> bool:
        """Whether the client means to go on after the response (RFC 9112, 9.3)."""
        tokens = self.tokens(b"connection")
        return b"close" not in tokens if self.version == b"1.1" else b"keep-alive" in tokens

    def get(self, name: bytes) -> bytes | None:
        """The value of the first field of that name."""
        return _get(self.fields, name)

    def tokens(self, name: bytes) -> frozenset[bytes]:
        """The elements of a list field, in lower case."""
        return _tokens(self.fields, name)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's head."""

    status: int
    reason: bytes
    version: bytes
    fields: tuple[Field, ...]

    def get(self, name: bytes) -> bytes | None:
        """The value of the first field of that name."""
        return _get(self.fields, name)

    def tokens(self, name: bytes) -> frozenset[bytes]:
        """The elements of a list field, in lower case."""
        return _tokens(self.fields, name)


def cookie_values(fields: Sequence[Field], name: bytes) -> Iterator[bytes]:
    """The values of the request cookies of this name, in order: browsers send one for each path and domain that match (RFC 6265, 5.4)."""
    wanted = name + b"="
    for found in fields:
        if found.name == b"cookie":
            for part in found.value.split(b";"):
                pair = part.strip(b" \t")
                if pair.startswith(wanted):
                    yield pair[len(wanted) :]


class HeadScanner:
    """Collects bytes until a head is whole. What lies behind the head stays in `rest`."""

    __slots__ = ("_limit_bytes", "_scanned", "rest")

    def __init__(self, limit_bytes: int = MAX_HEAD_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._scanned = 0
        self.rest = bytearray()

    def feed(self, data: bytes) -> None:
        """More has arrived."""
        self.rest += data

    def take_rest(self) -> bytes:
        """What lies behind the head: the caller's."""
        rest, self.rest = bytes(self.rest), bytearray()
        return rest

    def whole_head(self, data: bytes) -> int:
        """If `data` begins with a whole head, and nothing is held: where its empty line begins, otherwise -1; then `feed` tells more.

        The same rules as those of `next_head`, for what comes in one piece.
        """
        if self.rest:
            return -1
        end = data.find(_END, 0, self._limit_bytes)
        if end < 0 or _TOKEN.match(data, 0, 1) is None:
            return -1
        stop = end + 2
        breaks = data.count(b"\r\n", 0, stop)
        is_sound = breaks == data.count(b"\n", 0, stop) == data.count(b"\r", 0, stop)
        return end if is_sound and data.find(b"\r\n ", 0, stop) < 0 and data.find(b"\r\n\t", 0, stop) < 0 else -1

    def next_head(self) -> bytes | None:
        """The next head without its empty line, or None as long as it is not whole.

        Raises:
            BadHead: it is too long, or its lines are not what they seem. The connection cannot go on.
        """
        rest = self.rest
        if not rest:
            return None
        if not self._scanned:
            if rest.startswith(b"\r\n"):
                del rest[:2]  # RFC 9112, 2.2: old clients put an empty line behind a body
                if not rest:
                    return None
            if rest[0] == 13 and len(rest) == 1:
                return None
            if _TOKEN.match(rest, 0, 1) is None:
                raise BadHead(400, "this is not HTTP")
        end = rest.find(_END, max(0, self._scanned - 3))
        stop = len(rest) if end < 0 else end + 2
        if _BARE.search(rest, max(0, self._scanned - 2), min(stop, self._limit_bytes)) is not None:
            raise BadHead(400, "a line break that is none, or a folded line")
        if stop > self._limit_bytes:
            if rest.find(b"\r\n", 0, self._limit_bytes) < 0:
                raise BadHead(414, f"the request line is longer than {self._limit_bytes} bytes")
            raise BadHead(431, f"the head is longer than {self._limit_bytes} bytes")
        if end < 0:
            self._scanned = len(rest)
            return None
        head = bytes(memoryview(rest)[:end])
        del rest[: end + 4]
        self._scanned = 0
        return head


def parse_request(raw: bytes) -> RequestHead:
    """The request with this head, which came from a `HeadScanner`.

    Raises:
        BadHead: it is malformed, or leaves it open where its body ends.
    """
    lines = raw.split(b"\r\n")
    if len(lines) > MAX_FIELDS + 1:
        raise BadHead(431, f"more than {MAX_FIELDS} header fields")
    first = _REQUEST_LINE.fullmatch(lines[0])
    if first is None:
        raise BadHead(400, "the request's head is malformed")
    method, target, version = first.groups()
    pairs = [_cut(line) for line in lines[1:]]
    try:
        h11.Request(method=method, target=target, headers=pairs, http_version=version)
    except h11.LocalProtocolError as exc:
        status = exc.error_status_hint if exc.error_status_hint in (400, 501) else 400
        raise BadHead(status, "the request's head is malformed" if status == 400 else "an unknown transfer encoding") from exc
    if version not in (b"1.1", b"1.0"):
        raise BadHead(505, "only HTTP/1.0 and HTTP/1.1")
    fields = tuple([Field(name.lower(), name, value) for name, value in pairs])
    return RequestHead(method, target, version, fields, _request_length(fields, version))


def _cut(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon:
        raise BadHead(400, "the request's head is malformed")
    return name, value.strip(b" \t")


def are_fields(pairs: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether h11 takes these names and values. Not for Host and those that say how a body is read: they are judged with the whole head."""
    try:
        h11.EndOfMessage(headers=list(pairs))  # the event that has fields and nothing else
    except h11.LocalProtocolError:
        return False
    return True


def parse_response(raw: bytes) -> ResponseHead:
    """The response with this head, which came from a `HeadScanner`.

    Raises:
        BadHead: it is malformed.
    """
    lines = raw.split(b"\r\n")
    first = _STATUS_LINE.fullmatch(lines[0])
    if first is None or len(lines) > MAX_ANSWER_FIELDS + 1:
        raise BadHead(502, "the service's status line is malformed" if first is None else "the service sends too many header fields")
    fields = []
    for line in lines[1:]:
        found = _FIELD.fullmatch(line)
        if found is None:
            raise BadHead(502, "a header field of the service is malformed")
        name, value = found.groups()
        fields.append(Field(name.lower(), name, value))
    version, status, reason = first.groups()
    return ResponseHead(int(status), reason or b"", b"1." + version, tuple(fields))


def content_length(fields: tuple[Field, ...]) -> int | None:
    """The body's length as its fields say; None if they do not.

    Raises:
        ValueError: they contradict each other, or are no numbers. A length that is said twice is a contradiction as well.
    """
    found = [field.value for field in fields if field.name == b"content-length"]
    if not found:
        return None
    if len(found) > 1 or _LENGTH.fullmatch(found[0]) is None:
        raise ValueError("bad Content-Length")
    return int(found[0])


def _request_length(fields: tuple[Field, ...], version: bytes) -> int | None:
    """The length of the body as the head says it. A head that says it twice is refused; h11 would join equal lengths into one."""
    stated = [field for field in fields if field.name in _STATEMENTS]
    if not stated:
        return 0
    if len(stated) > 1:
        raise BadHead(400, "more than one statement of the body's length")  # RFC 9112, 6.1 and 6.3: how requests are smuggled
    name, _, value = stated[0]
    if name == b"transfer-encoding":
        if version == b"1.0":
            raise BadHead(400, "a transfer encoding in HTTP/1.0")
        return None  # h11 has taken nothing but "chunked"
    if _LENGTH.fullmatch(value) is None:
        raise BadHead(400, "the body's length is no number")
    return int(value)


def _get(fields: tuple[Field, ...], name: bytes) -> bytes | None:
    for field in fields:
        if field.name == name:
            return field.value
    return None


def _tokens(fields: tuple[Field, ...], name: bytes) -> frozenset[bytes]:
    return frozenset(
        token for field in fields if field.name == name for part in field.value.lower().split(b",") if (token := part.strip(b" \t"))
    )
