"""Pump: where the clients of a door are until it is clear what they want: TLS that ends here, first words, last words."""

import logging
import socket
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar

from fxgateway.doors.client import Client
from fxgateway.doors.farewell import Farewell
from fxgateway.doors.recorded import RECORDED, RecordedClient
from fxgateway.doors.securing import Securing
from fxgateway.doors.visitor import SecureVisitor, Visitor
from fxgateway.doors.web_client import TlsWebClient, WebClient, error_words
from fxgateway.routing.reception import Lead, Receptionist, TurnAway
from fxtunnel.engine.splice import abort
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.kit.answers import Refused
from fxtunnel.model import ServiceName
from fxtunnel.protocol.opening import TAG_TRACE, Opening, encode_tag, encode_tags

if TYPE_CHECKING:
    from fxgateway.doors.door import Door

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FAREWELLS: Final = 512
"""Clients of one door that may be told at once why they are turned away; the others get a RST."""


class Hall:
    """Belongs to one door. Everyone in it has been admitted, and counts as a connection of his source."""

    def __init__(self, door: "Door") -> None:
        self.door = door
        self.visitors: dict[Visitor | Securing, float] = {}
        self._farewells = 0

    def hear(self, sock: socket.socket, address: str, named: str, receptionist: Receptionist) -> None:
        """Take in an admitted client. `named` is its ip:port, whoever told it."""
        context = self.door.config.tls
        visitor = Visitor(self, sock, address, named, receptionist) if context is None else Securing(self, sock, address, named, context)
        self.visitors[visitor] = self.door.reactor.now
        visitor.start()

    def secured(self, securing: Securing, sock: TlsSocket) -> None:
        """A client's TLS handshake is done."""
        self.visitors.pop(securing, None)
        receptionist = self.door.config.receptionist
        if receptionist is None:  # the door has become another one
            self.door.admission.release(securing.admitted_by, securing.address)
            abort(sock)
            return
        visitor = SecureVisitor(self, sock, securing.address, securing.named, receptionist)
        self.visitors[visitor] = self.door.reactor.now
        visitor.start()

    def not_secured(self, securing: Securing, reason: str, text: str) -> None:
        """A client's TLS handshake has failed; its socket is closed."""
        self.visitors.pop(securing, None)
        self.door.admission.release(securing.admitted_by, securing.address)
        self.door.refused(reason)
        logger.info("door %s: no TLS with %s: %s", self.door.name, securing.address, text)

    def visitor_led(self, visitor: Visitor, lead: Lead) -> None:
        """It is clear where a connection goes."""
        self.visitors.pop(visitor, None)
        trace = next(self.door.traces)
        client: Client
        if lead.head is None:
            plain = Client if self.door.config.access is None else RecordedClient
            tags = _led_tags(lead.service, self.door.name, lead.host, lead.scheme) + encode_tag(TAG_TRACE, trace)
            client = plain(self.door, visitor.sock, visitor.address, lead.service, tags)
            client.trace = trace
        else:
            opening = Opening(
                lead.service,
                door=self.door.name,
                trace=trace,
                host=lead.host,
                scheme=lead.scheme,
                node=lead.node,
                ticket=lead.ticket,
            )
            kind = TlsWebClient if isinstance(visitor.sock, TlsSocket) else WebClient
            client = (kind if self.door.config.access is None else RECORDED[kind])(self.door, visitor.sock, visitor.address, lead, opening)
        client.named = visitor.named
        client.has_spoken()
        self.door.let_in(client, visitor.named or client.peer(), lead)

    def visitor_turned_away(self, visitor: Visitor, away: TurnAway) -> None:
        """A connection leads nowhere. Its socket is the hall's again."""
        self.visitors.pop(visitor, None)
        self.door.admission.release(visitor.admitted_by, visitor.address)
        self.door.refused(away.reason)
        if away.status:
            trace = next(self.door.traces)
            logger.info("door %s: %d for %s: %s (trace %s)", self.door.name, away.status, visitor.address, away.text, trace)
            refusal = Refused(away.status, away.reason, f"{away.text[:1].upper()}{away.text[1:]}.")
            self.say_farewell(visitor.sock, error_words(refusal, trace, away.accept))
        elif away.farewell:
            self.say_farewell(visitor.sock, away.farewell)
        else:
            abort(visitor.sock)

    def say_farewell(self, sock: socket.socket, words: bytes) -> None:
        """Close a socket after these words, if they can be said."""
        if self._farewells >= MAX_FAREWELLS:
            abort(sock)
            return
        self._farewells += 1
        Farewell(self.door.reactor, sock, words, self._farewell_over)

    def _farewell_over(self) -> None:
        self._farewells -= 1

    def turn_away_late(self, oldest: float) -> None:
        """Those who have been here since before that time."""
        for visitor in until(self.visitors, oldest):
            visitor.turn_away(TurnAway("first-words-timeout", "it did not say in time what it wants", visitor.timeout_status))

    def close(self) -> None:
        """Nobody comes in any more."""
        for visitor in list(self.visitors):
            visitor.turn_away(TurnAway("closed", "the door is closed"))


@lru_cache(maxsize=1_024)
def _led_tags(service: ServiceName, door: str, host: str, scheme: str) -> bytes:
    return encode_tags(Opening(service, door=door, host=host, scheme=scheme))


def until(waiting: dict[T, float], oldest: float) -> list[T]:
    """The entries from before `oldest`; the dict is in order of time."""
    found = []
    for entry, since in waiting.items():
        if since > oldest:
            break
        found.append(entry)
    return found
