"""Pump: one stream from OPEN to close: look the service up, connect, accept, splice."""

import errno
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fxrelay.delivery.services import Endpoint, Service, ServiceTable
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import ERROR, WRITE, Reactor
from fxtunnel.engine.splice import RESET_ON_CLOSE, Splice
from fxtunnel.model import ServiceName
from fxtunnel.protocol.frames import Opening
from fxtunnel.protocol.mux import Stream

if TYPE_CHECKING:
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
_NONBLOCKING_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    """Bounds of what this relay carries."""

    streams: int = 16_384
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 86_400.0


@dataclass(slots=True)
class DeliveryCounters:
    """Counts since start."""

    opened_by_service: dict[ServiceName, int] = field(default_factory=dict)
    refused_by_service: dict[ServiceName, dict[str, int]] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0


class Delivery(Splice):
    """A service's socket and the stream it serves. Until the connection stands, what arrives waits."""

    __slots__ = ("_connecting", "_rest", "desk", "last_bytes", "moved_at", "service")

    def __init__(self, desk: "DeliveryDesk", sock: socket.socket, service: Service, rest: tuple[Endpoint, ...]) -> None:
        super().__init__(desk.reactor, sock)
        self.desk = desk
        self.service = service
        self.last_bytes = 0
        self.moved_at = desk.reactor.now
        self._rest = rest
        self._connecting = True
        self._write_blocked = True

    @property
    def moved_bytes(self) -> int:
        """Bytes moved so far, both ways."""
        return self.stream.bytes_in + self.stream.bytes_out if self.stream is not None else 0

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self._connecting:
            if not events & (WRITE | ERROR):
                return
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & ERROR else 0
            if error:
                self.refuse(Code.CONNECT_FAILED, os.strerror(error))
                return
            self._connecting = False
            self.desk.connecting.pop(self, None)
            if self.stream is not None:
                self.stream.accept()
            events |= WRITE
        super().on_event(events)

    def refuse(self, code: Code, text: str) -> None:
        """This address did not work: the service's next one, or REFUSE."""
        if code is Code.CONNECT_FAILED and self._reconnect():
            return
        stream = self.stream
        if stream is not None:
            stream.refuse(code, text)
        self.desk.count_refusal(self.service, code)
        self.abort()

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        if self._connecting:
            self.abort()  # the opener has gone elsewhere, and what it sent with it: not for this service any more
        else:
            super().on_reset(code)

    def released(self) -> None:
        """See `Splice`."""
        self.desk.delivery_released(self)

    def _reconnect(self) -> bool:
        while self._rest:
            connected = connect(self._rest[0])
            self._rest = self._rest[1:]
            if not isinstance(connected, str):
                self.reactor.forget(self.sock)
                self.sock.close()
                self.sock = connected
                self.start()
                return True
        return False


class DeliveryDesk:
    """Takes the OPENs of all gateways' sessions."""

    def __init__(self, reactor: Reactor, services: ServiceTable, limits: DeliveryLimits) -> None:
        self.reactor = reactor
        self.services = services
        self.limits = limits
        self.counters = DeliveryCounters()
        self.deliveries: set[Delivery] = set()
        self.connecting: dict[Delivery, float] = {}
        self.is_draining = False
        reactor.call_later(SWEEP_S, self._sweep)

    def on_open(self, session: "Session", stream: Stream, opening: Opening) -> None:
        """Serve a stream. What the gateway asks for counts only as a name in this relay's own table."""
        service = self.services.get(opening.service)
        if service is None:
            stream.refuse(Code.NO_SERVICE, "not served here")
        elif self.is_draining:
            self._refuse(stream, service, Code.DRAINING, "this relay is going away")
        elif len(self.deliveries) >= self.limits.streams:
            self._refuse(stream, service, Code.BUSY, "too many streams")
        elif not service.endpoints:
            self._refuse(stream, service, Code.CONNECT_FAILED, "the service's host name does not resolve")
        else:
            self._deliver(session, stream, service)

    def count_refusal(self, service: Service, code: Code) -> None:
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
        """End streams on which nothing has moved for the idle time. Call now and then."""
        now = self.reactor.now
        for delivery in list(self.deliveries):
            moved = delivery.moved_bytes
            if moved != delivery.last_bytes:
                delivery.last_bytes, delivery.moved_at = moved, now
            elif now - delivery.moved_at > self.limits.idle_timeout_s:
                delivery.fail(Code.IDLE_TIMEOUT)

    def abort_all(self) -> None:
        """End every stream, with RST."""
        for delivery in list(self.deliveries):
            delivery.fail(Code.SHUTDOWN)

    def _deliver(self, session: "Session", stream: Stream, service: Service) -> None:
        problem = ""
        for position, endpoint in enumerate(service.endpoints):
            connected = connect(endpoint)
            if isinstance(connected, str):
                problem = connected
                continue
            delivery = Delivery(self, connected, service, service.endpoints[position + 1 :])
            opened = self.counters.opened_by_service
            opened[service.name] = opened.get(service.name, 0) + 1
            self.deliveries.add(delivery)
            self.connecting[delivery] = self.reactor.now
            delivery.join(session, stream)
            delivery.start()
            return
        self._refuse(stream, service, Code.CONNECT_FAILED, problem)

    def _refuse(self, stream: Stream, service: Service, code: Code, text: str) -> None:
        self.count_refusal(service, code)
        stream.refuse(code, text)

    def _sweep(self) -> None:
        self.reactor.call_later(SWEEP_S, self._sweep)
        oldest = self.reactor.now - self.limits.connect_timeout_s
        late = []
        for delivery, since in self.connecting.items():
            if since > oldest:
                break
            late.append(delivery)
        for delivery in late:
            delivery.refuse(Code.CONNECT_TIMEOUT, f"no answer within {self.limits.connect_timeout_s:g} s")


def connect(endpoint: Endpoint) -> socket.socket | str:
    """A socket whose connection is under way, or why there can be none. Only addresses come here, so nothing blocks."""
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
