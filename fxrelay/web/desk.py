"""Task: takes the streams of HTTP services from the reactor and serves each in a task of its own."""

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from fxrelay.admitting.stream_admission import StreamAdmission
from fxrelay.delivery.delivery import DeliveryDesk
from fxrelay.delivery.services import AnyService, PoolService
from fxrelay.web.connection import Surroundings, WebConnection
from fxrelay.web.ports import NodeChooser, RequestGate, WebLimits, WebRules
from fxrelay.web.secure import HandshakeTurns
from fxtunnel.codes import Code
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.model import GatewayId, RelayId, ServiceName
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    from fxtunnel.engine.session import Session

logger = logging.getLogger(__name__)

ACCEPT_AFTER_S: Final = 3.0
"""A stream that another relay could serve is accepted after this long: a store that does not answer has said so within two seconds."""
MAX_WAITING: Final = 1_024
"""Streams whose task has not begun."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    tunnel: TunnelStream
    service: AnyService
    rules: WebRules
    opening: Opening


class WebDesk:
    """Implements `StreamTaker`. `take` is for the reactor, `run` is the task that serves; `limits` may be replaced at any time."""

    def __init__(
        self, desk: DeliveryDesk, chooser: NodeChooser, own_id: RelayId, limits: WebLimits | None = None, gate: RequestGate | None = None
    ) -> None:
        self.limits = limits or WebLimits()
        self.connections: set[WebConnection] = set()
        self._desk = desk
        self._chooser = chooser
        self._own_id = own_id
        self._gate = gate
        self.admission: StreamAdmission | None = None
        """Who admits the requests of guarded services; without one nobody gets in."""
        self.others_may: Callable[[ServiceName, GatewayId], bool] = lambda service, gateway_id: False
        """Whether another relay may serve what the gate of this one finds that it cannot decide."""
        self.handshakes = HandshakeTurns()
        self._rules: Mapping[ServiceName, WebRules] = {}
        self._given_back: set[WebConnection] = set()
        self._is_draining = False
        self._waiting = 0
        self._arrivals, self._arrived = trio.open_memory_channel[_Arrival](MAX_WAITING)

    @property
    def streams(self) -> int:
        """See `StreamTaker`."""
        return self._waiting + len(self.connections) - len(self._given_back)

    def services_in_use(self) -> Iterable[ServiceName]:
        """See `StreamTaker`."""
        return [connection.service_name for connection in self.connections if not connection.is_given_back]

    def reconfigure(self, rules: Mapping[ServiceName, WebRules]) -> None:
        """What services say from now on; connections that are open end as they began."""
        self._rules = dict(rules)

    def take(self, session: "Session", stream: Stream, service: AnyService, opening: Opening, gateway_id: GatewayId) -> None:
        """See `StreamTaker`."""
        rules = self._rules.get(service.name)
        if rules is None:
            self._desk.turn_down(stream, service, Code.NO_SERVICE, "not served here")
            return
        if not opening.trace:
            opening = opening._replace(trace=secrets.token_hex(4))
        tunnel = TunnelStream(session, stream, self._desk.reactor.call_later)
        try:
            self._arrivals.send_nowait(_Arrival(tunnel, service, rules, opening))
        except trio.WouldBlock:
            self._desk.turn_down(stream, service, Code.BUSY, "too many streams wait to be served")
            return
        except trio.BrokenResourceError:
            self._desk.turn_down(stream, service, Code.DRAINING, "this relay is going away")
            return
        self._waiting += 1
        self._desk.count_opening(service)
        is_for_gate = rules.tls is None and self._gate is not None and self._gate.concerns(service.name)
        if is_for_gate and self.others_may(service.name, gateway_id):
            self._desk.reactor.call_later(ACCEPT_AFTER_S, stream.accept)  # whoever serves it does so as soon as it is theirs
        else:
            stream.accept()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; connections that are open are reset then. Run it once."""
        try:
            with self._arrived:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.handshakes.run)
                    task_status.started()
                    async for arrival in self._arrived:
                        nursery.start_soon(self._serve, arrival)
        finally:
            self.abort_all()

    def drain(self) -> None:
        """Answer what was asked, and take no more requests."""
        self._is_draining = True
        for connection in list(self.connections):
            connection.drain()

    def abort_all(self) -> None:
        """See `StreamTaker`."""
        for connection in list(self.connections):
            if not connection.is_given_back:
                connection.tunnel.reset(Code.SHUTDOWN)
            connection.scope.cancel()

    async def _serve(self, arrival: _Arrival) -> None:
        opening, service = arrival.opening, arrival.service
        only = opening.node
        if opening.via is not None and isinstance(service, PoolService):
            only = self._own_id  # PROTOCOL.md, 6: whoever was redirected to serves the stream itself
        around = Surroundings(
            self._desk, self._chooser, self.limits, self._gate, self._given_back, self._own_id, self.admission, self.handshakes
        )
        connection = WebConnection(around, arrival.tunnel, service, arrival.rules, opening, only)
        self.connections.add(connection)
        self._waiting -= 1
        if self._is_draining:
            connection.drain()
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
            self._given_back.discard(connection)
            if not connection.is_given_back:
                self._desk.counters.bytes_in += arrival.tunnel.stream.bytes_in
                self._desk.counters.bytes_out += arrival.tunnel.stream.bytes_out
