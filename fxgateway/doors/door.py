"""Pump: one door: a listening socket, admission, and the clients that came in by it."""

import errno
import itertools
import logging
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from fxgateway.doors.client import Client, peer_text
from fxgateway.doors.farewell import Farewell
from fxgateway.doors.proxied import Network, Proxied, is_within
from fxgateway.doors.visitor import Visitor
from fxgateway.doors.web_client import WebClient, error_words
from fxgateway.routing.admission import Admission, Verdict
from fxgateway.routing.reception import Kind, Lead, Receptionist, TurnAway
from fxgateway.routing.table import RouteTable
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import LISTENER_EVENTS, Reactor, Timer
from fxtunnel.engine.splice import RESET_ON_CLOSE, abort
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.settings import Address
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import Opening, encode_tags

if TYPE_CHECKING:
    from fxgateway.tunnels.registry import LiveRelay

logger = logging.getLogger(__name__)
T = TypeVar("T")

ACCEPTS_PER_TURN: Final = 64
PAUSE_S: Final = 0.25
SWEEP_S: Final = 0.5
MAX_HEADERS_AWAITED: Final = 1_024
"""Connections of one door that may owe their PROXY header at once. Headers come with the first packet, so more of them are no clients."""
MAX_FAREWELLS: Final = 512
"""Clients of one door that may be told at once why they are turned away; the others get a RST."""
CLIENT_NOTSENT_BYTES: Final = 32_768
"""Unsent bytes the kernel holds for one client. This bounds what readers that never read fill, without limiting the path's own window."""
CLIENT_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, CLIENT_NOTSENT_BYTES),
)
"""Set on listeners: accepted sockets inherit them, which saves the calls for each of them."""
_TOO_MANY: Final = Refused(429, "TooMany", "There are too many connections from your address, or in all.", retry_after_s=5)
_NOBODY: Final = ""
"""The source as which admission counts a connection that owes its PROXY header: in all and per door, but of no source yet."""
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Relays(Protocol):
    """The relays that are there now."""

    @property
    def routes(self) -> "RouteTable[LiveRelay]":
        """Who offers what."""

    def named(self, relay_id: RelayId) -> "LiveRelay | None":
        """A relay by its name."""


@dataclass(frozen=True, slots=True)
class DoorConfig:
    """What a door is. Two doors with the same `listen` are the same door, before and after a reload.

    Without a `receptionist` every client gets `service`, at once. With one it is heard first, and `service` may be empty.
    Connections from `proxy_from` must begin with a PROXY header, within `header_timeout_s`; nobody else's header means anything.
    """

    name: str
    listen: Address
    service: ServiceName
    open_timeout_s: float = 10.0
    idle_timeout_s: float = 86_400.0
    proxy_from: tuple[Network, ...] = ()
    header_timeout_s: float = 5.0
    receptionist: Receptionist | None = None
    sniff_s: float = 0.3


@dataclass(slots=True)
class DoorCounters:
    """Counts since start."""

    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0


class Door:
    """Takes clients in. `open` binds; `close` stops listening and leaves the clients that are in alone."""

    def __init__(self, reactor: Reactor, config: DoorConfig, relays: Relays, admission: Admission) -> None:
        self.reactor = reactor
        self.config = config
        self._tags = _tags_of(config)
        self._traces = _traces()
        self._farewells = 0
        self.relays = relays
        self.admission = admission
        self.clients: set[Client] = set()
        self.opening: dict[Client, float] = {}
        self.proxied: dict[Proxied, float] = {}
        self.visitors: dict[Visitor, float] = {}
        self.counters = DoorCounters()
        self._listener: socket.socket | None = None
        self._paused = False
        self._sweep: Timer | None = None

    @property
    def service(self) -> ServiceName:
        """What clients get that do not say what they want; empty if they must."""
        return self.config.service

    @property
    def leads_to(self) -> str:
        """For people: its service, or how clients choose one."""
        receptionist = self.config.receptionist
        return self.config.service if receptionist is None else f"routes by {receptionist.kind.value}"

    @property
    def services(self) -> frozenset[ServiceName]:
        """Everything that can be had by it."""
        receptionist = self.config.receptionist
        return receptionist.services() if receptionist is not None else frozenset({self.config.service})

    @property
    def name(self) -> str:
        """What logs and status call it."""
        return self.config.name

    def open(self, listener: socket.socket) -> None:
        """Take clients from `listener`, a bound, listening, non-blocking socket. The door owns it."""
        self._listener = listener
        self.reactor.register(listener, self, LISTENER_EVENTS)
        self._sweep_later()

    def reconfigure(self, config: DoorConfig) -> None:
        """New clients get what `config` says; those that are in keep what they have."""
        self.config = config
        self._tags = _tags_of(config)

    def close(self) -> None:
        """Stop listening. Who has not yet said which client it speaks for is no client, and is turned away."""
        listener, self._listener = self._listener, None
        if listener is not None:
            if not self._paused:
                self.reactor.unregister(listener)
            listener.close()
        for proxied in list(self.proxied):
            proxied.fail("closed", "the door is closed")
        for visitor in list(self.visitors):
            visitor.turn_away(TurnAway("closed", "the door is closed"))

    def abort_all(self) -> None:
        """End every client, with RST."""
        for client in list(self.clients):
            client.fail(Code.SHUTDOWN)
        if self._sweep is not None:
            self._sweep.cancel()

    def refused(self, reason: str) -> None:
        """Count a client that was turned away."""
        self.counters.refused[reason] = self.counters.refused.get(reason, 0) + 1

    def client_released(self, client: Client) -> None:
        """A client has ended."""
        self.clients.discard(client)
        self.opening.pop(client, None)
        self.admission.release(client.admitted_by, client.address)
        stream = client.stream
        if stream is not None:
            self.counters.bytes_in += stream.bytes_out
            self.counters.bytes_out += stream.bytes_in

    def on_event(self, events: int) -> None:
        """From the reactor: clients wait."""
        for _ in range(ACCEPTS_PER_TURN):
            listener = self._listener
            if listener is None or self._paused:
                return
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self._pause(str(exc.strerror))
                # Anything else concerns the one connection that was to be accepted (accept(2)).
                return
            sock.setblocking(False)
            self._take(sock, peer)

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; the door stays open."""

    def _take(self, sock: socket.socket, peer: object) -> None:
        address = peer[0] if isinstance(peer, tuple) else ""
        if self.config.proxy_from and is_within(address, self.config.proxy_from):
            self._await_header(sock, peer[0], peer[1])  # type: ignore[index]  # who has an address has a port
        elif self._admit(sock, address):
            if self.config.receptionist is None:
                self._let_in(Client(self, sock, address, self.config.service, self._tags), peer_text(peer))
            else:
                self._hear(sock, address, "", self.config.receptionist)

    def _admit(self, sock: socket.socket, address: str) -> bool:
        verdict = self.admission.admit(self.name, address, self.reactor.now)
        if verdict is Verdict.ADMIT:
            return True
        receptionist = self.config.receptionist
        if receptionist is not None and receptionist.kind is Kind.HTTP:
            self.say_farewell(sock, error_words(_TOO_MANY, next(self._traces), b""))
        else:
            abort(sock)
        self.refused(verdict.value)
        if verdict is Verdict.FULL:
            self._pause("the connection limit is reached")
        return False

    def _let_in(self, client: Client, peer: str) -> None:
        self.clients.add(client)
        self.counters.accepted += 1
        try:
            client.begin(peer)
        except BaseException:
            client.fail(Code.INTERNAL_ERROR)
            raise

    def _await_header(self, sock: socket.socket, host: str, port: int) -> None:
        if len(self.proxied) >= MAX_HEADERS_AWAITED:
            abort(sock)
            self.refused("proxy-headers-full")
        elif self._admit(sock, _NOBODY):
            proxied = Proxied(self, sock, (host, port))
            self.proxied[proxied] = self.reactor.now
            proxied.start()

    def header_came(self, proxied: Proxied, client: tuple[str, int]) -> None:
        """A connection is `client`'s (address, port): from here on it is treated as one that came from there."""
        self.proxied.pop(proxied, None)
        self.admission.release(proxied.admitted_by, _NOBODY)
        if not self._admit(proxied.sock, client[0]):
            return
        if self.config.receptionist is None:
            admitted = Client(self, proxied.sock, client[0], self.config.service, self._tags)
            admitted.named = peer_text(client)
            self._let_in(admitted, admitted.named)
        else:
            self._hear(proxied.sock, client[0], peer_text(client), self.config.receptionist)

    def header_failed(self, proxied: Proxied, reason: str, text: str) -> None:
        """A connection owed its PROXY header, and has been reset."""
        self.proxied.pop(proxied, None)
        self.admission.release(proxied.admitted_by, _NOBODY)
        self.refused(reason)
        logger.warning("door %s: no PROXY header from %s: %s", self.name, proxied.peer[0], text)

    def _hear(self, sock: socket.socket, address: str, named: str, receptionist: Receptionist) -> None:
        visitor = Visitor(self, sock, address, named, receptionist)
        self.visitors[visitor] = self.reactor.now
        visitor.start()

    def visitor_led(self, visitor: Visitor, lead: Lead) -> None:
        """It is clear where a connection goes."""
        self.visitors.pop(visitor, None)
        trace = next(self._traces)
        opening = Opening(lead.service, door=self.name, trace=trace, host=lead.host, scheme=lead.scheme, node=lead.node, ticket=lead.ticket)
        client = (
            Client(self, visitor.sock, visitor.address, lead.service, encode_tags(opening))
            if lead.head is None
            else WebClient(self, visitor.sock, visitor.address, lead, opening)
        )
        client.named = visitor.named
        self._let_in(client, visitor.named or client.peer())

    def visitor_turned_away(self, visitor: Visitor, away: TurnAway) -> None:
        """A connection leads nowhere. The door owns its socket again."""
        self.visitors.pop(visitor, None)
        self.admission.release(visitor.admitted_by, visitor.address)
        self.refused(away.reason)
        if away.status:
            trace = next(self._traces)
            logger.info("door %s: %d for %s: %s (trace %s)", self.name, away.status, visitor.address, away.text, trace)
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
        Farewell(self.reactor, sock, words, self._farewell_over)

    def _farewell_over(self) -> None:
        self._farewells -= 1

    def _pause(self, why: str) -> None:
        if self._listener is None or self._paused:
            return
        self._paused = True
        self.reactor.unregister(self._listener)
        self.reactor.call_later(PAUSE_S, self._resume)
        logger.warning("door %s pauses: %s", self.name, why)

    def _resume(self) -> None:
        self._paused = False
        if self._listener is not None:
            self.reactor.register(self._listener, self, LISTENER_EVENTS)

    def _sweep_later(self) -> None:
        self._sweep = self.reactor.call_later(SWEEP_S, self._sweep_now)

    def _sweep_now(self) -> None:
        if self._listener is None and not self.clients:
            return
        self._sweep_later()
        now = self.reactor.now
        for client in _until(self.opening, now - self.config.open_timeout_s):
            self.opening.pop(client, None)
            client.open_timed_out()
        for proxied in _until(self.proxied, now - self.config.header_timeout_s):
            proxied.fail("proxy-header-timeout", f"nothing complete within {self.config.header_timeout_s:g} s")
        for visitor in _until(self.visitors, now - self.config.header_timeout_s):
            visitor.turn_away(TurnAway("first-words-timeout", "it did not say in time what it wants", visitor.timeout_status))

    def end_idle(self) -> None:
        """End clients on whose stream nothing has moved for the idle time. Call now and then."""
        now = self.reactor.now
        for client in list(self.clients):
            moved = client.moved_bytes
            if moved != client.last_bytes:
                client.last_bytes, client.moved_at = moved, now
            elif now - client.moved_at > self.config.idle_timeout_s:
                self.refused("idle-timeout")
                client.end_idle()


def _until(waiting: dict[T, float], oldest: float) -> list[T]:
    """The entries from before `oldest`; the dict is in order of time."""
    found = []
    for entry, since in waiting.items():
        if since > oldest:
            break
        found.append(entry)
    return found


def _tags_of(config: DoorConfig) -> bytes:
    return encode_tags(Opening(config.service, door=config.name))


def _traces() -> Iterator[str]:
    """Marks by which a client is found again in the logs of gateway and relay: no two alike, also after a restart."""
    prefix = secrets.token_hex(4)
    return (f"{prefix}{number:x}" for number in itertools.count(1))
