"""Task: how the streams of `fxgateway connect` end: clean only where an end was really meant, else with a reset; each way for itself."""

import socket
from typing import Final

import trio

from fxtunnel.engine.splice import CLOSE_CLEANLY, RESET_ON_CLOSE
from fxtunnel.engine.tls_socket import TlsSocket

_BLOCK_BYTES: Final = 65_536
GOODBYE_S: Final = 5.0
"""For a close_notify to fit into a socket whose peer takes nothing."""


def break_on_close(sock: trio.socket.SocketType | socket.socket) -> None:
    """From now on closing it is a reset, also by the kernel when this process is killed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def end_on_close(sock: trio.socket.SocketType | socket.socket) -> None:
    """The conversation is over in order: closing it delivers what was sent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_CLEANLY)


class TlsHalves(trio.abc.HalfCloseableStream):
    """TLS whose two ways end one by one. One task may send while another receives. `aclose` says nothing: the end is `send_eof`."""

    def __init__(self, sock: TlsSocket) -> None:
        self.socket = sock
        self._buffer = memoryview(bytearray(_BLOCK_BYTES))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At most 64 KiB; `b""` after the peer's close_notify.

        Raises:
            trio.BrokenResourceError: the connection broke, or ended without close_notify.
        """
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return bytes(self._buffer[: self.socket.recv_into(self._buffer, min(max_bytes or _BLOCK_BYTES, _BLOCK_BYTES))])
            except BlockingIOError:
                await self._wait(for_write=self.socket.read_awaits_write)
            except OSError as exc:
                raise trio.BrokenResourceError(f"the connection broke: {exc.strerror or exc}") from exc

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it; cancelled, the stream can send nothing more.

        Raises:
            trio.BrokenResourceError: the connection broke.
        """
        await trio.lowlevel.checkpoint()
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                try:
                    sent += self.socket.send(view[sent:])
                except BlockingIOError:
                    await self._wait(for_write=not self.socket.write_awaits_read)
                except OSError as exc:
                    raise trio.BrokenResourceError(f"the connection broke: {exc.strerror or exc}") from exc

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes bytes again."""
        await self._wait(for_write=True)

    async def send_eof(self) -> None:
        """close_notify and FIN; what the peer still says can be read.

        Raises:
            trio.BrokenResourceError: the connection broke.
        """
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.socket.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                await self._wait(for_write=True)
            except OSError as exc:
                raise trio.BrokenResourceError(f"the connection broke: {exc.strerror or exc}") from exc

    async def aclose(self) -> None:
        """Close, without a word of TLS."""
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()

    async def _wait(self, *, for_write: bool) -> None:
        await (trio.lowlevel.wait_writable if for_write else trio.lowlevel.wait_readable)(self.socket)


async def carry(source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream) -> None:
    """Bytes one way, and then its end.

    Raises:
        trio.BrokenResourceError: one of them broke.
    """
    async for block in source:
        await sink.send_all(block)
    await sink.send_eof()


async def join(one: trio.abc.HalfCloseableStream, other: trio.abc.HalfCloseableStream) -> None:
    """Bytes both ways, until both have ended; an end is passed on at once, and the other way goes on.

    Raises:
        trio.BrokenResourceError: one of them broke; neither has been ended by this.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, one, other)
        await carry(other, one)
