"""Pure: where bodies end (RFC 9112, 6 and 7): by length, by chunks, or with the connection; bytes in, payload out."""

import re
from enum import Enum
from typing import Final, Protocol

from fxrelay.web.heads import BadHead, ResponseHead, content_length

MAX_CHUNK_LINE_BYTES: Final = 1_024
MAX_TRAILER_BYTES: Final = 8_192
LAST_CHUNK: Final = b"0\r\n\r\n"

_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t \x21-\x7e\x80-\xff]*)?\r\n")
_SIZE_BEGUN: Final = re.compile(rb"[0-9A-Fa-f]{0,15}(?:[ \t]*(?:;[\t \x21-\x7e\x80-\xff]*)?)?\r?")
_TRAILER: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t \x21-\x7e\x80-\xff]*\r\n")


class BadBody(Exception):
    """A body whose framing is broken: nothing behind it can be believed."""


class BodyReader(Protocol):
    """Finds the end of one body. `rest` is what came behind it."""

    is_done: bool
    rest: bytes

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`.

        Raises:
            BadBody: the framing is broken.
        """

    def end(self) -> bool:
        """The connection has ended: whether that is this body's end."""


class LengthBody:
    """So many bytes."""

    __slots__ = ("_left", "is_done", "rest")

    def __init__(self, length: int) -> None:
        self._left = length
        self.is_done = not length
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """See `BodyReader`."""
        if len(data) < self._left:
            self._left -= len(data)
            return data
        payload, self.rest = data[: self._left], data[self._left :]
        self._left = 0
        self.is_done = True
        return payload

    def end(self) -> bool:
        """See `BodyReader`."""
        return self.is_done


class ClosingBody:
    """Everything up to the end of the connection: HTTP/1.0, and responses that say nothing."""

    __slots__ = ("is_done", "rest")

    def __init__(self) -> None:
        self.is_done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """See `BodyReader`."""
        return data

    def end(self) -> bool:
        """See `BodyReader`."""
        self.is_done = True
        return True


class _At(Enum):
    SIZE = 1
    DATA = 2
    BREAK = 3
    TRAILERS = 4


class ChunkedBody:
    """Chunks. Extensions and trailers are checked and dropped (RFC 9110, 6.5.1; RFC 9112, 7.1.1)."""

    __slots__ = ("_at", "_held", "_left", "_trailer_bytes", "is_done", "rest")

    def __init__(self) -> None:
        self._at = _At.SIZE
        self._held = b""
        self._left = 0
        self._trailer_bytes = 0
        self.is_done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """See `BodyReader`."""
        if self.is_done:
            self.rest += data
            return b""
        if self._held:
            data, self._held = self._held + data, b""
        found: list[bytes] = []
        position = 0
        while not self.is_done:
            after = self._step(data, position, found)
            if after < 0:
                self._held = data[position:]
                break
            position = after
        else:
            self.rest = data[position:]
        return found[0] if len(found) == 1 else b"".join(found)

    def end(self) -> bool:
        """See `BodyReader`."""
        return self.is_done

    def _step(self, data: bytes, position: int, found: list[bytes]) -> int:
        """One piece of the framing; returns where the next begins, or -1 when there is not enough."""
        match self._at:
            case _At.DATA:
                piece = data[position : position + self._left]
                if not piece:
                    return -1
                found.append(piece)
                self._left -= len(piece)
                if not self._left:
                    self._at = _At.BREAK
                return position + len(piece)
            case _At.BREAK:
                if not b"\r\n".startswith(data[position : position + 2]):
                    raise BadBody("a chunk does not end where it should")
                if len(data) < position + 2:
                    return -1
                self._at = _At.SIZE
                return position + 2
            case _At.SIZE:
                return self._size(data, position)
            case _At.TRAILERS:
                return self._trailer(data, position)

    def _size(self, data: bytes, position: int) -> int:
        end = data.find(b"\n", position, position + MAX_CHUNK_LINE_BYTES)
        if end < 0:
            if len(data) - position >= MAX_CHUNK_LINE_BYTES or _SIZE_BEGUN.fullmatch(data, position) is None:
                raise BadBody("a chunk's size is malformed")
            return -1
        found = _SIZE_LINE.fullmatch(data, position, end + 1)
        if found is None:
            raise BadBody("a chunk's size is malformed")
        self._left = int(found[1], 16)
        self._at = _At.DATA if self._left else _At.TRAILERS
        return end + 1

    def _trailer(self, data: bytes, position: int) -> int:
        end = data.find(b"\n", position)
        if end < 0:
            if len(data) - position + self._trailer_bytes > MAX_TRAILER_BYTES:
                raise BadBody("trailers are too long")
            return -1
        if data[position : end + 1] == b"\r\n":
            self.is_done = True
            return end + 1
        self._trailer_bytes += end + 1 - position
        if self._trailer_bytes > MAX_TRAILER_BYTES or _TRAILER.fullmatch(data, position, end + 1) is None:
            raise BadBody("trailers are malformed or too long")
        return end + 1


def request_body(length: int | None) -> BodyReader:
    """The reader of a request's body."""
    return ChunkedBody() if length is None else LengthBody(length)


def response_body(method: bytes, head: ResponseHead) -> BodyReader:
    """The reader of the body that follows this head (RFC 9112, 6.3).

    Raises:
        BadHead: the head leaves open where the body ends.
    """
    if method == b"HEAD" or head.status in (204, 304) or head.status < 200:
        return LengthBody(0)
    try:
        length = content_length(head.fields)
    except ValueError:
        raise BadHead(502, "the service's Content-Length is malformed") from None
    codings = [field.value.lower() for field in head.fields if field.name == b"transfer-encoding"]
    if codings:
        if codings != [b"chunked"] or length is not None or head.version == b"1.0":
            raise BadHead(502, "the service's response leaves open where its body ends")
        return ChunkedBody()
    return ClosingBody() if length is None else LengthBody(length)


def chunk(data: bytes) -> bytes:
    """`data` as one chunk; nothing for nothing, since an empty chunk is the end."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
