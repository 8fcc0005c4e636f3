"""Pump: one client from accept to close: a relay is chosen, and another one while nothing has been lost by it."""

import socket
from typing import TYPE_CHECKING, Final, assert_never

from fxgateway.routing.journey import MAX_ATTEMPTS, Ask, GiveUp, Journey, PassOn, next_step
from fxgateway.routing.offers import RejectReason
from fxtunnel.codes import Code
from fxtunnel.engine.session import Session
from fxtunnel.engine.splice import Splice
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import TAG_CLIENT, encode_redirects, encode_tag

if TYPE_CHECKING:
    from fxgateway.doors.door import Door
    from fxgateway.doors.recorded import Diary

_AT_THE_START: Final = Journey()


class Client(Splice):
    """A client's socket. It is forwarded at once; its first bytes may already travel with the OPEN.

    Another relay is tried while the client can have lost nothing: before ACCEPT (what it sent is kept and replayed), or after it
    when not a byte has moved in either direction. Later a lost stream ends in RST: what a service may have acted on is never sent twice.
    A relay may redirect to another one; if that one fails, the first is asked again for another way before its turn is over.
    """

    __slots__ = (
        "_open_ends_at",
        "address",
        "diary",
        "door",
        "journey",
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
        """OPEN's tags but for the client's own address."""
        self.trace = ""
        """Its mark in the logs of gateway and relay, if it has one."""
        self.diary: Diary | None = None
        """If the access log was on when it came."""
        self.named = ""
        """The client's ip:port if it was told (at first by accept, or a PROXY header); else the socket knows it."""
        self.relay_name = ""
        """The relay on which its stream was opened last, wherever the journey leads next; empty before any was."""
        self.last_bytes = 0
        self.moved_at = door.reactor.now
        self.journey = _AT_THE_START
        """How far it has got; `next_step` says how it goes on."""
        self._open_ends_at = 0
        """Where in the session's sequence its OPEN ends."""
        if not address:  # of a unix socket
            self.reads_short()

    def has_spoken(self) -> None:
        """What it said first was looked at and is still in the socket: it goes with the OPEN, before any event tells of it."""
        self._readable = True

    def begin(self, peer: str, said: bytes = b"") -> None:
        """Choose a relay and open the stream; `peer` is the client's ip:port as OPEN carries it.

        `said` has been taken from the socket already: at most EARLY_BYTES.
        """
        if self._forward(peer, said):
            self.start()

    @property
    def has_ended(self) -> bool:
        """Whether it has said all that it will say."""
        return self._read_done

    @has_ended.setter
    def has_ended(self, has_ended: bool) -> None:
        self._read_done = has_ended

    def give_away(self) -> socket.socket:
        """It is another process's; the socket, which is the caller's now. Nobody here counts it any more."""
        self.closed = True
        if self._queued and self.session is not None:
            self.session.cancel_turn(self)
        self.reactor.unregister(self.sock)  # while another process has it, closing it here would not take it out of the epoll
        self.door.client_given_away(self)
        return self.sock

    def turn_away(self, reason: str) -> None:
        """Nobody serves it."""
        self.door.refused(reason)
        self.abort()

    def on_accept(self) -> None:
        """See `Endpoint`."""
        self.door.opening.pop(self, None)

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        if code.is_final:
            self.turn_away(code.label)  # it concerns the client: what one relay says, another one must not be asked to overrule
        else:
            self._go_on(self.journey.refused())

    def on_redirect(self, relay: str) -> None:
        """See `Endpoint`."""
        self._go_on(self.journey.redirected(relay))

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        stream = self.stream
        if stream is None or self.closed:
            return
        untouched = not stream.bytes_in and not stream.bytes_out and not stream.fin_received
        if not stream.accepted or (untouched and code in (Code.LINK_LOST, Code.FENCED, Code.REVOKED, Code.SHUTDOWN, Code.DRAINING)):
            self._go_on(self.journey.lost() if code is Code.LINK_LOST else self.journey.refused())
        else:
            super().on_reset(code)

    def open_timed_out(self) -> None:
        """The relay has not answered the OPEN in time."""
        if self.stream is not None:
            self.stream.reset(Code.CANCELLED)
        self._go_on(self.journey.refused())

    @property
    def waits_for_link(self) -> bool:
        """Whether its OPEN has not been sent, because the session has lost its link: whoever takes it now is the first to hear of it."""
        session = self.session
        return session is not None and not session.is_up and session.mux.ring.sent < self._open_ends_at

    @property
    def wish(self) -> tuple[ServiceName, tuple[RelayId, ...], RelayId | None]:
        """What decides where it could go instead of waiting: service, relays that will not have it, and the one it must go to, if any."""
        return self.service, self.journey.asked[:-1], self.journey.target

    def go_on_elsewhere(self) -> None:
        """It `waits_for_link`, and there is a relay that could take it now: by another link, or another relay."""
        if self.stream is None or self.journey.attempts >= MAX_ATTEMPTS:
            return
        self.stream.reset(Code.CANCELLED)
        self._go_on(self.journey.unasked())

    def end_idle(self) -> None:
        """Nothing has moved for too long."""
        self.fail(Code.IDLE_TIMEOUT)

    def released(self) -> None:
        """See `Splice`."""
        self.door.client_released(self)

    def _go_on(self, journey: Journey) -> None:
        """The relay that has the stream does not serve it."""
        stream = self.stream
        if self.closed or stream is None:
            return
        self.journey = journey
        self.door.opening.pop(self, None)  # to enter again at its end: it is in order of time
        self._forward(self.named or self.peer(), bytes(stream.early or b""))

    def peer(self) -> str:
        """Its ip:port as the socket knows it."""
        try:
            return peer_text(self.sock.getpeername())
        except OSError:
            return self.address

    def _forward(self, peer: str, early: bytes) -> bool:
        """Take the next steps until there is a stream; False when the client has ended here instead."""
        relays = self.door.relays
        while True:
            step = next_step(self.journey, self.service, relays)
            self.journey = step.journey
            match step:
                case Ask():
                    session = step.relay.session_for_stream()
                    if session is not None and self._open(session, step.relay.relay_id, peer, early):
                        return True
                    self.journey = step.journey.refused()
                case PassOn():
                    if step.relay.take(self, early):
                        return False
                    self.journey = step.otherwise
                case GiveUp():
                    if step.reason is RejectReason.NO_RELAY:
                        self.door.unserved.note(self.door.name, self.service)
                    self.turn_away(step.reason.value)
                    return False
                case _:
                    assert_never(step)

    def _open(self, session: Session, relay_id: RelayId, peer: str, early: bytes) -> bool:
        """Open the stream on this session. What fails after that ends the stream with the client."""
        journey = self.journey
        tags = encode_tag(TAG_CLIENT, peer) + self.tags if peer else self.tags
        if journey.target is not None or journey.avoid:  # it was redirected
            tags += encode_redirects(journey.via, journey.avoid)
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
