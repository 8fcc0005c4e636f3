"""Pump: one stream from OPEN to close: look the service up, connect, accept, splice."""

import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.address_outages import AddressOutages
from fxrelay.delivery.addresses import Addresses, share_s
from fxrelay.delivery.ports import StreamTaker
from fxrelay.delivery.services import AnyService, Endpoint, PoolService, ServiceTable
from fxtunnel.codes import Code
from fxtunnel.engine.overdue import idle, overdue
from fxtunnel.engine.reactor import ERROR, WRITE, Reactor, Timer
from fxtunnel.engine.splice import RESET_ON_CLOSE, Splice
from fxtunnel.kit.proxy_header import encode_proxy_header
from fxtunnel.model import GatewayId, RelayId, ServiceName
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    from fxrelay.delivery.placing import Placer
    from fxtunnel.engine.session import Session

logger = logging.getLogger(__name__)

SWEEP_S: Final = 0.5
SERVICE_NOTSENT_BYTES: Final = 65_536
"""Unsent bytes the kernel may hold for one service that does not read."""
_SERVICE_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SERVICE_NOTSENT_BYTES),
    (socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE),
)
_NO_GATEWAY: Final = GatewayId("")
_NONBLOCKING_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    """Bounds of what this relay carries."""

    streams: int = 16_384
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 86_400.0
    place_timeout_s: float = 8.0
    """For choosing a pool's node and reaching it, all attempts together. Less than the 10 s a gateway waits (limits.open_timeout_s)."""


@dataclass(slots=True)
class DeliveryCounters:
    """Counts since start. `paths_by_service`: streams of pools by the path to their node."""

    opened_by_service: dict[ServiceName, int] = field(default_factory=dict)
    refused_by_service: dict[ServiceName, dict[str, int]] = field(default_factory=dict)
    paths_by_service: dict[ServiceName, dict[PathKind, int]] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0


class Delivery(Splice):
    """A service's socket and the stream it serves. Bytes that arrive before the connection is up are kept.

    `addresses` are the one that is being connected to and, behind it, those that are left if it fails.
    """

    __slots__ = ("_addresses", "_connecting", "_greeting", "_is_redirected", "_share", "desk", "last_bytes", "moved_at", "service")

    path: PathKind = "local"
    """How the node of a pool is reached."""

    def __init__(
        self, desk: "DeliveryDesk", sock: socket.socket, service: AnyService, addresses: tuple[Endpoint, ...], opening: Opening
    ) -> None:
        super().__init__(desk.reactor, sock)
        self.desk = desk
        self.service = service
        self.last_bytes = 0
        self.moved_at = desk.reactor.now
        self._addresses = addresses
        self._share: Timer | None = None
        self._greeting = encode_proxy_header(service.proxy_protocol, opening.client, opening.door) if service.proxy_protocol else b""
        self._connecting = True
        self._is_redirected = opening.via is not None
        self._write_blocked = True
        if addresses and addresses[0].family == socket.AF_UNIX:
            self.reads_short()

    def start(self) -> None:
        """See `Splice`. Over loopback the connection is up as soon as it has been requested, so there is no need to wait for an event."""
        if self._connecting and is_connected(self.sock):
            if self._came_to_stand(0):
                self._write_blocked = False
                super().start()
                self._drain()
        else:
            if len(self._addresses) > 1:
                left_s = self.desk.connecting[self] + self.desk.limits.connect_timeout_s - self.reactor.now
                self._share = self.reactor.call_later(share_s(left_s, len(self._addresses)), self._late)
            super().start()

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self._connecting:
            if not events & (WRITE | ERROR):
                return
            if not self._came_to_stand(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & ERROR else 0):
                return
            events |= WRITE
        super().on_event(events)

    def _came_to_stand(self, error: int) -> bool:
        """The connection is up (`error` 0) or has failed. Returns whether this delivery goes on with it."""
        self._end_share()
        error = error or self._greet()
        if error:
            self.refuse(Code.CONNECT_FAILED, os.strerror(error))
            return False
        self._connecting = False
        self.desk.connecting.pop(self, None)
        self.stands()
        return not self.closed

    def stands(self) -> None:
        """The service is reached."""
        if self._addresses:
            self.desk.outages.note_reached(self._addresses[0])
        if self.stream is not None:
            self.stream.accept()
        if isinstance(self.service, PoolService):
            self.desk.count_path(self.service, self.path)

    def refuse(self, code: Code, text: str) -> None:
        """This address did not work: try the service's next one, or REFUSE the stream."""
        self.note_failure(code, text)
        if code is Code.CONNECT_FAILED and self._reconnect():
            return
        stream = self.stream
        if stream is not None:
            stream.refuse(code, text)
        self.desk.count_refusal(self.service, code)
        self.abort()

    def note_failure(self, code: Code, text: str) -> None:
        """For the log: whether this address is to blame."""
        if self._addresses and code in (Code.CONNECT_FAILED, Code.CONNECT_TIMEOUT):
            self.desk.outages.note(self._addresses[0], text)

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        if self._connecting:
            self.abort()  # the gateway has given up on us: do not deliver its early bytes to this service as well
        else:
            super().on_reset(code)

    def released(self) -> None:
        """See `Splice`."""
        self._end_share()
        self.desk.delivery_released(self)
        if self._is_redirected and not self._connecting:
            self.desk.redirected_ended()

    def _greet(self) -> int:
        """Send the PROXY header, if the service gets one. Returns an errno, 0 for success."""
        if not self._greeting:
            return 0
        try:
            # A fresh socket's buffer takes the header's 107 bytes (MAX_V1_BYTES) at once; if not, something is wrong with it.
            sent = self.sock.send(self._greeting)
        except OSError as exc:
            return exc.errno or errno.EIO
        return 0 if sent == len(self._greeting) else errno.ENOBUFS

    def _reconnect(self) -> bool:
        self._end_share()
        while len(self._addresses) > 1:
            self._addresses = self._addresses[1:]
            connected = connect(self._addresses[0])
            if not isinstance(connected, str):
                self.reactor.forget(self.sock)
                self.sock.close()
                self.sock = connected
                self.start()
                return True
        return False

    def _late(self) -> None:
        """This address has had its share of the time."""
        self.desk.addresses.was_late(self._addresses[0], self.reactor.now)
        self.refuse(Code.CONNECT_FAILED, "no answer in time")

    def _end_share(self) -> None:
        share, self._share = self._share, None
        if share is not None:
            share.cancel()


class DeliveryDesk:
    """Takes the OPENs of all gateways' sessions. Without a placer no node can be chosen: pools then serve only redirected streams."""

    def __init__(self, reactor: Reactor, services: ServiceTable, limits: DeliveryLimits, placer: "Placer | None" = None) -> None:
        self.reactor = reactor
        self.services = services
        self.limits = limits
        self.placer = placer
        self.web: StreamTaker | None = None
        self.redirected_ended: Callable[[], None] = lambda: None
        """Called when a stream that was redirected to this node has ended, since the relay that placed it does not hear of that."""
        self.node: RelayId | None = None
        """This relay's id as a node. Clients may ask for that node also at services with one address, which only this relay serves."""
        self.counters = DeliveryCounters()
        self.deliveries: set[Delivery] = set()
        self.connecting: dict[Delivery, float] = {}
        self.addresses = Addresses()
        self.outages = AddressOutages()
        self.is_draining = False
        reactor.call_later(SWEEP_S, self._sweep)

    @property
    def streams(self) -> int:
        """Open streams: those being served, and those for which a node is being chosen."""
        placings = len(self.placer.placings) if self.placer is not None else 0
        return len(self.deliveries) + placings + (self.web.streams if self.web is not None else 0)

    def on_open(self, session: "Session", stream: Stream, opening: Opening, gateway_id: GatewayId = _NO_GATEWAY) -> None:
        """Serve a stream. Whatever the gateway asks for is only looked up as a name in this relay's own table."""
        service, asked = self.services.get(opening.service), opening
        if opening.node is not None and opening.node == self.node and not isinstance(service, PoolService):
            opening = opening._replace(node=None)
        if service is None:
            stream.refuse(Code.NO_SERVICE, "not served here")
        elif self.is_draining:
            self.turn_down(stream, service, Code.DRAINING, "this relay is going away")
        elif self.streams >= self.limits.streams:
            self.turn_down(stream, service, Code.BUSY, "too many streams")
        elif opening.node is not None and not isinstance(service, PoolService):
            self.turn_down(stream, service, Code.NO_SERVICE, "that node does not serve it here")
        elif service.protocol == "http":
            if self.web is None:
                self.turn_down(stream, service, Code.NO_SERVICE, "this relay serves no HTTP")
            else:
                self.web.take(session, stream, service, opening, gateway_id)
        elif service.is_guarded:
            # A ticket may be good for one node only: the node that was asked for has to be compared, even if it is this one.
            self._serve_guarded(session, stream, service, asked, gateway_id)
        elif isinstance(service, PoolService) and opening.via is None:
            if self.placer is None:
                self.turn_down(stream, service, Code.NO_SERVICE, "this relay chooses no nodes")
            else:
                self.placer.place(self, session, stream, service, opening, gateway_id)
        elif isinstance(service, PoolService) and self.placer is not None and "local" not in self.placer.paths:
            self.turn_down(stream, service, Code.NO_SERVICE, "this node does not serve it itself")
        elif not service.endpoints:
            self.turn_down(stream, service, Code.CONNECT_FAILED, "the service's host name does not resolve")
        elif not self._is_placed_here(session, stream, service, opening, gateway_id):
            self._deliver(session, stream, service, opening)

    def admit(self, delivery: Delivery, session: "Session", stream: Stream) -> None:
        """Carry the stream with `delivery`, whose connection is under way."""
        self.deliveries.add(delivery)
        self.connecting[delivery] = self.reactor.now
        delivery.join(session, stream)
        delivery.start()

    def connect_first(self, endpoints: tuple[Endpoint, ...]) -> tuple[socket.socket | str, tuple[Endpoint, ...]]:
        """Begin to connect to the first endpoint that can be. Returns the socket, or why there is none, and the endpoints from there on."""
        problem = "no address"
        in_order = self.addresses.in_order(endpoints, self.reactor.now)
        for position, endpoint in enumerate(in_order):
            connected = connect(endpoint)
            if not isinstance(connected, str):
                return connected, in_order[position:]
            self.outages.note(endpoint, connected)
            problem = connected
        return problem, ()

    def turn_down(self, stream: Stream, service: AnyService, code: Code, text: str) -> None:
        """REFUSE, counted."""
        self.count_refusal(service, code)
        stream.refuse(code, text)

    def count_opening(self, service: AnyService) -> None:
        """For statistics: once a stream."""
        opened = self.counters.opened_by_service
        opened[service.name] = opened.get(service.name, 0) + 1

    def count_path(self, service: AnyService, path: PathKind) -> None:
        """For statistics: a stream of a pool goes this way."""
        paths = self.counters.paths_by_service.setdefault(service.name, {})
        paths[path] = paths.get(path, 0) + 1

    def count_refusal(self, service: AnyService, code: Code) -> None:
        """For statistics."""
        refused = self.counters.refused_by_service.setdefault(service.name, {})
        refused[code.label] = refused.get(code.label, 0) + 1

    def delivery_released(self, delivery: Delivery) -> None:
        """A service socket is closed."""
        self.deliveries.discard(delivery)
        self.connecting.pop(delivery, None)
        stream = delivery.stream
        if stream is not None:
            self.counters.bytes_in += stream.bytes_in
            self.counters.bytes_out += stream.bytes_out

    def end_idle(self) -> None:
        """End streams that have been idle for too long. Call every few seconds."""
        for delivery in idle(self.deliveries, self.reactor.now, self.limits.idle_timeout_s):
            delivery.fail(Code.IDLE_TIMEOUT)

    def abort_all(self) -> None:
        """End every stream, with RST."""
        for delivery in list(self.deliveries):
            delivery.fail(Code.SHUTDOWN)
        if self.placer is not None:
            self.placer.abort_all()
        if self.web is not None:
            self.web.abort_all()

    def _serve_guarded(self, session: "Session", stream: Stream, service: AnyService, opening: Opening, gateway_id: GatewayId) -> None:
        """Serve a stream that has to be admitted before anything else is done for it."""
        placer = self.placer
        if placer is None:
            self.turn_down(stream, service, Code.NO_SERVICE, "this relay admits nobody")
        elif isinstance(service, PoolService) and opening.via is not None and "local" not in placer.paths:
            self.turn_down(stream, service, Code.NO_SERVICE, "this node does not serve it itself")
        else:
            placer.place_guarded(self, session, stream, service, opening, gateway_id)

    def _is_placed_here(self, session: "Session", stream: Stream, service: AnyService, opening: Opening, gateway_id: GatewayId) -> bool:
        """Whether the placer takes a redirected stream on, because its user has to be given this node first."""
        if self.placer is None or not isinstance(service, PoolService):
            return False
        return self.placer.place_here(self, session, stream, service, opening, gateway_id)

    def _deliver(self, session: "Session", stream: Stream, service: AnyService, opening: Opening) -> None:
        connected, addresses = self.connect_first(service.endpoints)
        if isinstance(connected, str):
            self.turn_down(stream, service, Code.CONNECT_FAILED, connected)
            return
        delivery = Delivery(self, connected, service, addresses, opening)
        self.count_opening(service)
        self.admit(delivery, session, stream)

    def _sweep(self) -> None:
        self.reactor.call_later(SWEEP_S, self._sweep)
        for delivery in overdue(self.connecting, self.reactor.now - self.limits.connect_timeout_s):
            delivery.refuse(Code.CONNECT_TIMEOUT, f"no answer within {self.limits.connect_timeout_s:g} s")


def is_connected(sock: socket.socket) -> bool:
    """Whether the connection of this socket is up."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def connect(endpoint: Endpoint) -> socket.socket | str:
    """A socket whose connection is under way, or why there can be none. Never blocks: endpoints hold addresses, not names."""
    try:
        sock = socket.socket(endpoint.family, _NONBLOCKING_STREAM)
    except OSError as exc:
        return exc.strerror or str(exc)
    try:
        if endpoint.family != socket.AF_UNIX:
            for option in _SERVICE_OPTIONS:
                sock.setsockopt(*option)
            if not endpoint.is_local:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        error = sock.connect_ex(endpoint.address)
    except OSError as exc:
        error = exc.errno or errno.EIO
    if error in (0, errno.EINPROGRESS):
        return sock
    sock.close()
    return os.strerror(error)
