"""Pump: a client that speaks HTTP. If it is turned away before a service has answered, it gets an HTTP error that says why."""

import logging
import socket
from dataclasses import dataclass
from random import uniform
from typing import TYPE_CHECKING, Final

from fxgateway.doors.client import Client
from fxgateway.routing.preread_router import Destination
from fxtunnel.codes import Code
from fxtunnel.engine.tls_splice import TlsSplice
from fxtunnel.kit.answers import Refused, render
from fxtunnel.protocol.opening import TAG_TICKET, TAG_TRACE, Opening, encode_tag, encode_tags

if TYPE_CHECKING:
    from fxgateway.doors.door import Door

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = (1.0, 10.0)
"""Retry-After of a 503, chosen at random, so that the clients of a service do not all come back at once."""
_UNREACHED: Final = Refused(502, "NotReached", "The service cannot be reached at the moment.")
_TOO_LATE: Final = Refused(504, "TooLate", "The service did not answer in time.")
_BY_CODE: Final = {
    Code.CONNECT_FAILED: _UNREACHED,
    Code.CONNECT_TIMEOUT: _TOO_LATE,
    Code.CANCELLED: _TOO_LATE,
    Code.BAD_TICKET: Refused(401, "BadTicket", "This needs a fresh ticket that is meant for it; tickets are good for one connection."),
    Code.FORBIDDEN: Refused(403, "Forbidden", "You may not have this."),
    Code.OVER_LIMIT: Refused(429, "TooMany", "You have too many connections to this service.", retry_after_s=5),
}


@dataclass(frozen=True, slots=True)
class Words:
    """What is still to be sent: `instead` goes to the service in place of the request's head, `greeting` to the client once the service is
    reached. `is_greeted`: the greeting has been sent, and the client no longer speaks HTTP. `accept` is its Accept header.
    """

    accept: bytes
    instead: bytes
    greeting: bytes
    is_greeted: bool = False


class WebClient(Client):
    """A client whose first request has been peeked at. `destination.instead`, if given, is sent in place of the request's head."""

    __slots__ = ("_accept", "_greeting", "_instead", "_is_greeted", "_refusal")

    def __init__(self, door: "Door", sock: socket.socket, address: str, destination: Destination, opening: Opening) -> None:
        own = encode_tag(TAG_TRACE, opening.trace) + (encode_tag(TAG_TICKET, opening.ticket) if opening.ticket else b"")
        super().__init__(door, sock, address, opening.service, own + encode_tags(opening._replace(trace="", ticket="")))
        head = destination.head
        self.trace = opening.trace
        self._accept = head.accept if head is not None else b""
        self._instead = destination.instead or b""
        self._greeting = destination.greeting
        self._is_greeted = False
        self._refusal = Refused(
            503,
            "NoRelay",
            "The service is not available at the moment.",
            retry_after_s=uniform(*RETRY_AFTER_S),  # noqa: S311 - spreads load
        )
        if destination.instead is not None and head is not None:
            sock.recv_into(bytearray(len(head.raw)))  # the whole head has been peeked at, so it is there
            self._readable = True

    @property
    def words(self) -> Words:
        """See `Words`: for a client that moves to another process."""
        return Words(self._accept, self._instead, self._greeting, self._is_greeted)

    @words.setter
    def words(self, words: Words) -> None:
        self._accept, self._instead = words.accept, words.instead
        self._greeting, self._is_greeted = words.greeting, words.is_greeted
        self._readable = bool(words.instead)

    def read_turn(self, limit_bytes: int) -> int:
        """See `Splice`."""
        instead, stream, session = self._instead, self.stream, self.session
        if not instead or stream is None or session is None or stream.closed:
            return super().read_turn(limit_bytes)
        self._queued = False
        count = min(limit_bytes, stream.send_credit, len(instead))
        if count <= 0:
            return 0
        slot = session.mux.ring.slot(count)
        count = min(count, len(slot))
        slot[:count] = instead[:count]
        stream.sent(slot, count)
        self._instead = instead[count:]
        self._queue_read()
        return count

    def on_accept(self) -> None:
        """See `Endpoint`."""
        super().on_accept()
        if self._greeting and not self.closed:
            try:
                said = self.sock.send(self._greeting) == len(self._greeting)
            except OSError:
                said = False
            self._greeting, self._is_greeted = b"", True
            if not said:
                self.fail(Code.PEER_RESET)

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        self._refusal = _BY_CODE.get(code, self._refusal)
        super().on_refuse(code, text)

    def open_timed_out(self) -> None:
        """See `Client`."""
        self._refusal = _TOO_LATE
        super().open_timed_out()

    def end_unanswered(self) -> None:
        """See `Client`. Not with a 503, which would have it sent again."""
        self._refusal = _TOO_LATE
        super().end_unanswered()

    def turn_away(self, reason: str) -> None:
        """See `Client`."""
        stream = self.stream
        if self.closed or self._is_greeted or (stream is not None and (stream.accepted or stream.bytes_in)):
            super().turn_away(reason)
            return
        logger.info("door %s: %d for %s: %s (trace %s)", self.door.name, self._refusal.status, self.address, reason, self.trace)
        self.door.refused(reason)
        self.closed = True
        self.reactor.unregister(self.sock)  # the lingering close takes the socket over
        self.door.pending.close_with(self.sock, error_answer(self._refusal, self.trace, self._accept))
        self.released()


class TlsWebClient(TlsSplice, WebClient):
    """A `WebClient` whose TLS is terminated here."""

    __slots__ = ()


def error_answer(refusal: Refused, trace: str, accept: bytes) -> bytes:
    """The whole HTTP answer to a client that is turned away; the connection is closed after it."""
    answer = render(refusal, trace, accept)
    return answer.head + b"Connection: close\r\n\r\n" + answer.body
