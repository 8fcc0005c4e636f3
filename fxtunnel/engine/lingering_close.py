"""Pump: a close that lingers, so that a client that is turned away can read the last bytes sent to it."""

import socket
from collections.abc import Callable
from typing import Final

from fxtunnel.engine.reactor import STREAM_EVENTS, Reactor, Timer
from fxtunnel.engine.splice import CLOSE_CLEANLY, abort

LINGER_S: Final = 2.0
"""What a client still sends is read for so long: closing a socket with unread bytes is a RST, which would take the words away again
(RFC 9112, 9.6)."""
MAX_READ_BYTES: Final = 262_144
"""A client that goes on sending after this much gets its RST."""
_BLOCK_BYTES: Final = 16_384


class LingeringClose:
    """Owns the socket, which is not registered, from now on, and calls `ended` once, when it is closed; maybe at once.

    `words` must fit into the socket's buffer: otherwise there is a RST instead. They may be empty: whatever is to be read was sent before.
    A client that does not close in time, or does not stop talking, gets a RST.
    """

    __slots__ = ("_ended", "_left_bytes", "_reactor", "_sock", "_timer")

    def __init__(self, reactor: Reactor, sock: socket.socket, words: bytes, ended: Callable[[], None]) -> None:
        self._reactor = reactor
        self._sock = sock
        self._ended = ended
        self._left_bytes = MAX_READ_BYTES
        self._timer: Timer | None = None
        try:
            said = not words or sock.send(words) == len(words)
            if said:
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            said = False
        if not said:
            abort(sock)
            ended()
            return
        self._timer = reactor.call_later(LINGER_S, self.cut_short)
        reactor.register(sock, self, STREAM_EVENTS)

    def on_event(self, events: int) -> None:
        """From the reactor: what the client still says is read and forgotten."""
        buffer = self._reactor.read_buffer[:_BLOCK_BYTES]
        try:
            while self._left_bytes > 0:
                count = self._sock.recv_into(buffer)
                if not count:
                    self._end(_close)
                    return
                self._left_bytes -= count
        except BlockingIOError:
            return
        except OSError:
            pass
        self.cut_short()

    def on_crash(self) -> None:
        """From the reactor: a bug of ours."""
        self.cut_short()

    def cut_short(self) -> None:
        """RST now. Does nothing once it is over."""
        self._end(abort)

    def _end(self, close: Callable[[socket.socket], None]) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._reactor.forget(self._sock)
            try:
                close(self._sock)
            finally:
                self._ended()


def _close(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_CLEANLY)
    finally:
        sock.close()
