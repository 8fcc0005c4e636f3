"""Pump: the clients of a door until it is clear what they want: TLS termination, their first bytes, and answers to those turned away."""

import logging
import socket
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fxgateway.doors.client import Client
from fxgateway.doors.client_handshake import ClientHandshake
from fxgateway.doors.preread import HelloPreread, Preread, TlsPreread
from fxgateway.doors.recorded import RECORDED, RecordedClient
from fxgateway.doors.web_client import TlsWebClient, WebClient, error_answer
from fxgateway.routing.preread_router import STREAM_PROTOCOL, Destination, DoorKind, PrereadRouter, TurnAway
from fxtunnel.engine.lingering_close import LingeringClose
from fxtunnel.engine.overdue import overdue
from fxtunnel.engine.splice import abort
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.kit.answers import NAMES, Refused
from fxtunnel.model import ServiceName
from fxtunnel.protocol.frames import EARLY_BYTES
from fxtunnel.protocol.opening import TAG_TRACE, Opening, encode_tag, encode_tags

if TYPE_CHECKING:
    from fxgateway.doors.door import Door

logger = logging.getLogger(__name__)

LATE_AT_ONCE: Final = 2
"""Clients whose time is up that are turned away in one turn of the loop: an answer takes 0.2 to 0.4 ms."""
LATE_PAUSE_S: Final = 0.002
"""How long the loop then has for others."""
MAX_LINGERING: Final = 512
"""Clients of one door that may be reading why they were turned away, at the same time; any more get a RST."""


class PendingClients:
    """Belongs to one door. Everyone in it has been admitted, and counts as a connection of their source."""

    def __init__(self, door: "Door") -> None:
        self.door = door
        self.clients: dict[Preread | ClientHandshake, float] = {}
        self._lingering = 0
        self._is_turning_away = False

    def take(self, sock: socket.socket, address: str, named: str, router: PrereadRouter) -> None:
        """Take in an admitted client. `named` is its ip:port, from accept or from a PROXY header."""
        context = self.door.config.tls
        preread: Preread | ClientHandshake
        if context is not None:
            preread = ClientHandshake(self, sock, address, named, context)
        elif router.kind is DoorKind.SNI:
            # Under load the hello has arrived already: then there is no need to wait for it, nor to read it twice.
            try:
                said = sock.recv(EARLY_BYTES)
            except OSError:  # nothing yet, or a reset, which the preread will notice
                said = b""
            found = router.receive(said)
            if isinstance(found, Destination):
                self._let_in(sock, address, named, found, said)
                return
            preread = HelloPreread(self, sock, address, named, router, said)
            if isinstance(found, TurnAway):
                preread.turn_away(found)
                return
        else:
            preread = Preread(self, sock, address, named, router)
        self.clients[preread] = self.door.reactor.now
        preread.start()

    def handshake_done(self, handshake: ClientHandshake, sock: TlsSocket) -> None:
        """A client's TLS handshake is done."""
        self.clients.pop(handshake, None)
        router = self.door.config.preread_router
        if router is None:  # a reload has changed the door's kind
            self.door.left(handshake.address)
            abort(sock)
            return
        preread = TlsPreread(self, sock, handshake.address, handshake.named, router)
        self.clients[preread] = self.door.reactor.now
        preread.start()

    def handshake_failed(self, handshake: ClientHandshake, reason: str, text: str) -> None:
        """A client's TLS handshake has failed; its socket is closed."""
        self.clients.pop(handshake, None)
        self.door.left(handshake.address)
        self.door.refused(reason)
        logger.info("door %s: no TLS with %s: %s", self.door.name, handshake.address, text)

    def preread_routed(self, preread: Preread, destination: Destination, said: bytes = b"") -> None:
        """It is clear where a connection goes. `said` has already been read from its socket."""
        self.clients.pop(preread, None)
        self._let_in(preread.sock, preread.address, preread.named, destination, said)

    def _let_in(self, sock: socket.socket, address: str, named: str, destination: Destination, said: bytes) -> None:
        door = self.door
        trace = next(door.traces)
        client: Client
        if destination.head is None:
            plain = Client if door.config.access is None else RecordedClient
            shared = _destination_tags(destination.service, door.listen_address, destination.host, destination.scheme)
            client = plain(door, sock, address, destination.service, encode_tag(TAG_TRACE, trace) + shared)
            client.trace = trace
        else:
            opening = Opening(
                destination.service,
                door=door.listen_address,
                trace=trace,
                host=destination.host,
                scheme=destination.scheme,
                node=destination.node,
                ticket=destination.ticket,
            )
            kind = TlsWebClient if isinstance(sock, TlsSocket) else WebClient
            client = (kind if door.config.access is None else RECORDED[kind])(door, sock, address, destination, opening)
        client.named = named
        if not said or len(said) == EARLY_BYTES:
            client.has_spoken()
        door.let_in(client, named or client.peer(), destination, said)

    def preread_turned_away(self, preread: Preread, away: TurnAway) -> None:
        """A connection leads nowhere: answer it, as far as it speaks HTTP or TLS, and close its socket, which the caller owns again."""
        self.clients.pop(preread, None)
        self.door.left(preread.address)
        self.door.refused(away.reason)
        if away.status:
            trace = next(self.door.traces)
            logger.info("door %s: %d for %s: %s (trace %s)", self.door.name, away.status, preread.address, away.text, trace)
            # RFC 9110, 15.5.22: a 426 has to name the protocol in Upgrade.
            fields = (f"Upgrade: {STREAM_PROTOCOL}\r\n".encode(),) if away.status == 426 else ()
            name = NAMES.get(away.status) or "".join(map(str.capitalize, away.reason.split("-")))
            refusal = Refused(away.status, name, f"{away.text[:1].upper()}{away.text[1:]}.", fields=fields)
            self.close_with(preread.sock, error_answer(refusal, trace, away.accept))
        elif away.last_bytes:
            self.close_with(preread.sock, away.last_bytes)
        else:
            abort(preread.sock)

    def close_with(self, sock: socket.socket, words: bytes) -> None:
        """Send these last words and close the socket; RST at once if MAX_LINGERING are under way."""
        if self._lingering >= MAX_LINGERING:
            abort(sock)
            return
        self._lingering += 1
        LingeringClose(self.door.reactor, sock, words, self._linger_over)

    def _linger_over(self) -> None:
        self._lingering -= 1

    def turn_away_late(self, oldest: float) -> None:
        """Turn away those who came before `oldest` (reactor time): a few now, the others soon, since each takes a while."""
        if not self._is_turning_away:
            self._turn_some_away(oldest)

    def _turn_some_away(self, oldest: float) -> None:
        late = overdue(self.clients, oldest, LATE_AT_ONCE + 1)
        self._is_turning_away = len(late) > LATE_AT_ONCE
        if self._is_turning_away:
            self.door.reactor.call_later(LATE_PAUSE_S, lambda: self._turn_some_away(oldest))
        for preread in late[:LATE_AT_ONCE]:
            preread.turn_away(TurnAway("first-words-timeout", "it did not say in time what it wants", preread.timeout_status))

    def close(self) -> None:
        """The door is closed: turn everyone away."""
        for preread in list(self.clients):
            preread.turn_away(TurnAway("closed", "the door is closed"))


@lru_cache(maxsize=1_024)
def _destination_tags(service: ServiceName, door: str, host: str, scheme: str) -> bytes:
    return encode_tags(Opening(service, door=door, host=host, scheme=scheme))
