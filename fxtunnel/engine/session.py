"""Pump: a session: its streams, the TLS link it runs on now, and what happens between two links.

UP ──link lost──▶ HELD ──attach──▶ UP          HELD ──hold_s over──▶ CLOSED          any ──close, GOAWAY──▶ CLOSED
"""

import logging
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, SessionOwner, SessionStatistics, State, StreamSender
from fxtunnel.engine.reactor import ERROR, INCOMING, LINK_EVENTS, READ, READ_BUFFER_BYTES, WRITE, Reactor, Timer
from fxtunnel.engine.read_share import ReadShare
from fxtunnel.engine.send_scheduler import SPARSE_BYTES, SPARSE_TURN_BYTES, TURN_BYTES, SendScheduler, beside_bytes
from fxtunnel.engine.splice import Splice
from fxtunnel.engine.tls_calls import WRITE_BYTES, corked, keep_short, no_link, reason_of
from fxtunnel.errors import RemoteProtocolError
from fxtunnel.kit.link_tls import RECORD_BYTES, LinkSocket, ReadRecords, Send
from fxtunnel.model import SessionId
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import WindowBudget
from fxtunnel.protocol.heartbeats import next_beat
from fxtunnel.protocol.mux import Mux
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.replay import ReplayRing
from fxtunnel.protocol.stream import Stream

logger = logging.getLogger(__name__)

MIN_TURN_BYTES: Final = SPARSE_BYTES
"""With less room nobody is read, so that who is cut short by it is not taken for somebody who has little."""
GOODBYE_S: Final = 1.0


class Session:
    """One resumable set of streams. Begins HELD, without a link; `attach` gives it one.

    `received` may be quoted to the peer only while no link is attached: call `detach` first.
    """

    def __init__(
        self,
        reactor: Reactor,
        session_id: SessionId,
        owner: SessionOwner,
        config: SessionConfig,
        budget: WindowBudget,
        on_open: Callable[["Session", Stream, Opening], None] | None = None,
    ) -> None:
        self.id = session_id
        self.state = State.HELD
        self.resumed = 0
        self._reactor, self._owner, self._config = reactor, owner, config
        self._link: LinkSocket | None = None
        self._read_records: ReadRecords = no_link
        self._send: Send = no_link
        self._links = self._last_told = 0
        self._blocked = self._read_blocked = False
        self._interest = 0
        self._share = ReadShare(RECORD_BYTES, READ_BUFFER_BYTES)
        self._dirty = False
        self._scheduler = SendScheduler()
        self._last_arrival = reactor.now
        self._timer: Timer | None = None
        self.mux = Mux(
            ReplayRing(min(config.ring_bytes, config.max_ring_bytes), keep=config.resume),
            budget,
            max_streams=config.max_streams,
            max_window_bytes=config.max_window_bytes,
            wake=self.wake,
            crashed=reactor.crashed,
            on_open=None if on_open is None else lambda stream, opening: on_open(self, stream, opening),
        )
        self._arm(self._config.hold_s, self._hold_over)

    @property
    def received(self) -> int:
        """Bytes of the peer's sequence that have arrived."""
        return self.mux.parser.received

    @property
    def is_up(self) -> bool:
        """Whether a link is attached."""
        return self.state is State.UP

    @property
    def is_spent(self) -> bool:
        """Whether it takes no more streams (gateway): it is over, or has used all stream ids, of which none is used twice."""
        return self.state is State.CLOSED or self.mux.opened >= frames.MAX_STREAM_ID

    @property
    def is_bulk(self) -> bool:
        """Whether bulk passes, either way, or did a heartbeat ago: a stream that can be opened elsewhere should not wait behind it."""
        return self.mux.heartbeats.is_bulk(self.mux.passed_bytes)

    @property
    def has_delivered(self) -> bool:
        """Whether nothing is left to wait for of streams that have ended: the peer has acknowledged it, or the session is over."""
        return self.state is State.CLOSED or self.mux.has_delivered

    def press(self) -> None:
        """Have the peer acknowledge soon what was sent so far; once there is a link. Not of a session that is over."""
        self.mux.press()

    def statistics(self) -> SessionStatistics:
        """Counters now."""
        return SessionStatistics(self.id, self.state, self.resumed, self.mux.statistics())

    def open_stream(self, tags: bytes, splice: Splice) -> Stream | None:
        """Open a stream for `splice` (gateway); None when a limit is reached or the session is over. One that is spent ends."""
        if self.is_spent:
            self.close(Code.NORMAL, "it has had all the streams that it may have")
        return self.mux.open(tags, splice) if self.state is not State.CLOSED else None

    def has_told_of(self, stream: Stream) -> bool:
        """Whether the peer may have heard of a stream opened here: not of one that was opened while there was no link, nor since."""
        return self._link is not None or stream.id <= self._last_told

    @property
    def resumes(self) -> bool:
        """Whether it outlives its link: both ends keep what is not acknowledged."""
        return self.mux.ring.keep

    def forgo_resumption(self) -> None:
        """The peer does not resume: keep nothing for a repeat, send no ACKs; a lost link is the end. Before the first `attach`."""
        self.mux.ring.keep = False

    def attach(self, link: LinkSocket, peer_received: int) -> None:
        """Run on `link` from now on: a non-blocking TLS socket after its hello. The session owns it.

        Raises:
            RemoteProtocolError: the peer wants bytes that are no longer kept, or were never sent. The link is not taken over.
        """
        if self.state is State.CLOSED:
            raise RemoteProtocolError(Code.LINK_LOST, "the session is over")
        self.detach("another link takes over")
        self.mux.ring.rewind(peer_received)
        keep_short(link)
        self._reactor.register(link, self, LINK_EVENTS)
        self._link, self._interest = link, LINK_EVENTS
        self._read_records, self._send = link.calls()
        self.resumed, self._links = self._links, self._links + 1
        self.state = State.UP
        self._blocked = self._read_blocked = False
        self._last_arrival = self._reactor.now
        self._reactor.again(self)  # TLS may have buffered frames behind the hello; no edge will tell
        self._arm(self._config.heartbeat_s, self._beat)
        self.mux.tick(self._reactor.now)
        self.wake()

    def detach(self, reason: str) -> None:
        """Retire the current link, so that `received` stands still. The session is held."""
        if self.state is State.UP:
            self._drop_link()
            self.state = State.HELD
            self._arm(self._config.hold_s, self._hold_over)
            logger.info("link of session %s retired: %s", self.id, reason)

    def close(self, code: Code, text: str = "") -> None:
        """End the session: GOAWAY to the peer, RST to every socket. The link may outlive it by GOODBYE_S to deliver the GOAWAY."""
        if self.state is State.CLOSED:
            return
        try:
            if self._link is not None:
                self._say_goodbye(self._link, frames.encode_goaway(code, text))
        finally:
            self._finish(code, text)

    def cancel_turn(self, sender: StreamSender) -> None:
        """The sender goes elsewhere; it must not be read on behalf of this session any more."""
        self._scheduler.cancel(sender)

    def want_turn(self, sender: StreamSender) -> None:
        """A socket or a task has bytes; it gets its turn. The sender keeps itself from asking twice."""
        self._scheduler.want(sender)
        if not self._dirty:
            self.wake()

    def has_room(self, limit_bytes: int) -> int:
        """See `Carrier`."""
        if self._scheduler.waiting or self._blocked or self._link is None or self.mux.ring.unsent_bytes > RECORD_BYTES:
            return 0
        return max(0, min(limit_bytes, SPARSE_TURN_BYTES, self.mux.data_room - frames.HEADER_BYTES))

    def wake(self) -> None:
        """There is something to send: write at the end of this turn."""
        if not self._dirty:
            self._dirty = True
            self._reactor.flush_later(self)

    def on_event(self, events: int) -> None:
        """From the reactor: the link can be read or written."""
        link = self._link
        if link is None:
            return
        if events & WRITE and self._blocked:
            self._blocked = False
            self.wake()
            if self._read_blocked:
                self._read_blocked = False
                events |= READ
            self._listen(link)
        if events & INCOMING:
            if self.state is not State.CLOSED:
                self._read(link)
            elif events & ERROR:
                self._drop_link()
            else:
                self._listen(link)

    def on_crash(self) -> None:
        """From the reactor: a bug of ours ends this session, and no other."""
        self.close(Code.INTERNAL_ERROR)

    def flush(self) -> None:
        """From the reactor, at the end of a turn: write what waits, and read more from sockets while the link takes it."""
        self._dirty = False
        link, mux = self._link, self.mux
        if mux.overflow and mux.overrun and self.state is not State.CLOSED:
            return self.close(Code.OVERLOAD, "too many unacknowledged control frames")
        if link is None or self._blocked:
            return
        ring = mux.ring
        joins = self._scheduler.waiting and not mux.overflow and ring.head - ring.sent < RECORD_BYTES  # it leaves with what those write
        if not joins and (ring.sent != ring.head or mux.overflow) and not self._write(link):
            return
        if self._scheduler.waiting:
            may_go_on = self._fill()
            if self._write(link) and may_go_on and mux.data_room >= MIN_TURN_BYTES + frames.HEADER_BYTES:
                self.wake()  # the rest in the next turn: others' events come between
        elif self.state is State.CLOSED:
            self._drop_link(GOODBYE_S)

    def _fill(self) -> bool:
        """One turn: up to TURN_BYTES from those who wait. Whether somebody is left who may go on in the next."""
        turns, mux, ring = self._scheduler, self.mux, self.mux.ring
        filled, most_bytes = 0, beside_bytes(ring.size_bytes, mux.min_rtt_s)
        while turns.waiting and filled < TURN_BYTES:
            room = mux.data_room - frames.HEADER_BYTES
            if room < MIN_TURN_BYTES:
                mux.grow_ring(self._config.max_ring_bytes)
                return True
            if (chosen := turns.next(filled, ring.head, most_bytes - ring.head + ring.acked)) is None:
                if most_bytes == ring.size_bytes >> 1:  # the ring is what is short; otherwise it is the path
                    mux.grow_ring(self._config.max_ring_bytes)
                mux.ask()
                return False
            try:
                filled += chosen[0].read_turn(min(chosen[1], room)) or 256
                turns.took(chosen[0], ring.head)
            except Exception:
                self._reactor.crashed(chosen[0])
            if turns.is_beside(ring.head):
                mux.ask()
        return turns.waiting > 0

    def _write(self, link: LinkSocket) -> bool:
        """Send what the ring holds, several records as few segments. True: all of it; False: the link is full, or gone."""
        is_one = self.mux.ring.head - self.mux.ring.sent <= RECORD_BYTES
        return self._write_records(link) if is_one else corked(link, self._write_records, link)

    def _write_records(self, link: LinkSocket) -> bool:
        mux, ring = self.mux, self.mux.ring
        while True:
            if ring.sent == ring.head:
                if mux.overflow:
                    mux.refill()
                if ring.sent == ring.head:
                    return True
            try:
                count = self._send(ring.unsent(WRITE_BYTES))
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._blocked = True
                self._listen(link)
                return False
            except (OSError, ValueError) as exc:
                self._lost(reason_of(exc))
                return False
            ring.advance(count)

    def _listen(self, link: LinkSocket) -> None:
        """Hear of what can be acted on, and of nothing else: level-triggered events come back until something is done about them."""
        events = 0 if self._read_blocked or self.state is State.CLOSED else LINK_EVENTS
        if self._blocked:
            events |= WRITE
        if events != self._interest:
            self._interest = events
            self._reactor.modify(link, events)

    def _read(self, link: LinkSocket) -> None:
        buffer, filled = self._reactor.read_buffer, 0
        lost: str | None = None
        try:
            # A short record is most likely the last of what was written; if not, the next turn is told.
            filled = self._read_records(buffer, self._share.limit_bytes - RECORD_BYTES + 1)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            # The peer's KeyUpdate has to be answered first (RFC 8446, 4.6.3), and the link is full.
            self._blocked = self._read_blocked = True
            self._listen(link)
        except (OSError, ValueError) as exc:
            lost = reason_of(exc)
        if filled:
            self._last_arrival = self._reactor.now
            is_short = filled < RECORD_BYTES  # as most are: nothing smaller is read in a turn
            began_s = 0.0 if is_short else time.monotonic()
            try:
                self.mux.receive(buffer[:filled], self._reactor.now)
                if not is_short:
                    self._share.dealt_with(filled, time.monotonic() - began_s)
            except RemoteProtocolError as exc:
                logger.warning("session %s: the peer broke the protocol: %s", self.id, exc)
                self.close(exc.code, str(exc))
                return
            if self.mux.goaway is not None:
                self._drop_link()
                self._finish(*self.mux.goaway)
                return
            if not self._dirty and (self._scheduler.waiting or self.mux.ring.sent != self.mux.ring.head):
                self.wake()
        if lost is not None:
            self._lost(lost)

    def _lost(self, reason: str) -> None:
        if self.state is not State.UP:
            return
        self._drop_link()
        self.state = State.HELD
        if not self.mux.ring.keep:
            self._finish(Code.LINK_LOST, reason)
            return
        self._arm(self._config.hold_s, self._hold_over)
        self._owner.on_link_down(self, reason)

    def _drop_link(self, after_s: float = 0.0) -> None:
        link, self._link = self._link, None
        self._read_records = self._send = no_link
        if link is None:
            return
        self._last_told = self.mux.opened
        self._reactor.unregister(link)
        if self.state is State.CLOSED:
            self.mux.dispose()
        if not after_s:
            link.close()
            return
        with suppress(OSError):
            # A close with unread bytes would be a RST, which can overtake the GOAWAY.
            socket.socket.shutdown(link, socket.SHUT_WR)
        self._reactor.call_later(after_s, link.close)

    def _say_goodbye(self, link: LinkSocket, goaway: bytes) -> None:
        ring = self.mux.ring
        ring.acknowledge(ring.sent)
        ring.keep = False  # nothing is sent again from here on, so full replay memory need not keep the GOAWAY back
        self.mux.overflow += goaway  # not by `queue`, which refuses what comes behind an overrun
        if not self._blocked and self._write(link):
            self._drop_link(GOODBYE_S)
        elif self._link is not None:
            self._reactor.call_later(GOODBYE_S, self._drop_link)  # until then `flush` goes on writing

    def _hold_over(self) -> None:
        if self.state is State.HELD:
            self._finish(Code.LINK_LOST, f"no link for {self._config.hold_s:g} s")

    def _beat(self) -> None:
        if self.state is not State.UP:
            return
        config, silent_s = self._config, self._reactor.now - self._last_arrival
        if silent_s >= config.dead_after_s:
            return self._lost(f"nothing arrived for {silent_s:.1f} s")
        if is_idle := self.mux.heartbeats.is_idle(self.mux.passed_bytes):
            self.mux.shrink_ring()
        is_due, wait_s = next_beat(silent_s, config.heartbeat_s, config.dead_after_s, config.yield_s, is_idle=is_idle)
        self._arm(wait_s, self._beat)
        if is_due:
            self.mux.tick(self._reactor.now)

    def _arm(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._reactor.call_later(delay_s, callback)

    def _finish(self, code: Code, text: str) -> None:
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
        self._scheduler.clear()
        self.mux.reset_all(code)
        self._owner.on_closed(self, code, text)
        if self._link is None:
            self.mux.dispose()
