"""Pump: the clients of a door until it is clear what they want: TLS termination, their first bytes, and answers to those turned away."""

import logging
import socket
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fxgateway.doors.client import Client
from fxgateway.doors.recorded import RECORDED, RecordedClient
from fxgateway.doors.securing import Securing
from fxgateway.doors.visitor import HelloVisitor, SecureVisitor, Visitor
from fxgateway.doors.web_client import TlsWebClient, WebClient, error_words
from fxgateway.routing.reception import STREAM_PROTOCOL, Kind, Lead, Receptionist, TurnAway
from fxtunnel.engine.farewell import Farewell
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
MAX_FAREWELLS: Final = 512
"""Clients of one door that may be reading why they were turned away, at the same time; any more get a RST."""


class Hall:
    """Belongs to one door. Everyone in it has been admitted, and counts as a connection of their source."""

    def __init__(self, door: "Door") -> None:
        self.door = door
        self.visitors: dict[Visitor | Securing, float] = {}
        self._farewells = 0
        self._is_turning_away = False

    def hear(self, sock: socket.socket, address: str, named: str, receptionist: Receptionist) -> None:
        """Take in an admitted client. `named` is its ip:port, from accept or from a PROXY header."""
        context = self.door.config.tls
        visitor: Visitor | Securing
        if context is not None:
            visitor = Securing(self, sock, address, named, context)
        elif receptionist.kind is Kind.SNI:
            # Under load the hello has arrived already: then there is no need to wait for it, nor to read it twice.
            try:
                said = sock.recv(EARLY_BYTES)
            except OSError:  # nothing yet, or a reset, which the visitor will notice
                said = b""
            found = receptionist.receive(said)
            if isinstance(found, Lead):
                self._let_in(sock, address, named, found, said)
                return
            visitor = HelloVisitor(self, sock, address, named, receptionist, said)
            if isinstance(found, TurnAway):
                visitor.turn_away(found)
                return
        else:
            visitor = Visitor(self, sock, address, named, receptionist)
        self.visitors[visitor] = self.door.reactor.now
        visitor.start()

    def secured(self, securing: Securing, sock: TlsSocket) -> None:
        """A client's TLS handshake is done."""
        self.visitors.pop(securing, None)
        receptionist = self.door.config.receptionist
        if receptionist is None:  # a reload has changed the door's kind
            self.door.left(securing.address)
            abort(sock)
            return
        visitor = SecureVisitor(self, sock, securing.address, securing.named, receptionist)
        self.visitors[visitor] = self.door.reactor.now
        visitor.start()

    def not_secured(self, securing: Securing, reason: str, text: str) -> None:
        """A client's TLS handshake has failed; its socket is closed."""
        self.visitors.pop(securing, None)
        self.door.left(securing.address)
        self.door.refused(reason)
        logger.info("door %s: no TLS with %s: %s", self.door.name, securing.address, text)

    def visitor_led(self, visitor: Visitor, lead: Lead, said: bytes = b"") -> None:
        """It is clear where a connection goes. `said` has already been read from its socket."""
        self.visitors.pop(visitor, None)
        self._let_in(visitor.sock, visitor.address, visitor.named, lead, said)

    def _let_in(self, sock: socket.socket, address: str, named: str, lead: Lead, said: bytes) -> None:
        door = self.door
        trace = next(door.traces)
        client: Client
        if lead.head is None:
            plain = Client if door.config.access is None else RecordedClient
            tags = encode_tag(TAG_TRACE, trace) + _led_tags(lead.service, door.name, lead.host, lead.scheme)
            client = plain(door, sock, address, lead.service, tags)
            client.trace = trace
        else:
            opening = Opening(
                lead.service,
                door=door.name,
                trace=trace,
                host=lead.host,
                scheme=lead.scheme,
                node=lead.node,
                ticket=lead.ticket,
            )
            kind = TlsWebClient if isinstance(sock, TlsSocket) else WebClient
            client = (kind if door.config.access is None else RECORDED[kind])(door, sock, address, lead, opening)
        client.named = named
        if not said or len(said) == EARLY_BYTES:
            client.has_spoken()
        door.let_in(client, named or client.peer(), lead, said)

    def visitor_turned_away(self, visitor: Visitor, away: TurnAway) -> None:
        """A connection leads nowhere: answer it, as far as it speaks HTTP or TLS, and close its socket, which the hall owns again."""
        self.visitors.pop(visitor, None)
        self.door.left(visitor.address)
        self.door.refused(away.reason)
        if away.status:
            trace = next(self.door.traces)
            logger.info("door %s: %d for %s: %s (trace %s)", self.door.name, away.status, visitor.address, away.text, trace)
            # RFC 9110, 15.5.22: a 426 has to name the protocol in Upgrade.
            fields = (f"Upgrade: {STREAM_PROTOCOL}\r\n".encode(),) if away.status == 426 else ()
            name = NAMES.get(away.status) or "".join(map(str.capitalize, away.reason.split("-")))
            refusal = Refused(away.status, name, f"{away.text[:1].upper()}{away.text[1:]}.", fields=fields)
            self.say_farewell(visitor.sock, error_words(refusal, trace, away.accept))
        elif away.farewell:
            self.say_farewell(visitor.sock, away.farewell)
        else:
            abort(visitor.sock)

    def say_farewell(self, sock: socket.socket, words: bytes) -> None:
        """Send these last words and close the socket; RST at once if MAX_FAREWELLS are under way."""
        if self._farewells >= MAX_FAREWELLS:
            abort(sock)
            return
        self._farewells += 1
        Farewell(self.door.reactor, sock, words, self._farewell_over)

    def _farewell_over(self) -> None:
        self._farewells -= 1

    def turn_away_late(self, oldest: float) -> None:
        """Turn away those who came before `oldest` (reactor time): a few now, the others soon, since each takes a while."""
        if not self._is_turning_away:
            self._turn_some_away(oldest)

    def _turn_some_away(self, oldest: float) -> None:
        late = overdue(self.visitors, oldest, LATE_AT_ONCE + 1)
        self._is_turning_away = len(late) > LATE_AT_ONCE
        if self._is_turning_away:
            self.door.reactor.call_later(LATE_PAUSE_S, lambda: self._turn_some_away(oldest))
        for visitor in late[:LATE_AT_ONCE]:
            visitor.turn_away(TurnAway("first-words-timeout", "it did not say in time what it wants", visitor.timeout_status))

    def close(self) -> None:
        """The door is closed: turn everyone away."""
        for visitor in list(self.visitors):
            visitor.turn_away(TurnAway("closed", "the door is closed"))


@lru_cache(maxsize=1_024)
def _led_tags(service: ServiceName, door: str, host: str, scheme: str) -> bytes:
    return encode_tags(Opening(service, door=door, host=host, scheme=scheme))
