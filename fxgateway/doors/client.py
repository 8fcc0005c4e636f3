"""Pump: one client from accept to close: a relay is chosen, and another one while nothing has been lost by it."""

import socket
from typing import TYPE_CHECKING, Final

from fxgateway.doors.elsewhere import MAX_HOPS, Elsewhere, Journey
from fxgateway.routing.table import Forward, Reject
from fxtunnel.codes import Code
from fxtunnel.engine.splice import Splice
from fxtunnel.model import RelayId, ServiceName, is_name
from fxtunnel.protocol.opening import MAX_AVOIDED, TAG_CLIENT, encode_redirects, encode_tag

if TYPE_CHECKING:
    from fxgateway.doors.door import Door
    from fxgateway.doors.recorded import Diary

MAX_ATTEMPTS: Final = 8
"""Streams opened for one client, at most; a cluster whose relays all refuse or redirect should not keep the gateway busy."""


class Client(Splice):
    """A client's socket. It is forwarded at once; its first bytes may already travel with the OPEN.

    Another relay is tried while the client can have lost nothing: before ACCEPT (what it sent is kept and replayed), or after it
    when not a byte has moved in either direction. Later a lost stream ends in RST: what a service may have acted on is never sent twice.
    A relay may redirect to another one; if that one fails, the first is asked again for another way before its turn is over.
    """

    __slots__ = (
        "_asked",
        "_attempts",
        "_avoid",
        "_open_ends_at",
        "_target",
        "address",
        "diary",
        "door",
        "hops",
        "last_bytes",
        "moved_at",
        "named",
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
        self.last_bytes = 0
        self.moved_at = door.reactor.now
        self.hops = 0
        """Processes it was passed on by."""
        self._attempts = 0
        self._asked: tuple[RelayId, ...] = ()
        """Relays asked on their own account. The last of them is the one that redirected to `_target`."""
        self._target: RelayId | None = None
        self._avoid: tuple[RelayId, ...] = ()
        """Relays that were redirected to in vain."""
        self._open_ends_at = 0
        """Where in the session's sequence its OPEN ends."""

    def has_spoken(self) -> None:
        """What it said first was looked at and is still in the socket: it goes with the OPEN, before any event tells of it."""
        self._readable = True

    def begin(self, peer: str, said: bytes = b"") -> None:
        """Choose a relay and open the stream; `peer` is the client's ip:port as OPEN carries it.

        `said` has been taken from the socket already: at most EARLY_BYTES.
        """
        if self._forward(said, self._tags(peer)):
            self.start()

    def go_on(self, journey: Journey) -> None:
        """As `begin`, for a client that another process has passed on."""
        self._asked, self._target, self._avoid = journey.asked, journey.target, journey.avoid
        self._attempts, self.hops, self._read_done = journey.attempts, journey.hops, journey.has_ended
        if self._forward(journey.early, self._tags(self.named or self.peer()), asks_again=journey.target is None):
            self.start()

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

    @property
    def relay_name(self) -> str:
        """The relay that was asked last; empty before any was."""
        return self._target or (self._asked[-1] if self._asked else "")

    @property
    def moved_bytes(self) -> int:
        """Bytes moved so far, both ways, for the idle sweep."""
        return self.stream.bytes_in + self.stream.bytes_out if self.stream is not None else 0

    def on_accept(self) -> None:
        """See `Endpoint`."""
        self.door.opening.pop(self, None)

    def on_refuse(self, code: Code, text: str) -> None:
        """See `Endpoint`."""
        if code.is_final:
            self.turn_away(code.label)  # it concerns the client: what one relay says, another one must not be asked to overrule
        else:
            self._try_another()

    def on_redirect(self, relay: str) -> None:
        """See `Endpoint`."""
        # PROTOCOL.md, 6: what cannot be followed is a REFUSE, of the relay that was redirected to as well as of the one that redirects.
        if self._target is None and is_name(relay) and relay not in self._avoid and len(self._avoid) < MAX_AVOIDED:
            self._target = RelayId(relay)
            self._open_again(asks_again=False)
        else:
            self._try_another()

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`."""
        stream = self.stream
        if stream is None or self.closed:
            return
        untouched = not stream.bytes_in and not stream.bytes_out and not stream.fin_received
        if not stream.accepted or (untouched and code in (Code.LINK_LOST, Code.FENCED, Code.REVOKED, Code.SHUTDOWN, Code.DRAINING)):
            if code is Code.LINK_LOST and self._target is None:
                self._asked = self._asked[:-1]  # it has refused nothing, and may have another link by now
            self._try_another()
        else:
            super().on_reset(code)

    def open_timed_out(self) -> None:
        """The relay has not answered the OPEN in time."""
        if self.stream is not None:
            self.stream.reset(Code.CANCELLED)
        self._try_another()

    @property
    def waits_for_link(self) -> bool:
        """Whether its OPEN has not been sent, because the session has lost its link: whoever takes it now is the first to hear of it."""
        session = self.session
        return session is not None and not session.is_up and session.mux.ring.sent < self._open_ends_at

    @property
    def wish(self) -> tuple[ServiceName, tuple[RelayId, ...], RelayId | None]:
        """What decides where it could go instead of waiting: service, relays that will not have it, and the one it must go to, if any."""
        return self.service, self._asked[:-1], self._target

    def go_on_elsewhere(self) -> None:
        """It `waits_for_link`, and there is a relay that could take it now: by another link, or another relay."""
        if self.stream is None or self._attempts >= MAX_ATTEMPTS:
            return
        self.stream.reset(Code.CANCELLED)
        if self._target is None:
            self._asked = self._asked[:-1]  # that one was not asked after all
        self._open_again(asks_again=False)

    def end_idle(self) -> None:
        """Nothing has moved for too long."""
        self.fail(Code.IDLE_TIMEOUT)

    def released(self) -> None:
        """See `Splice`."""
        self.door.client_released(self)

    def _try_another(self) -> None:
        """The relay that has the stream cannot serve it: back to the one that redirected there, or on by the routes."""
        self._open_again(asks_again=self._give_up_target())

    def _give_up_target(self) -> bool:
        target, self._target = self._target, None
        if target is not None:
            self._avoid = (*self._avoid, target)
        return target is not None

    def _open_again(self, *, asks_again: bool) -> None:
        stream = self.stream
        if self.closed or stream is None:
            return
        self.door.opening.pop(self, None)  # to enter again at its end: it is in order of time
        self._forward(bytes(stream.early or b""), self._tags(self.named or self.peer()), asks_again=asks_again)

    def _tags(self, peer: str) -> bytes:
        return encode_tag(TAG_CLIENT, peer) + self.tags if peer else self.tags

    def peer(self) -> str:
        """Its ip:port as the socket knows it."""
        try:
            return peer_text(self.sock.getpeername())
        except OSError:
            return self.address

    def _forward(self, early: bytes, tags: bytes, *, asks_again: bool = False) -> bool:
        """Open the stream on `_target`, or on the relay that redirected last (`asks_again`), or on the best that was not asked yet."""
        relays = self.door.relays
        while self._attempts < MAX_ATTEMPTS:
            relay = None
            if self._target is not None:
                relay = relays.named(self._target) if self._target != self._asked[-1] else None
                if relay is None:
                    asks_again = self._give_up_target()
                    continue
            elif asks_again:
                relay = relays.named(self._asked[-1])
                asks_again = False
            if relay is None:
                match relays.routes.decide(self.service, self._asked):
                    case Forward(relay):
                        self._asked = (*self._asked, relay.relay_id)
                    case Reject(reason):
                        self.turn_away(reason.value)
                        return False
            if isinstance(relay, Elsewhere):
                journey = Journey(self._asked, self._target, self._avoid, self._attempts, self.hops + 1, self._read_done, early)
                if self.hops < MAX_HOPS and relay.take(self, journey):
                    return False
                session = None
            else:
                session = relay.session_for_stream()
            self._attempts += 1
            extra = encode_redirects(self._asked[-1] if self._target is not None else None, self._avoid)
            stream = session.open_stream(tags + extra, self) if session is not None else None
            if session is None or stream is None:
                asks_again = self._give_up_target()
                continue
            self.door.opening[self] = self.reactor.now
            self._open_ends_at = session.mux.ring.head + len(session.mux.overflow)
            stream.replay(early)
            self.join(session, stream)
            if self._read_done:
                stream.fin()
            return True
        self.turn_away("too-many-attempts")
        return False


def peer_text(peer: object) -> str:
    """A socket's address as OPEN carries it; empty for a unix socket."""
    if not isinstance(peer, tuple):
        return ""
    host, port = peer[0], peer[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
