"""Task: a stream that lets trio-websocket see nothing it could trip over.

The HTTP head is replaced by one of our own making, because the WebSocket library decodes some headers outside its error handling.
After it only unfragmented, small frames pass, and no pings: the control link never needs others, and tiny fragments cost many times their
size.
"""

import logging
from typing import Final

import trio

from fxtunnel.codes import Code
from fxtunnel.errors import RemoteProtocolError

logger = logging.getLogger(__name__)

_CONTINUATION: Final = 0x0
_PING: Final = 0x9
_FIN: Final = 0x80
_MASKED: Final = 0x80
_OPCODE: Final = 0x0F


class FrameScanner:
    """Watches WebSocket frame headers in a byte stream cut anywhere (RFC 6455, 5.2)."""

    __slots__ = ("_header", "_max_payload_bytes", "_skip_bytes")

    def __init__(self, max_payload_bytes: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._header = bytearray()
        self._skip_bytes = 0

    def feed(self, data: bytes) -> None:
        """Look at the next bytes.

        Raises:
            RemoteProtocolError: a fragment, a ping, or a frame above the limit.
        """
        at = 0
        while at < len(data):
            if self._skip_bytes:
                step = min(self._skip_bytes, len(data) - at)
                self._skip_bytes -= step
                at += step
                continue
            self._header.append(data[at])
            at += 1
            if len(self._header) >= 2 and len(self._header) == self._header_bytes():
                self._finish_header()

    def _header_bytes(self) -> int:
        short = self._header[1] & 0x7F
        return 2 + {126: 2, 127: 8}.get(short, 0) + (4 if self._header[1] & _MASKED else 0)

    def _finish_header(self) -> None:
        header = self._header
        short = header[1] & 0x7F
        payload_bytes = int.from_bytes(header[2:4]) if short == 126 else int.from_bytes(header[2:10]) if short == 127 else short
        if not header[0] & _FIN or header[0] & _OPCODE == _CONTINUATION:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "a fragmented WebSocket message on the control link")
        if header[0] & _OPCODE == _PING:
            # The library answers it, also behind our close, where it finds that it must not (RFC 6455, 5.5.1), and raises.
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "a WebSocket ping: control links have pings of their own")
        if payload_bytes > self._max_payload_bytes:
            raise RemoteProtocolError(Code.FRAME_SIZE, f"a control message of {payload_bytes} bytes")
        self._skip_bytes = payload_bytes
        header.clear()


class GuardedStream(trio.abc.Stream):
    """`stream` as the WebSocket library may see it: first `head`, then what the peer sends, starting with `rest`, frame by frame checked.

    A rule broken by the peer ends the stream like a lost connection, with one line in the log. Closing this closes `stream`.
    One reader and one writer at a time.
    """

    def __init__(self, stream: trio.abc.Stream, *, head: bytes, rest: bytes, max_payload_bytes: int) -> None:
        self._stream = stream
        self._head = head
        self._rest = rest
        self._scanner = FrameScanner(max_payload_bytes)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes; b"" at the end. Cancelling loses nothing.

        Raises:
            trio.BrokenResourceError: the connection is lost or the peer broke a rule.
        """
        if self._head:
            await trio.lowlevel.checkpoint()
            given, self._head = self._head[:max_bytes], self._head[len(self._head[:max_bytes]) :]
            return given
        if self._rest:
            await trio.lowlevel.checkpoint()
            data, self._rest = self._rest[:max_bytes], self._rest[len(self._rest[:max_bytes]) :]
        else:
            data = bytes(await self._stream.receive_some(max_bytes))
        try:
            self._scanner.feed(data)
        except RemoteProtocolError as exc:
            logger.warning("control link broken off: %s", exc)
            raise trio.BrokenResourceError(str(exc)) from exc
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send it all. A cancelled send leaves the stream unusable."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until sending may make progress."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close `stream`, also when cancelled."""
        await self._stream.aclose()
