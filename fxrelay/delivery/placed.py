"""Pump: a pool's stream between OPEN and ACCEPT: waiting for a node, then connecting to it. Bytes that arrive meanwhile are kept."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.delivery import Delivery, DeliveryDesk
from fxrelay.delivery.ports import Asking, Claim, Entry, Node, Seat, Wanted
from fxrelay.delivery.services import AnyService, Endpoint, PoolService
from fxtunnel.codes import Code
from fxtunnel.model import RelayId
from fxtunnel.protocol.byte_queue import ByteQueue
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    import socket

    from fxtunnel.engine.session import Session


class Placing:
    """A stream that has no node yet. Implements `Endpoint`: keeps early bytes, at most a first window, which the mux enforces."""

    __slots__ = (
        "asking",
        "claim",
        "desk",
        "early",
        "entry",
        "fin",
        "first",
        "is_final",
        "is_over",
        "opening",
        "problem",
        "quicker",
        "resume",
        "scope",
        "seat",
        "service",
        "session",
        "settled",
        "stream",
        "wanted",
    )

    def __init__(
        self, desk: DeliveryDesk, session: "Session", stream: Stream, service: AnyService, opening: Opening, wanted: Wanted
    ) -> None:
        self.desk = desk
        self.session = session
        self.stream = stream
        self.service = service
        self.opening = opening
        self.wanted = wanted
        self.early = bytearray()
        self.fin = False
        self.asking: Asking | None = None
        self.claim: Claim | None = None
        self.seat: Seat | None = None
        self.entry: Entry | None = None
        self.first: tuple[Node, tuple[PathKind, ...]] | None = None
        """The node that was chosen without a task, and the paths to it that have not been tried."""
        self.resume: Callable[[Placing], None] | None = None
        """Called when the first path has failed, if no task is waiting for that."""
        self.is_over = False
        self.is_final = False
        """Whether `problem` is the final answer, even if other nodes could be tried."""
        self.scope = trio.CancelScope()
        self.settled = trio.Event()
        self.problem: tuple[Code, str] | None = None
        self.quicker = False
        """Whether another user has just been given the last node."""
        stream.endpoint = self

    @property
    def wait_s(self) -> float:
        """How long it may wait for a node that another user has, in seconds."""
        return self.service.wait_s if isinstance(self.service, PoolService) else 0.0

    def on_accept(self) -> None:
        """Not for a relay."""

    def on_refuse(self, code: Code, text: str) -> None:
        """Not for a relay."""

    def on_redirect(self, relay: str) -> None:
        """Not for a relay."""

    def on_credit(self) -> None:
        """See `Endpoint`: there is nothing to send yet."""

    def on_data(self, data: memoryview) -> None:
        """See `Endpoint`. The bytes count as taken only when a service has them."""
        self.early += data

    def on_last_data(self, data: memoryview) -> None:
        """See `Endpoint`."""
        self.on_data(data)

    def on_fin(self) -> None:
        """See `Endpoint`."""
        self.fin = True

    def on_reset(self, code: Code) -> None:
        """See `Endpoint`: the opener has gone elsewhere."""
        self.end()

    def on_crash(self) -> None:
        """See `Endpoint`."""
        self.stream.reset(Code.INTERNAL_ERROR)
        self.end()

    def end(self) -> None:
        """The stream needs no node any more: it is being served, has been answered, or is gone. May be repeated."""
        self.is_over = True
        self.settled.set()
        self.scope.cancel()
        asking, self.asking = self.asking, None
        if asking is not None:
            asking.cancel()

    def give_up(self, code: Code, text: str) -> None:
        """REFUSE, unless the stream is over; RESET if it has been accepted."""
        if self.stream.accepted and not self.is_over:
            self.desk.count_refusal(self.service, code)
            self.fail(code)
        elif not self.is_over:
            mark = f"trace {self.wanted.trace_id}"
            self.desk.turn_down(self.stream, self.service, code, text if mark in text else f"{text} ({mark})")
            self.end()

    def fail(self, code: Code) -> None:
        """RESET, unless the stream is over."""
        if not self.is_over:
            self.stream.reset(code)
            self.end()

    def redirect(self, server_id: RelayId) -> None:
        """Send the gateway to the node's own tunnel."""
        self.stream.redirect(server_id)
        self.desk.count_path(self.service, "redirect")
        claim, self.claim = self.claim, None
        if claim is not None:
            claim.hand_over()
        self.end()

    def release(self) -> None:
        """Give claim and seat back, if they are still here."""
        claim, self.claim = self.claim, None
        seat, self.seat = self.seat, None
        if claim is not None:
            claim.release()
        if seat is not None:
            seat.release()

    def release_entry(self) -> None:
        """Release its entry: it no longer counts among its user's streams."""
        entry, self.entry = self.entry, None
        if entry is not None:
            entry.release()

    async def leave(self) -> None:
        """Nobody serves the stream: give its ticket back and release its entry. Does nothing for a stream that is being served."""
        entry, self.entry = self.entry, None
        if entry is not None:
            try:
                if not self.stream.accepted:
                    await entry.give_back()
            finally:
                entry.release()


class PlacedDelivery(Delivery):
    """A delivery to a chosen node. If it cannot connect, the stream goes back to its `Placing`, with all bytes that have arrived."""

    __slots__ = ("_claim", "_entry", "_placing", "_seat", "path")

    def __init__(self, placing: Placing, sock: "socket.socket", addresses: tuple[Endpoint, ...], path: PathKind) -> None:
        super().__init__(placing.desk, sock, placing.service, addresses, placing.opening)
        self.path = path
        self._placing: Placing | None = placing
        self._claim: Claim | None = None
        self._seat: Seat | None = None
        self._entry: Entry | None = None
        self._pending = ByteQueue(placing.early)
        self._fin_wanted = placing.fin
        placing.early = bytearray()

    def stands(self) -> None:
        """See `Delivery`. From here on the claim lives as long as the socket."""
        super().stands()
        placing, self._placing = self._placing, None
        if placing is not None:
            self._claim, placing.claim = placing.claim, None
            self._seat, placing.seat = placing.seat, None
            self._entry, placing.entry = placing.entry, None
            placing.end()
            if self._claim is not None:
                self._claim.connected()
            if self._seat is not None:
                self._seat.watch(self._lost)

    def refuse(self, code: Code, text: str) -> None:
        """See `Delivery`."""
        self.note_failure(code, text)
        if code is Code.CONNECT_FAILED and self._reconnect():
            return
        placing, self._placing = self._placing, None
        if placing is not None and not placing.is_over:
            placing.early = self._pending.joined() if self._pending is not None else bytearray()
            placing.fin = self._fin_wanted
            placing.stream.endpoint = placing
            placing.problem = (code, text)
            placing.settled.set()
        self.stream = None
        self.abort()
        if placing is not None and placing.resume is not None and not placing.is_over:
            resume, placing.resume = placing.resume, None
            resume(placing)

    def withdraw(self) -> None:
        """Give this connection attempt up. Does nothing once it has succeeded or failed."""
        if self._placing is not None:
            self.refuse(Code.CONNECT_TIMEOUT, "no answer in time")

    def released(self) -> None:
        """See `Splice`."""
        super().released()
        placing, self._placing = self._placing, None
        if placing is not None:
            placing.end()
            placing.release()
        claim, self._claim = self._claim, None
        seat, self._seat = self._seat, None
        entry, self._entry = self._entry, None
        if claim is not None:
            claim.release()
        if seat is not None:
            seat.release()
        if entry is not None:
            entry.release()

    def _lost(self) -> None:
        """The node belongs to another user now."""
        self.fail(Code.FENCED)
