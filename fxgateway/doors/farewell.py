"""Pump: the last words to a client that is turned away, and a close that lets it read them."""

import socket
from collections.abc import Callable
from typing import Final

from fxtunnel.engine.reactor import STREAM_EVENTS, Reactor, Timer
from fxtunnel.engine.splice import CLOSE_CLEANLY, abort

FAREWELL_S: Final = 2.0
"""What a client still sends is read for so long: closing a socket with unread bytes is a RST, which would take the words away again
(RFC 9112, 9.6)."""
MAX_READ_BYTES: Final = 262_144
_BLOCK_BYTES: Final = 16_384


class Farewell:
    """Owns the socket from now on, and calls `ended` once. `words` must fit into the socket's buffer: otherwise there is a RST instead."""

    __slots__ = ("_ended", "_left_bytes", "_reactor", "_sock", "_timer")

    def __init__(self, reactor: Reactor, sock: socket.socket, words: bytes, ended: Callable[[], None]) -> None:
        self._reactor = reactor
        self._sock = sock
        self._ended = ended
        self._left_bytes = MAX_READ_BYTES
        self._timer: Timer | None = None
        try:
            said = sock.send(words) == len(words)
            if said:
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            said = False
        if not said:
            abort(sock)
            ended()
            return
        self._timer = reactor.call_later(FAREWELL_S, self._end)
        reactor.register(sock, self, STREAM_EVENTS)

    def on_event(self, events: int) -> None:
        """From the reactor: what the client still says is read and forgotten."""
        buffer = self._reactor.read_buffer[:_BLOCK_BYTES]
        try:
            while self._left_bytes > 0:
                count = self._sock.recv_into(buffer)
                if not count:
                    break
                self._left_bytes -= count
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end()

    def on_crash(self) -> None:
        """From the reactor: a bug of ours."""
        self._end()

    def _end(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._reactor.forget(self._sock)
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_CLEANLY)
            finally:
                self._sock.close()
                self._ended()
