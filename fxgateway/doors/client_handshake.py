"""Pump: a client of a door that ends TLS, until its handshake is done."""

import socket
import ssl
from typing import TYPE_CHECKING, Final

from fxgateway.routing.preread_router import TurnAway
from fxtunnel.engine.tls_handshake import Handshake
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.kit.sources import source_of

if TYPE_CHECKING:
    from fxgateway.doors.pending_clients import PendingClients

_ADVICE: Final = b"This port expects https://.\r\n"
PLAIN_HTTP: Final = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
    len(_ADVICE),
    _ADVICE,
)


class ClientHandshake:
    """Implements `SecureOwner`. Calls `PendingClients.handshake_done` or `handshake_failed`, once; `turn_away` ends it."""

    __slots__ = ("_handshake", "_turned_away", "address", "door", "named", "pending")

    timeout_status: Final = 0

    def __init__(self, pending: "PendingClients", sock: socket.socket, address: str, named: str, context: ssl.SSLContext) -> None:
        self.pending = pending
        self.door = pending.door
        self.address = address
        self.named = named
        self._turned_away = ""
        self._handshake = Handshake(self.door.reactor, sock, context, self, source=source_of(address), http_answer=PLAIN_HTTP)

    def start(self) -> None:
        """Begin the handshake."""
        self._handshake.start()

    def turn_away(self, away: TurnAway) -> None:
        """It took too long, or the door closes."""
        self._turned_away = away.reason
        self._handshake.fail(away.text)

    def on_secure(self, handshake: Handshake, sock: TlsSocket) -> None:
        """See `SecureOwner`."""
        self.pending.handshake_done(self, sock)

    def on_failed(self, handshake: Handshake, reason: str) -> None:
        """See `SecureOwner`."""
        self.pending.handshake_failed(self, self._turned_away or "tls-failed", reason)
