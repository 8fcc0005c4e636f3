"""Pump: a client of a door that ends TLS, until its handshake is done."""

import socket
import ssl
from typing import TYPE_CHECKING, Final

from fxgateway.routing.reception import TurnAway
from fxtunnel.engine.tls_handshake import Handshake
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.kit.sources import source_of

if TYPE_CHECKING:
    from fxgateway.doors.hall import Hall

_ADVICE: Final = b"This port expects https://.\r\n"
PLAIN_HTTP: Final = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
    len(_ADVICE),
    _ADVICE,
)


class Securing:
    """Implements `SecureOwner`. Calls the hall's `secured` or `not_secured`, once; the hall may end it with `turn_away`."""

    __slots__ = ("_handshake", "_turned_away", "address", "door", "hall", "named")

    timeout_status: Final = 0

    def __init__(self, hall: "Hall", sock: socket.socket, address: str, named: str, context: ssl.SSLContext) -> None:
        self.hall = hall
        self.door = hall.door
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
        self.hall.secured(self, sock)

    def on_failed(self, handshake: Handshake, reason: str) -> None:
        """See `SecureOwner`."""
        self.hall.not_secured(self, self._turned_away or "tls-failed", reason)
