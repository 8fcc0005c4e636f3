"""Pure: the streams of one session. Bytes and `now` in; frames in a ring and calls to endpoints out. No sockets.

    OPEN → (ACCEPT | REFUSE | REDIRECT) → DATA, CREDIT, FIN each way → closed        RESET from anywhere → closed

The gateway opens, the relay accepts (PROTOCOL.md, 6). What a stream is attached to is its `Endpoint`: the engine's is a socket.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fxtunnel.codes import Code
from fxtunnel.errors import LocalProtocolError, RemoteProtocolError
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import MIN_GROWTH_RTT_S, ReceiveWindow, WindowBudget
from fxtunnel.protocol.endpoint import Endpoint
from fxtunnel.protocol.frames import EARLY_BYTES, MAX_CREDIT, MAX_STREAM_ID
from fxtunnel.protocol.heartbeats import Heartbeats
from fxtunnel.protocol.opening import Opening, UnsupportedTag, decode_open
from fxtunnel.protocol.parser import FrameParser
from fxtunnel.protocol.replay import ReplayRing
from fxtunnel.protocol.stream import Stream

ACK_EVERY_BYTES: Final = 262_144
"""A receiver acknowledges at least this often (PROTOCOL.md, 7)."""
ASK_EVERY_BYTES: Final = 65_536
"""A sender that wants to hear of less asks for it (`Mux.ask`)."""
_ASKS: Final = frames.encode_u64(frames.PING, 0)
_MARK: Final = 1 << 63
"""In a PING that marks a place in the sequence. Those that measure carry a time, which is less."""
RING_RESERVE_BYTES: Final = 16_384
"""Room in the ring that DATA leaves to control frames, so that ACK and CREDIT get through when replay memory is full."""
MAX_OVERFLOW_BYTES: Final = 4_194_304
"""Control frames that wait for room in the ring, at most; a peer that drives it further is cut off."""


@dataclass(frozen=True, slots=True)
class MuxStatistics:
    """A snapshot of one session's counters."""

    streams: int
    opened: int
    bytes_in: int
    bytes_out: int
    min_rtt_s: float


class Mux:
    """The streams of one session and its two byte sequences.

    Feed what arrives to `receive`; send what `ring.unsent` shows; call `tick` when a heartbeat is due. `on_open` is called for each OPEN
    (relay); it sets `stream.endpoint` before it returns, or refuses. `wake` is called whenever something was queued. `crashed` is called
    from within the handling of what an endpoint raised: it logs that, and calls `on_crash`, which ends the stream and no other. One thread.
    """

    def __init__(
        self,
        ring: ReplayRing,
        budget: WindowBudget,
        *,
        max_streams: int,
        max_window_bytes: int,
        wake: Callable[[], None],
        crashed: Callable[[Endpoint | Stream], None],
        on_open: Callable[[Stream, Opening], None] | None = None,
    ) -> None:
        self.ring = ring
        self.overflow = bytearray()
        """Control frames that wait for room in the ring; `refill` moves them there."""
        self.parser = FrameParser(self)
        self.streams: dict[int, Stream] = {}
        self.now = 0.0
        self.max_window_bytes = max_window_bytes
        self.goaway: tuple[Code, str] | None = None
        self.bytes_in = 0
        self.opened = 0
        self.passed_mark = 0
        self._marks = 0
        self._budget = budget
        self._max_streams = max_streams
        self._wake = wake
        self._crashed = crashed
        self._on_open = on_open
        self._last_id = 0
        self._acked_to_peer = 0
        self._asked_at = 0
        self._ended_at = 0  # where in the sequence a stream last ended
        self._ring_grown_bytes = 0
        self.heartbeats = Heartbeats()

    @property
    def min_rtt_s(self) -> float:
        """How long the path is; 0 before that is known."""
        return self.heartbeats.min_rtt_s

    @property
    def passed_bytes(self) -> int:
        """Bytes of both sequences so far."""
        return self.bytes_in + self.ring.head

    @property
    def data_room(self) -> int:
        """How many payload bytes a DATA frame written now may have; 0 or less: wait for ACKs."""
        if self.overflow:
            return 0
        ring = self.ring
        return ring.size_bytes - ring.head + ring.acked - RING_RESERVE_BYTES

    def queue(self, frame: bytes) -> None:
        """Queue a control frame behind everything queued so far. See `overrun`."""
        self._wake()
        if not self.overflow and self.ring.free_bytes >= len(frame):
            self.ring.append(frame)
        elif not self.overrun:
            self.overflow += frame

    @property
    def overrun(self) -> bool:
        """The peer makes us answer without ever acknowledging: close the session with `overload`."""
        return len(self.overflow) > MAX_OVERFLOW_BYTES

    def open(self, tags: bytes, endpoint: Endpoint) -> Stream | None:
        """Open a stream (gateway). `tags` come from `encode_tags`. None when a limit is reached."""
        is_full = len(self.streams) >= self._max_streams or self._last_id >= MAX_STREAM_ID
        first = 0 if is_full else self._budget.take_first()
        if not first:
            return None
        self._last_id += 1
        stream = Stream(self, self._last_id, endpoint, ReceiveWindow(self._budget, first), EARLY_BYTES)
        stream.early = bytearray()
        self.streams[stream.id] = stream
        self.opened += 1
        self.queue(frames.encode_open(stream.id, first, tags))
        return stream

    def forget(self, stream: Stream) -> None:
        """The stream is closed; frames for it that are still under way are ignored."""
        self._remove(stream)
        stream.window.close()

    def finish(self, stream: Stream) -> None:
        """The stream has ended in order, both ways. What its reader has not taken yet counts as memory until `Stream.emptied`."""
        self._remove(stream)
        stream.window.finish()

    def _remove(self, stream: Stream) -> None:
        stream.closed = True
        stream.endpoint = None  # stream and endpoint know each other: a cycle would wait for the garbage collector
        self.streams.pop(stream.id, None)
        self._ended_at = self.ring.head + len(self.overflow)

    @property
    def has_delivered(self) -> bool:
        """Whether the peer has acknowledged all that was sent on streams which have ended."""
        return self.ring.acked >= self._ended_at

    def press(self) -> None:
        """Have the peer acknowledge at once what is written so far."""
        self.queue(_ASKS)

    def mark(self) -> int:
        """Mark this place in the sequence. Once `passed_mark` is as much, the peer has acted on all before, and we on its answers."""
        self._marks += 1
        self.queue(frames.encode_u64(frames.PING, _MARK | self._marks))
        return self._marks

    def dispose(self) -> None:
        """The session is over and nothing is sent any more: give memory back, and let go of the session. May be repeated.

        The three know each other, and the garbage collector is lazy by choice (fxtunnel/kit/process.py).
        """
        self.ring.dispose()
        self._budget.release_ring(self._ring_grown_bytes)
        self._ring_grown_bytes = 0
        self.parser.dispose()
        self._wake = _asleep
        self._on_open = None

    def receive(self, data: memoryview, now: float) -> None:
        """Take the next bytes of the peer's sequence.

        Raises:
            RemoteProtocolError: the peer broke the rules; close the session with the error's code.
        """
        self.now = now
        self.bytes_in += len(data)
        self.parser.feed(data)
        if self.ring.keep and self.parser.received - self._acked_to_peer >= ACK_EVERY_BYTES:
            self._queue_ack()

    def tick(self, now: float) -> None:
        """A heartbeat is due: PING, and an ACK of what has arrived."""
        self.now = now
        self._queue_ack()
        self.queue(frames.encode_u64(frames.PING, int(now * 1e6)))
        self.heartbeats.began(self.passed_bytes)

    def ask(self) -> None:
        """Have the peer acknowledge soon what is written so far. Costs next to nothing until ASK_EVERY_BYTES later. Wakes nobody."""
        ring = self.ring
        if ring.head - self._asked_at >= ASK_EVERY_BYTES and ring.keep and not self.overflow and ring.free_bytes >= len(_ASKS):
            self._asked_at = ring.head
            ring.append(_ASKS)

    def grow_ring(self, max_bytes: int) -> None:
        """Replay memory is as full as it may be: double it, if the path is long enough for that to be its bandwidth-delay product.

        A peer that answers PINGs late and acknowledges nothing makes any path look so. What all rings grow by together has a budget.
        """
        size_bytes = self.ring.size_bytes
        wanted_bytes = min(size_bytes, max_bytes - size_bytes)
        if self.min_rtt_s > MIN_GROWTH_RTT_S and wanted_bytes > 0 and self._budget.take_ring(wanted_bytes):
            self.ring.grow(size_bytes + wanted_bytes)
            grown_bytes = self.ring.size_bytes - size_bytes
            self._budget.release_ring(wanted_bytes - grown_bytes)
            self._ring_grown_bytes += grown_bytes
            self._wake()

    def shrink_ring(self) -> None:
        """Next to nothing passes: what the ring has grown by is for others, unless it is full of what the peer does not acknowledge."""
        if self._ring_grown_bytes and self.ring.shrink(self.ring.size_bytes - self._ring_grown_bytes):
            self._budget.release_ring(self._ring_grown_bytes)
            self._ring_grown_bytes = 0

    def refill(self) -> None:
        """Move control frames that waited for room into the ring. Call after ACKs or `advance`."""
        if self.overflow:
            step = min(len(self.overflow), self.ring.free_bytes)
            if step > 0:
                self.ring.append(self.overflow[:step])
                del self.overflow[:step]

    def reset_all(self, code: Code) -> None:
        """The session is over: every endpoint hears `on_reset`."""
        for stream in list(self.streams.values()):
            endpoint = stream.endpoint
            self.forget(stream)
            if endpoint is not None:
                try:
                    endpoint.on_reset(code)
                except Exception:
                    self._crashed(endpoint)

    def statistics(self) -> MuxStatistics:
        """Counters now."""
        return MuxStatistics(len(self.streams), self.opened, self.bytes_in, self.ring.sent, self.min_rtt_s)

    def on_data_header(self, stream_id: int, length: int) -> None:
        """From the parser: a DATA frame begins."""
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id:
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"DATA on stream {stream_id} that was never opened")
            return
        if stream.fin_received or stream.early is not None:
            when = "after FIN" if stream.fin_received else "before ACCEPT"
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"DATA {when} on stream {stream_id}")
        window = stream.window
        window.left_bytes -= length
        if window.left_bytes < 0:
            raise RemoteProtocolError(Code.FLOW_CONTROL, f"{-window.left_bytes} bytes over credit on stream {stream_id}")
        stream.bytes_in += length

    def on_data(self, stream_id: int, data: memoryview) -> None:
        """From the parser: bytes of the DATA frame."""
        stream = self.streams.get(stream_id)
        if stream is not None and (endpoint := stream.endpoint) is not None:
            try:
                endpoint.on_data(data)
            except Exception:
                self._crashed(endpoint)

    def on_last_data(self, stream_id: int, data: memoryview) -> None:
        """From the parser: bytes of the DATA frame, and the stream's FIN behind them."""
        if (stream := self.streams.get(stream_id)) is not None and (endpoint := stream.endpoint) is not None:
            try:
                endpoint.on_last_data(data)
            except Exception:
                self._crashed(endpoint)

    def on_frame(self, kind: int, stream_id: int, payload: memoryview) -> None:
        """From the parser: any other frame, whole."""
        if stream_id:
            if kind == frames.OPEN:
                self._opened_by_peer(stream_id, payload)
                return
            stream = self.streams.get(stream_id)
            if stream is not None:
                endpoint = stream.endpoint
                if endpoint is None:
                    raise LocalProtocolError(f"stream {stream.id} has no endpoint")
                try:
                    self._on_stream_frame(kind, stream, endpoint, payload)
                except RemoteProtocolError:
                    raise
                except Exception:
                    self._crashed(endpoint)
            elif stream_id > self._last_id and kind in frames.MAX_LENGTH:
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"frame 0x{kind:02x} on stream {stream_id} that was never opened")
        elif kind == frames.ACK:
            self.ring.acknowledge(frames.decode_u64(payload))
            if self.overflow:
                self._wake()
        elif kind == frames.PING:
            self._queue_ack()
            self.queue(frames.encode_u64(frames.PONG, frames.decode_u64(payload)))
        elif kind == frames.PONG:
            pinged_us = frames.decode_u64(payload)  # 0: it was an `ask`
            if pinged_us & _MARK:
                self.passed_mark = pinged_us ^ _MARK
            elif pinged_us:
                self.heartbeats.answered(self.now - pinged_us / 1e6, self.passed_bytes)
        elif kind == frames.GOAWAY:
            self.goaway = (Code.from_wire(frames.decode_u16(payload)), frames.decode_text(payload))

    def _on_stream_frame(self, kind: int, stream: Stream, endpoint: Endpoint, payload: memoryview) -> None:
        if kind == frames.CREDIT:
            if stream.early is not None:  # the copy kept for a replay would grow with it, and no frame could carry that
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"CREDIT before ACCEPT on stream {stream.id}")
            self._credit(stream, endpoint, frames.decode_u32(payload))
        elif kind == frames.FIN:
            if stream.fin_received or stream.early is not None:
                when = "twice" if stream.fin_received else "before ACCEPT"
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"FIN {when} on stream {stream.id}")
            stream.fin_received = True
            if stream.fin_sent:
                self.finish(stream)
            endpoint.on_fin()
        elif kind == frames.RESET:
            self.forget(stream)
            endpoint.on_reset(Code.from_wire(frames.decode_u16(payload)))
        elif kind in (frames.ACCEPT, frames.REFUSE, frames.REDIRECT):
            self._answered(kind, stream, endpoint, payload)

    def _answered(self, kind: int, stream: Stream, endpoint: Endpoint, payload: memoryview) -> None:
        if self._on_open is not None or stream.accepted:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"frame 0x{kind:02x} on stream {stream.id} that was not being opened")
        if stream.bytes_in or stream.fin_received:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"stream {stream.id} is answered when it has already been used")
        if kind == frames.ACCEPT:
            window = frames.decode_u32(payload)
            before = stream.send_credit
            credit = before + window - EARLY_BYTES
            if window < EARLY_BYTES or credit > MAX_CREDIT:
                raise RemoteProtocolError(Code.FLOW_CONTROL, f"ACCEPT with a window of {window}")
            stream.accepted = True
            stream.early = None
            stream.send_credit = credit
            endpoint.on_accept()
            if before <= 0 < stream.send_credit and not stream.closed:
                endpoint.on_credit()
            return
        self.forget(stream)
        if kind == frames.REFUSE:
            endpoint.on_refuse(Code.from_wire(frames.decode_u16(payload)), frames.decode_text(payload))
        else:
            endpoint.on_redirect(bytes(payload).decode("ascii", "replace"))

    def _credit(self, stream: Stream, endpoint: Endpoint, amount: int) -> None:
        before = stream.send_credit
        if not 0 < amount <= MAX_CREDIT - before:
            raise RemoteProtocolError(Code.FLOW_CONTROL, f"CREDIT of {amount} on top of {before}")
        stream.send_credit = before + amount
        if before <= 0:
            endpoint.on_credit()

    def _opened_by_peer(self, stream_id: int, payload: memoryview) -> None:
        if self._on_open is None or stream_id != self._last_id + 1:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"OPEN of stream {stream_id} is not in order")
        self._last_id = stream_id
        try:
            window, opening = decode_open(payload)
        except UnsupportedTag as unsupported:
            self.queue(frames.encode_refuse(stream_id, Code.UNSUPPORTED, str(unsupported)))
            return
        if not 0 < window <= MAX_CREDIT:
            raise RemoteProtocolError(Code.FLOW_CONTROL, f"OPEN with a window of {window}")
        first = self._budget.take_first() if len(self.streams) < self._max_streams else 0
        if not first:
            self.queue(frames.encode_refuse(stream_id, Code.BUSY, "streams or memory used up"))
            return
        stream = Stream(self, stream_id, None, ReceiveWindow(self._budget, first), window)
        self.streams[stream_id] = stream
        self.opened += 1
        try:
            self._on_open(stream, opening)
        except Exception:
            self._crashed(stream.endpoint or stream)

    def _queue_ack(self) -> None:
        received = self.parser.received
        if self.ring.keep and received > self._acked_to_peer:
            self._acked_to_peer = received
            self.queue(frames.encode_u64(frames.ACK, received))


def _asleep() -> None:
    """Nobody is left to be woken."""
