"""Pump: one door: its listening socket, admission, and the clients that came in through it."""

import itertools
import logging
import secrets
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from fxgateway.doors.client import Client, peer_text
from fxgateway.doors.pending_clients import PendingClients
from fxgateway.doors.proxied import Proxied
from fxgateway.doors.recorded import AccessRecord, AccessSink, RecordedClient
from fxgateway.doors.redispatch import go_on_confirmed, redispatch_held
from fxgateway.doors.remote_relay import RemoteRelay
from fxgateway.doors.service_outages import ServiceOutages
from fxgateway.doors.web_client import error_answer
from fxgateway.routing.admission import Admission, Verdict
from fxgateway.routing.failover import Relays
from fxgateway.routing.preread_router import Destination, DoorKind, PrereadRouter
from fxtunnel.codes import Code
from fxtunnel.engine.overdue import idle, overdue
from fxtunnel.engine.reactor import LISTENER_EVENTS, Reactor, Timer
from fxtunnel.engine.splice import RESET_ON_CLOSE, abort
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.listeners import EXHAUSTED
from fxtunnel.kit.settings import Address
from fxtunnel.kit.sources import Network, is_within
from fxtunnel.model import ServiceName
from fxtunnel.protocol.opening import TAG_TRACE, Opening, encode_tag, encode_tags

if TYPE_CHECKING:
    from fxgateway.tunnels.live_relay import LiveRelay

logger = logging.getLogger(__name__)
T = TypeVar("T")

ACCEPTS_PER_TURN: Final = 64
"""Clients accepted in a row before other connections of this process get a turn."""
PAUSE_S: Final = 0.25
"""Without accepting, when descriptors or the connection limit are used up: long enough for some connection to end."""
SWEEP_S: Final = 0.5
"""Between two looks at deadlines (open, header, first words), which are therefore kept to half a second."""
WAIT_POLL_S: Final = 0.02
"""Between two looks at whether a door that waits for relays may open: clients are in its queue."""
MAX_HEADERS_AWAITED: Final = 1_024
"""Connections of one door that may owe their PROXY header at the same time. A real proxy sends it in its first packet."""
CLIENT_NOTSENT_BYTES: Final = 32_768
"""Unsent bytes that the kernel may hold for one client. Bounds what a client that never reads can fill, without limiting TCP's window."""
CLIENT_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, CLIENT_NOTSENT_BYTES),
)
"""Set on listeners: accepted sockets inherit them, which saves the system calls for each one."""
DEFER_ACCEPT_S: Final = 1
"""At doors where clients speak first, the kernel holds a connection back until they have, or for about this long (tcp(7),
TCP_DEFER_ACCEPT). That saves an event for each client, since its first bytes are there when it is accepted."""
_SPEAKS_FIRST: Final = frozenset({DoorKind.SNI, DoorKind.HTTP, DoorKind.HTTPS})
_TOO_MANY: Final = Refused(429, "TooMany", "There are too many connections from your address, or in all.", retry_after_s=5)
_UNHEARD: Final = Destination(ServiceName(""))
_NOBODY: Final = ""
"""The source under which admission counts a connection that still owes its PROXY header: in all and per door only."""


DoorRelays: TypeAlias = "Relays[LiveRelay, RemoteRelay]"


@dataclass(frozen=True, slots=True)
class DoorConfig:
    """What the configuration says about a door. Across a reload, the same `listen` means the same door.

    Without a `preread_router` every client gets `service` at once. With one, a client's first bytes decide, and `service` may be empty;
    with `tls`, the client's TLS is terminated before that. `access` is told of every client that has ended.
    Connections from `proxy_from` must begin with a PROXY header within `header_timeout_s`. From anybody else such a header is just data.
    """

    name: str
    listen: Address
    service: ServiceName
    open_timeout_s: float = 10.0
    idle_timeout_s: float = 86_400.0
    proxy_from: tuple[Network, ...] = ()
    header_timeout_s: float = 5.0
    preread_router: PrereadRouter | None = None
    sniff_s: float = 0.3
    tls: ssl.SSLContext | None = None
    access: AccessSink | None = None


@dataclass(slots=True)
class DoorCounters:
    """Counts since start."""

    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0


class Door:
    """Takes clients in. `open` begins to listen; `close` stops listening and leaves open clients alone."""

    def __init__(self, reactor: Reactor, config: DoorConfig, relays: DoorRelays, admission: Admission) -> None:
        self.reactor = reactor
        self.config = config
        self.listen_address = str(config.listen)
        """What relays are told, and the key under which admission counts it: unlike the name, it cannot change in a reload."""
        self._tags = _tags_of(config)
        self.traces = _traces()
        self.relays = relays
        self.admission = admission
        self.clients: set[Client] = set()
        self.opening: dict[Client, float] = {}
        self.taken_back: dict[Client, tuple[float, int]] = {}
        """Clients whose relay was too late, until it confirms that it has not accepted them: since when, and the mark by which it does."""
        self.proxied: dict[Proxied, float] = {}
        self.pending = PendingClients(self)
        self.outages = ServiceOutages()
        self.counters = DoorCounters()
        self._listener: socket.socket | None = None
        self._hears = False
        """Whether it hears of clients: the door neither pauses nor waits for relays."""
        self._paused = False
        self.is_waiting = False
        """Whether clients are left in the listener's queue until their services have relays: see `hold_until`."""
        self._sweep: Timer | None = None

    @property
    def service(self) -> ServiceName:
        """The service of clients that do not ask for one; empty if they must."""
        return self.config.service

    @property
    def leads_to(self) -> str:
        """Its service, or how clients choose one, as text for people."""
        preread_router = self.config.preread_router
        if preread_router is None:
            return self.config.service
        return f"routes by {preread_router.kind.value}{' (decrypted here)' if self.config.tls is not None else ''}"

    @property
    def services(self) -> frozenset[ServiceName]:
        """All services that its clients can get."""
        preread_router = self.config.preread_router
        return preread_router.services() if preread_router is not None else frozenset({self.config.service})

    @property
    def name(self) -> str:
        """What logs and status call it."""
        return self.config.name

    @property
    def occupants(self) -> int:
        """How many connections came in through it, including those of which it is not clear yet what they want."""
        return len(self.clients) + len(self.proxied) + len(self.pending.clients)

    def open(self, listener: socket.socket) -> None:
        """Take clients from `listener`, a bound, listening, non-blocking socket. The door owns it."""
        self._listener = listener
        self._defer_accept()
        # Until it is closed, also while it pauses: where descriptors or memory are short, registering it once more could fail.
        self.reactor.register(listener, self, 0)
        self._hear_or_not()
        self._sweep_later()

    def reconfigure(self, config: DoorConfig) -> None:
        """Apply `config` to new clients; open ones keep what they have."""
        self.config = config
        self._tags = _tags_of(config)
        self.outages.keep_only(self.services)
        self._defer_accept()

    def hold(self) -> None:
        """Leave clients in the listener's queue, until `hold_until` says for how long."""
        self.is_waiting = self._listener is not None
        self._hear_or_not()

    def hold_until(self, is_time: Callable[[], bool], deadline: float) -> None:
        """Leave clients in the listener's queue until `is_time`, or the reactor's clock shows `deadline`. Returns at once."""
        self.is_waiting = self._listener is not None and not is_time() and self.reactor.now < deadline
        self._hear_or_not()
        if self.is_waiting:
            self.reactor.call_later(WAIT_POLL_S, lambda: self.hold_until(is_time, deadline))

    def release(self) -> None:
        """Stop listening. Open clients stay, and those that have not said yet what they want may still do so."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self.reactor.unregister(listener)
            self._hears = False
            listener.close()

    def close(self) -> None:
        """Stop listening. Open clients stay; those whose PROXY header or first bytes are still missing are turned away."""
        self.release()
        for proxied in list(self.proxied):
            proxied.fail("closed", "the door is closed")
        self.pending.close()

    def abort_all(self) -> None:
        """End every client, with RST."""
        for client in list(self.clients):
            client.fail(Code.SHUTDOWN)
        if self._sweep is not None:
            self._sweep.cancel()

    def refused(self, reason: str) -> None:
        """Count a client that was turned away; `reason` is a label of metrics."""
        self.counters.refused[reason] = self.counters.refused.get(reason, 0) + 1

    def left(self, address: str) -> None:
        """An admitted connection from `address` is over, or is counted elsewhere from now on."""
        self.admission.release(self.listen_address, address)

    def client_released(self, client: Client) -> None:
        """A client has ended."""
        self.clients.discard(client)
        self.opening.pop(client, None)
        self.taken_back.pop(client, None)
        self.left(client.address)
        stream = client.stream
        if stream is not None:
            self.counters.bytes_in += stream.bytes_out
            self.counters.bytes_out += stream.bytes_in

    def adopt(self, client: Client) -> None:
        """Have a client that another process has admitted. It may begin also after the door was closed, and has its deadlines then, too."""
        self.clients.add(client)
        if self._sweep is None:
            self._sweep_later()

    def client_given_away(self, client: Client) -> None:
        """A client belongs to another process from now on."""
        self.clients.discard(client)
        self.opening.pop(client, None)
        self.left(client.address)

    def on_event(self, events: int) -> None:
        """From the reactor: clients are waiting to be accepted."""
        for _ in range(ACCEPTS_PER_TURN):
            listener = self._listener
            if listener is None or not self._hears:
                return
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in EXHAUSTED:
                    self._pause(str(exc.strerror))
                # Anything else concerns the one connection that was to be accepted (accept(2)).
                return
            sock.setblocking(False)
            try:
                self._take(sock, peer)
            except OSError as exc:  # it cannot be listened to: no room in the epoll (epoll_ctl(2), ENOSPC, ENOMEM)
                return self._pause(str(exc.strerror))

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; the door stays open."""

    def _defer_accept(self) -> None:
        listener, preread_router = self._listener, self.config.preread_router
        if listener is not None and listener.family != socket.AF_UNIX:
            speaks_first = preread_router is not None and preread_router.kind in _SPEAKS_FIRST
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_S if speaks_first else 0)

    def _take(self, sock: socket.socket, peer: object) -> None:
        address = peer[0] if isinstance(peer, tuple) else ""
        if self.config.proxy_from and is_within(address, self.config.proxy_from):
            self._await_header(sock, peer[0], peer[1])  # type: ignore[index]  # who has an address has a port
        elif self._admit(sock, address):
            if self.config.preread_router is None:
                client = self._client(sock, address)
                client.has_spoken()  # most have by now, and their first bytes leave with the OPEN
                self.let_in(client, peer_text(peer))
            else:
                self.pending.take(sock, address, peer_text(peer), self.config.preread_router)

    def _admit(self, sock: socket.socket, address: str) -> bool:
        verdict = self.admission.admit(self.listen_address, address, self.reactor.now)
        if verdict is Verdict.ADMIT:
            return True
        preread_router = self.config.preread_router
        if preread_router is not None and preread_router.kind is DoorKind.HTTP:
            self.pending.close_with(sock, error_answer(_TOO_MANY, next(self.traces), b""))
        else:
            abort(sock)
        self.refused(verdict.value)
        if verdict is Verdict.FULL:
            self._pause("the connection limit is reached")
        return False

    def _client(self, sock: socket.socket, address: str) -> Client:
        """A client that gets the door's own service at once."""
        if self.config.access is None:
            return Client(self, sock, address, self.config.service, self._tags)
        trace = next(self.traces)
        client = RecordedClient(self, sock, address, self.config.service, encode_tag(TAG_TRACE, trace) + self._tags)
        client.trace = trace
        return client

    def let_in(self, client: Client, peer: str, destination: Destination = _UNHEARD, said: bytes = b"") -> None:
        """Serve an admitted client. `peer` is its ip:port, `destination` what it asked for; for `said` see `Client.begin`."""
        self.clients.add(client)
        self.counters.accepted += 1
        if self.config.access is not None:
            client.access_record = AccessRecord(peer, self.reactor.now, destination.host, destination.scheme)
        try:
            client.begin(peer, said)
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
        """A PROXY header has named the `client` (address, port): treat the connection as one from there."""
        self.proxied.pop(proxied, None)
        self.left(_NOBODY)
        if not self._admit(proxied.sock, client[0]):
            return
        if self.config.preread_router is None:
            admitted = self._client(proxied.sock, client[0])
            admitted.named = peer_text(client)
            self.let_in(admitted, admitted.named)
        else:
            self.pending.take(proxied.sock, client[0], peer_text(client), self.config.preread_router)

    def header_failed(self, proxied: Proxied, reason: str, text: str) -> None:
        """A connection was reset because its PROXY header was bad or missing."""
        self.proxied.pop(proxied, None)
        self.left(_NOBODY)
        self.refused(reason)
        logger.warning("door %s: no PROXY header from %s: %s", self.name, proxied.peer[0], text)

    def _pause(self, why: str) -> None:
        if self._listener is None or self._paused:
            return
        self._paused = True
        self._hear_or_not()
        self.reactor.call_later(PAUSE_S, self._resume)
        logger.warning("door %s pauses: %s", self.name, why)

    def _resume(self) -> None:
        self._paused = False
        self._hear_or_not()

    def _hear_or_not(self) -> None:
        should = not self._paused and not self.is_waiting
        if self._listener is not None and should != self._hears:
            self._hears = should
            self.reactor.modify(self._listener, LISTENER_EVENTS if should else 0)

    def _sweep_later(self) -> None:
        self._sweep = self.reactor.call_later(SWEEP_S, self._sweep_now)

    def _sweep_now(self) -> None:
        self._sweep = None
        if self._listener is None and not self.occupants:
            return
        self._sweep_later()
        now = self.reactor.now
        for client in overdue(self.opening, now - self.config.open_timeout_s):
            self.opening.pop(client, None)
            client.open_timed_out()
        go_on_confirmed(self.taken_back, now)
        redispatch_held(self.opening, self.relays)
        self.outages.look(self.name, self.relays)
        for proxied in overdue(self.proxied, now - self.config.header_timeout_s):
            proxied.fail("proxy-header-timeout", f"nothing complete within {self.config.header_timeout_s:g} s")
        self.pending.turn_away_late(now - self.config.header_timeout_s)

    def end_idle(self) -> None:
        """End clients whose stream has been idle for too long. Call every few seconds."""
        for client in idle(self.clients, self.reactor.now, self.config.idle_timeout_s):
            self.refused("idle-timeout")
            client.end_idle()


def _tags_of(config: DoorConfig) -> bytes:
    return encode_tags(Opening(config.service, door=str(config.listen)))


def _traces() -> Iterator[str]:
    """Ids by which a client can be found in the logs of gateway and relay. Unique, across restarts as well."""
    prefix = secrets.token_hex(4)
    return (f"{prefix}{number:x}" for number in itertools.count(1))
