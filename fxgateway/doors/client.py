"""Pump: one client from accept to close: a relay is chosen, and another one while nothing has been lost by it."""

import socket
from typing import TYPE_CHECKING, Final

from fxgateway.routing.table import Forward, Reject
from fxtunnel.codes import Code
from fxtunnel.engine.splice import Splice
from fxtunnel.model import RelayId

if TYPE_CHECKING:
    from fxgateway.doors.door import Door

MAX_ATTEMPTS: Final = 8
"""Relays tried for one client, at most; a cluster whose relays all refuse should not keep the gateway busy."""


class Client(Splice):
    """A client's socket. It is forwarded at once; its first bytes may already travel with the OPEN.

    Another relay is tried while the client can have lost nothing: before ACCEPT (what it sent is kept and replayed), or after it
    when not a byte has moved in either direction. Later a lost stream ends in RST: what a service may have acted on is never sent twice.
    """

    __slots__ = ("_tried", "address", "admitted_by", "door", "last_bytes", "moved_at")

    def __init__(self, door: "Door", sock: socket.socket, address: str) -> None:
        super().__init__(door.reactor, sock)
        self.door = door
        self.address = address
        self.admitted_by = door.name
        self.last_bytes = 0
        self.moved_at = door.reactor.now
        self._tried: tuple[RelayId, ...] = ()

    def begin(self, peer: str) -> None:
        """Choose a relay and open the stream; `peer` is the client's ip:port as OPEN carries it."""
        if self._forward(b"", self.door.tags(peer)):
            self.start()

    @property
    def moved_bytes(self) -> int:
        """Bytes moved so far, both ways, for the idle sweep."""
        return self.stream.bytes_in + self.stream.bytes_out if self.stream is not None else 0

    def on_accept(self) -> None:
        """See `Endpoint`."""
        self.door.opening.pop(self, None)

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        self._try_another()

    def on_redirect(self, relay: str) -> None:
        """See `Endpoint`."""
        self._try_another(RelayId(relay))

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        stream = self.stream
        if stream is None or self.closed:
            return
        untouched = not stream.bytes_in and not stream.bytes_out and not stream.fin_received
        if not stream.accepted or (untouched and code in (Code.LINK_LOST, Code.FENCED, Code.REVOKED, Code.SHUTDOWN, Code.DRAINING)):
            self._try_another()
        else:
            super().on_reset(code)

    def open_timed_out(self) -> None:
        """The relay has not answered the OPEN in time."""
        if self.stream is not None:
            self.stream.reset(Code.CANCELLED)
        self._try_another()

    def end_idle(self) -> None:
        """Nothing has moved for too long."""
        self.fail(Code.IDLE_TIMEOUT)

    def released(self) -> None:
        """See `Splice`."""
        self.door.client_released(self)

    def _try_another(self, named: RelayId | None = None) -> None:
        stream = self.stream
        if self.closed or stream is None:
            return
        self.door.opening.pop(self, None)  # to enter again at its end: it is in order of time
        self._forward(bytes(stream.early or b""), self.door.tags_of(self), named)

    def _forward(self, early: bytes, tags: bytes, named: RelayId | None = None) -> bool:
        while len(self._tried) < MAX_ATTEMPTS:
            relay = self.door.relays.named(named) if named is not None else None
            named = None
            if relay is None:
                match self.door.relays.routes.decide(self.door.service, self._tried):
                    case Forward(relay):
                        pass
                    case Reject(reason):
                        self.door.refused(reason.value)
                        self.abort()
                        return False
            self._tried = (*self._tried, relay.relay_id)
            session = relay.session_for_stream()
            stream = session.open_stream(tags, self) if session is not None else None
            if session is None or stream is None:
                continue
            self.door.opening[self] = self.reactor.now
            stream.replay(early)
            self.join(session, stream)
            if self._read_done:
                stream.fin()
            return True
        self.door.refused("too-many-attempts")
        self.abort()
        return False
