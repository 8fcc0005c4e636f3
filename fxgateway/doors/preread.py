"""Pump: a connection that has not said yet where it wants to go. Its first bytes are peeked at, and stay in the socket for later."""

import socket
from typing import TYPE_CHECKING

from fxgateway.routing.preread_router import MAX_FIRST_BYTES, Destination, DoorKind, NeedBytes, PrereadRouter, TurnAway
from fxtunnel.engine.reactor import ERROR, HANGUP, STREAM_EVENTS, Timer
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.protocol.frames import EARLY_BYTES

if TYPE_CHECKING:
    from fxgateway.doors.pending_clients import PendingClients


class Preread:
    """Owns the socket until it calls `PendingClients.preread_routed` or `preread_turned_away`, once. The owner ends it if it is slow.

    `named` is the client's ip:port, from accept or a PROXY header; empty for a unix socket.
    """

    __slots__ = ("_router", "_silence", "_wanted_bytes", "address", "door", "is_over", "named", "pending", "sock")

    def __init__(self, pending: "PendingClients", sock: socket.socket, address: str, named: str, router: PrereadRouter) -> None:
        self.pending = pending
        self.door = pending.door
        self.sock = sock
        self.address = address
        self.named = named
        self.is_over = False
        self._router = router
        self._wanted_bytes = 1
        self._silence: Timer | None = None

    def start(self) -> None:
        """Begin. If the client's first bytes are there already, as under load they are, it is led on without waiting for an event."""
        self.on_event(0)
        if self.is_over:
            return
        self.door.reactor.register(self.sock, self, STREAM_EVENTS)
        router = self._router
        if router.kind is DoorKind.AUTO and router.default is not None:
            self._silence = self.door.reactor.call_later(self.door.config.sniff_s, self._on_silence)

    def on_event(self, events: int) -> None:
        """From the reactor."""
        try:
            data = self._peek()
        except BlockingIOError:
            return
        except OSError:
            self.turn_away(TurnAway("gone", "the connection was reset"))
            return
        if len(data) >= self._wanted_bytes:
            match self._router.receive(data):
                case NeedBytes(at_least_bytes):
                    self._wanted_bytes = at_least_bytes
                    if at_least_bytes > MAX_FIRST_BYTES:
                        self.turn_away(TurnAway("first-words-too-long", "too much is said before it is clear what is wanted"))
                case Destination() as destination:
                    self._route(destination)
                case TurnAway() as away:
                    self.turn_away(away)
        if events & (HANGUP | ERROR) and not self.is_over:
            self.turn_away(TurnAway("gone", "the client left before it was clear what it wants"))

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; this connection ends, nothing else does."""
        self.turn_away(TurnAway("internal-error", "internal error"))

    @property
    def timeout_status(self) -> int:
        """The HTTP status to answer with when it takes too long; 0 where the client may not speak HTTP at all."""
        return 408 if self._router.kind in (DoorKind.HTTP, DoorKind.HTTPS) else 0

    def turn_away(self, away: TurnAway) -> None:
        """End it; the owner answers the client. Does nothing once it is over."""
        if not self.is_over:
            self._end()
            self.pending.preread_turned_away(self, away)

    def _route(self, destination: Destination) -> None:
        self._end()
        self.pending.preread_routed(self, destination)

    def _end(self) -> None:
        self.is_over = True
        self.door.reactor.unregister(self.sock)
        if self._silence is not None:
            self._silence.cancel()

    def _on_silence(self) -> None:
        """The client waits for the server to speak first: give it the default service."""
        try:
            said = bool(self._peek())
        except OSError:
            said = False
        if not said and not self.is_over and self._router.default is not None:
            self._route(Destination(self._router.default))

    def _peek(self) -> bytes:
        return self.sock.recv(MAX_FIRST_BYTES, socket.MSG_PEEK)


class HelloPreread(Preread):
    """One whose ClientHello is still incomplete. The bytes `said` so far have been read, and will go with the OPEN."""

    __slots__ = ("_said",)

    def __init__(
        self, pending: "PendingClients", sock: socket.socket, address: str, named: str, router: PrereadRouter, said: bytes
    ) -> None:
        super().__init__(pending, sock, address, named, router)
        self._said = said

    def start(self) -> None:
        """See `Preread`. Bytes that have arrived meanwhile cause an event."""
        self.door.reactor.register(self.sock, self, STREAM_EVENTS)

    def _route(self, destination: Destination) -> None:
        self._end()
        self.pending.preread_routed(self, destination, self._said)

    def _peek(self) -> bytes:
        room = EARLY_BYTES - len(self._said)
        if room:
            self._said += self.sock.recv(room)
        if len(self._said) < EARLY_BYTES:
            return self._said
        try:
            return self._said + super()._peek()
        except BlockingIOError:
            return self._said


class TlsPreread(Preread):
    """One whose TLS is terminated here: decrypted bytes have left the kernel and wait in the TlsSocket."""

    __slots__ = ()

    sock: TlsSocket

    def start(self) -> None:
        """See `Preread`."""
        super().start()
        if not self.is_over:
            self.door.reactor.again(self)  # the first request may have come with the end of the handshake, in part

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self.is_over:
            return  # both an event and `again` came in this turn
        super().on_event(events)
        if not self.is_over and self.sock.at_end:
            self.turn_away(TurnAway("gone", "the client left before it was clear what it wants"))

    def _peek(self) -> bytes:
        data = self.sock.peek(MAX_FIRST_BYTES)
        if self.sock.has_more:
            self.door.reactor.again(self)
        if not data and not self.sock.at_end:
            raise BlockingIOError
        return data
