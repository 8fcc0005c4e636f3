"""Pump: one client from accept to close: a relay is chosen, and another one as long as that cannot lose any of the client's bytes."""

import socket
from typing import TYPE_CHECKING, Final, assert_never

from fxgateway.routing.failover import MAX_ATTEMPTS, FailoverState, GiveUp, OpenOn, PassOn, next_step
from fxgateway.routing.offers import RejectReason
from fxgateway.routing.repeating import may_be_repeated
from fxtunnel.codes import Code
from fxtunnel.engine.session import Session
from fxtunnel.engine.splice import Splice
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import TAG_CLIENT, encode_redirects, encode_tag
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    from fxgateway.doors.door import Door
    from fxgateway.doors.recorded import AccessRecord

UNANSWERED: Final = "unanswered"
"""Why a client was turned away whose relay may have served it: nobody knows, and asking another one could repeat it."""
_AT_THE_START: Final = FailoverState()


class Client(Splice):
    """A client's socket. It is forwarded at once; its first bytes may travel with the OPEN.

    Another relay is tried as long as nothing can have been lost: before ACCEPT (what it sent is kept and replayed), or after it
    when not a byte has moved in either direction. Later a lost stream ends in RST: what a service may have acted on is never sent twice.
    Nor is it where nobody can know whether an ACCEPT was on its way, unless it `may_be_repeated`.
    A relay may redirect to another one; if that one fails, the first is asked again for another way before its turn is over.
    """

    __slots__ = (
        "_open_ends_at",
        "access_record",
        "address",
        "door",
        "failover",
        "last_bytes",
        "moved_at",
        "named",
        "relay_name",
        "service",
        "tags",
        "trace",
    )

    def __init__(self, door: "Door", sock: socket.socket, address: str, service: ServiceName, tags: bytes) -> None:
        super().__init__(door.reactor, sock)
        self.door = door
        self.address = address
        self.service = service
        self.tags = tags
        """The OPEN's tags, without the client's own address."""
        self.trace = ""
        """The id under which the logs of gateway and relay mention it; empty if it has none."""
        self.access_record: AccessRecord | None = None
        """None unless the access log was on when it came."""
        self.named = ""
        """The client's ip:port where accept or a PROXY header has told it; if empty, ask the socket (`peer`)."""
        self.relay_name = ""
        """The relay on which its stream was last opened; empty before the first."""
        self.last_bytes = 0
        self.moved_at = door.reactor.now
        self.failover = _AT_THE_START
        """How far it has got; `next_step` says how it goes on."""
        self._open_ends_at = 0
        """The position in the session's byte sequence at which its OPEN ends."""
        if not address:  # a unix socket
            self.reads_short()

    def has_spoken(self) -> None:
        """Its first bytes have been peeked at and are still in the socket: read them with the OPEN, without waiting for an event."""
        self._readable = True

    def begin(self, peer: str, said: bytes = b"") -> None:
        """Choose a relay and open the stream; `peer` is the client's ip:port as OPEN carries it.

        `said` has been taken from the socket already: at most EARLY_BYTES.
        """
        if self._forward(peer, said):
            self.start()

    @property
    def has_ended(self) -> bool:
        """Whether the client has sent its FIN, and everything before it has been read."""
        return self._read_done

    @has_ended.setter
    def has_ended(self, has_ended: bool) -> None:
        self._read_done = has_ended

    def give_away(self) -> socket.socket:
        """Hand the client to another process. Returns the socket, which the caller owns now; nobody here counts the client any more."""
        self.closed = True
        if self._queued and self.session is not None:
            self.session.cancel_turn(self)
        self.reactor.unregister(self.sock)  # while another process has it, closing it here would not take it out of the epoll
        self.door.client_given_away(self)
        return self.sock

    def turn_away(self, reason: str) -> None:
        """No relay serves it: count it, and end it with RST. `reason` is a word for metrics."""
        self.door.refused(reason)
        self.abort()

    def on_accept(self) -> None:
        """See `Endpoint`."""
        self.door.opening.pop(self, None)
        self._open_ends_at = 0  # 32 bytes of an idle client
        if self in self.door.taken_back:
            self.end_unanswered()  # the relay has done what it was asked before it heard that nobody wants it

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        if code.is_final:
            self.turn_away(code.label)  # it is about this client: another relay must not be asked to overrule it
        else:
            self._go_on(self.failover.refused())

    def on_redirect(self, relay: str) -> None:
        """See `Endpoint`."""
        self._go_on(self.failover.redirected(relay))

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        stream = self.stream
        if stream is None or self.closed:
            return
        untouched = not stream.bytes_in and not stream.bytes_out and not stream.fin_received
        if not stream.accepted and self._is_unknown(stream):
            self.end_unanswered()
        elif not stream.accepted or (untouched and code in (Code.LINK_LOST, Code.FENCED, Code.REVOKED, Code.SHUTDOWN, Code.DRAINING)):
            # Who has taken the relay's name is another process, which may serve whom that one did not.
            self._go_on(self.failover.lost() if code in (Code.LINK_LOST, Code.FENCED) else self.failover.refused())
        else:
            super().on_reset(code)

    def open_timed_out(self) -> None:
        """The relay has not answered the OPEN in time. What it may not be told twice is told to another one when that is confirmed."""
        stream = self.stream
        if stream is not None and not may_be_repeated(bytes(stream.early or b"")):
            self.door.taken_back[self] = self.reactor.now, stream.take_back()
        else:
            if stream is not None:
                stream.reset(Code.CANCELLED)
            self._go_on(self.failover.refused())

    def has_confirmed(self, mark: int) -> bool:
        """Whether its relay has confirmed by this mark that it has not accepted what it took too long for, and never will."""
        return self.session is not None and mark <= self.session.mux.passed_mark

    def go_on_confirmed(self) -> None:
        """Its relay `has_confirmed`: another one may have it."""
        stream = self.stream
        if stream is not None and not stream.closed:
            stream.mux.forget(stream)
            self._go_on(self.failover.refused())

    def end_unanswered(self) -> None:
        """Its relay may have accepted it, and it cannot be served by another one."""
        if self.stream is not None:
            self.stream.reset(Code.CANCELLED)
        self.turn_away(UNANSWERED)

    def _is_unknown(self, stream: Stream) -> bool:
        """Whether a stream that has ended before an ACCEPT came may have been accepted, and what was sent on it must not be repeated.

        A relay that ends the stream or the session by itself has sent any ACCEPT before that, and one that was not told of it has none.
        """
        session = self.session
        by_relay = stream.mux.goaway is not None or (session is not None and (session.is_up or not session.has_told_of(stream)))
        return not by_relay and not may_be_repeated(bytes(stream.early or b""))

    @property
    def waits_for_link(self) -> bool:
        """Whether its OPEN is still unsent because the session has lost its link, so that no relay has heard of the client yet."""
        session = self.session
        return session is not None and not session.is_up and session.mux.ring.sent < self._open_ends_at

    @property
    def route_key(self) -> tuple[ServiceName, tuple[RelayId, ...], RelayId | None]:
        """What decides where it could go instead of waiting: its service, the relays that refused, and its target, if any."""
        return self.service, self.failover.asked[:-1], self.failover.target

    def redispatch(self) -> None:
        """It `waits_for_link`, but could be served now, by another relay or over another link: open its stream again."""
        stream = self.stream
        if stream is None or self.failover.attempts >= MAX_ATTEMPTS or not may_be_repeated(bytes(stream.early or b"")):
            return  # the relay will see the OPEN and what followed it, and only then that they are void
        stream.reset(Code.CANCELLED)
        self._go_on(self.failover.unasked())

    def end_idle(self) -> None:
        """Nothing has moved for too long."""
        self.fail(Code.IDLE_TIMEOUT)

    def released(self) -> None:
        """See `Splice`."""
        self.door.client_released(self)

    def _go_on(self, failover: FailoverState) -> None:
        """The relay that has the stream does not serve it: take the next steps of `failover`."""
        stream = self.stream
        if self.closed or stream is None:
            return
        self.failover = failover
        self.door.taken_back.pop(self, None)
        self.door.opening.pop(self, None)  # so that it is entered again at the end: `opening` is in order of time
        self._forward(self.named or self.peer(), bytes(stream.early or b""))

    def peer(self) -> str:
        """Its ip:port as the socket knows it."""
        try:
            return peer_text(self.sock.getpeername())
        except OSError:
            return self.address

    def _forward(self, peer: str, early: bytes) -> bool:
        """Take the next steps of the failover until a stream is open. False: the client has ended here, or is another process's."""
        relays = self.door.relays
        while True:
            step = next_step(self.failover, self.service, relays)
            self.failover = step.failover
            match step:
                case OpenOn():
                    session = step.relay.session_for_stream()
                    if session is not None and self._open(session, step.relay.relay_id, peer, early):
                        return True
                    self.failover = step.failover.refused()
                case PassOn():
                    if step.relay.take(self, early):
                        return False
                    self.failover = step.otherwise
                case GiveUp():
                    if step.reason is RejectReason.NO_RELAY:
                        self.door.outages.note(self.door.name, self.service)
                    self.turn_away(step.reason.value)
                    return False
                case _:
                    assert_never(step)

    def _open(self, session: Session, relay_id: RelayId, peer: str, early: bytes) -> bool:
        """Open the stream on this session; False if it takes no more. What fails after that ends the stream together with the client."""
        failover = self.failover
        tags = encode_tag(TAG_CLIENT, peer) + self.tags if peer else self.tags
        if failover.target is not None or failover.avoid:  # it was redirected
            tags += encode_redirects(failover.via, failover.avoid)
        stream = session.open_stream(tags, self)
        if stream is None:
            return False
        self.relay_name = relay_id
        self.join(session, stream)
        self._open_ends_at = session.mux.ring.head + len(session.mux.overflow)
        self.door.opening[self] = self.reactor.now
        stream.replay(early)
        if self._read_done:
            stream.fin()
        return True


def peer_text(peer: object) -> str:
    """A socket's address as OPEN carries it; empty for a unix socket."""
    if not isinstance(peer, tuple):
        return ""
    host, port = peer[0], peer[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
