"""Pump: one question to a script process that is warm, asked and answered in the reactor's thread: no task, no worker thread."""

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from fxrelay.balance.answers import Answer
from fxrelay.balance.worker_main import LENGTH, MAX_ANSWER_BYTES

if TYPE_CHECKING:
    from fxtunnel.engine.reactor import Reactor

LATE: Final = "late"
ENDED: Final = "ended"
GARBAGE: Final = "garbage"
_BLOCK_BYTES: Final = 65_536
Then = Callable[[Answer | str], None]


class ScriptCall:
    """Implements `Handler`. `then` is called once, later, with the answer or with what came instead: LATE, ENDED or GARBAGE; the process is
    of no use after one of those. `abandon`: it is not called any more.
    """

    __slots__ = ("_channel", "_reactor", "_received", "_then", "_timer", "_unsent")

    def __init__(self, reactor: "Reactor", channel: socket.socket, request: bytes, timeout_s: float, then: Then) -> None:
        self._reactor = reactor
        self._channel = channel
        self._unsent = memoryview(request)
        self._received = bytearray()
        self._then: Then | None = then
        channel.setblocking(False)
        self._send()
        reactor.register(channel, self)
        self._timer = reactor.call_later(timeout_s, self._late)

    def abandon(self) -> None:
        """Nobody wants to know any more. The process still works on it. May be repeated."""
        if self._then is not None:
            self._then = None
            self._timer.cancel()
            self._reactor.unregister(self._channel)

    def on_event(self, events: int) -> None:
        """See `Handler`."""
        if self._then is None:
            return
        if self._unsent:
            self._send()
        try:
            while not self._is_whole():
                block = self._channel.recv(_BLOCK_BYTES)
                if not block:
                    self._end(ENDED)
                    return
                self._received += block
        except BlockingIOError:
            return
        except OSError:
            self._end(ENDED)
            return
        self._end(self._answer())

    def on_crash(self) -> None:
        """See `Handler`."""
        self._end(GARBAGE)

    def _send(self) -> None:
        with suppress(OSError):  # a channel that is broken is heard of by reading
            while self._unsent:
                self._unsent = self._unsent[self._channel.send(self._unsent) :]

    def _is_whole(self) -> bool:
        received = self._received
        if len(received) < LENGTH.size:
            return False
        length: int = LENGTH.unpack_from(received)[0]
        return len(received) >= LENGTH.size + length or length > MAX_ANSWER_BYTES

    def _answer(self) -> Answer | str:
        (length,) = LENGTH.unpack_from(self._received)
        if self._unsent or len(self._received) != LENGTH.size + length:
            return GARBAGE
        try:
            answer = json.loads(self._received[LENGTH.size :])
        except ValueError:
            return GARBAGE
        return answer if isinstance(answer, dict) else GARBAGE

    def _late(self) -> None:
        self._end(LATE)

    def _end(self, answer: Answer | str) -> None:
        then = self._then
        self.abandon()
        if then is not None:
            then(answer)
