"""Pump: passes a request's body on to the service in the callbacks that deliver it, so that slow clients wake no task."""

import time
from functools import partial

import trio

from fxrelay.web.access import RequestRecord
from fxrelay.web.bodies import LAST_CHUNK, BadBody, chunk, request_body
from fxrelay.web.client import ClientSide
from fxrelay.web.link import ServiceLink
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.waiter import Waiter


class Upload:
    """One body. `length` is what its head says, None for chunks.

    A task feeds it with what has arrived already, then lets it `pass_on` the rest, and does by itself what needs waiting or refusing.
    """

    def __init__(self, client: ClientSide, link: ServiceLink, visit: RequestRecord, length: int | None, max_body_bytes: int) -> None:
        self._client = client
        self._link = link
        self._visit = visit
        self._reader = request_body(length)
        self._is_chunked = length is None
        self._max_body_bytes = max_body_bytes
        self.is_passed = False
        """Whether the service has all of it, so that an answer from now on is not an early one."""
        self._total = 0
        self._unsent = b""
        self._refused: Refused | None = None
        self._heard_at = 0.0
        self._is_over = False
        self._waiter = Waiter()

    @property
    def is_done(self) -> bool:
        """The body is whole."""
        return self._reader.is_done

    @property
    def rest(self) -> bytes:
        """What came behind the body."""
        return self._reader.rest

    def feed(self, data: bytes) -> bytes:
        """What goes to the service for these bytes.

        Raises:
            Refused: the body is malformed, or larger than it may be.
        """
        try:
            payload = self._reader.feed(data)
        except BadBody as exc:
            raise Refused(400, "BadRequest", f"The request's body is malformed: {exc}.") from exc
        self._total += len(payload)
        if self._max_body_bytes and self._total > self._max_body_bytes:
            raise Refused(413, "TooLarge", "The request's body is larger than this service takes.")
        self._visit.bytes_in = self._total
        if not self._is_chunked:
            return payload
        return chunk(payload) + LAST_CHUNK if self._reader.is_done else chunk(payload)

    async def pass_on(self, tunnel: TunnelStream) -> bytes:
        """Pass on what arrives until the body is whole, the service takes no more at once, or the client's stream has ended. Returns what
        the service has not taken. Cancelling loses nothing that was not passed on.

        Raises:
            Refused: see `feed`; or the client said nothing for too long.
        """
        stall_s = self._client.limits.stall_timeout_s
        self._is_over, self._unsent, self._heard_at = False, b"", time.monotonic()
        turn = partial(self._turn, tunnel)
        tunnel.on_arrival = turn
        try:
            turn()
            if self._is_over:
                await trio.lowlevel.checkpoint()
            while not self._is_over:
                left_s = self._heard_at + stall_s - time.monotonic()
                if left_s <= 0:
                    raise self._client.too_slow()
                with trio.move_on_after(left_s):
                    await self._waiter.wait()
        finally:
            tunnel.on_arrival = None
        if self._refused is not None:
            raise self._refused
        return self._unsent

    def _turn(self, tunnel: TunnelStream) -> None:
        """From the reactor: something has arrived."""
        while not self._is_over:
            data = tunnel.receive_nowait()
            if not data:
                if tunnel.is_at_end:
                    self._end()
                return
            self._heard_at = time.monotonic()
            self._client.bytes_in += len(data)
            try:
                out = self.feed(data)
            except Refused as exc:
                self._refused = exc
                self._end()
                return
            sent = self._link.send_nowait(out) if out else 0
            if sent < len(out):
                self._unsent = out[sent:]
                self._end()
            elif self.is_done:
                self.is_passed = True  # here: the answer may be there before the task that waits has been woken
                self._end()

    def _end(self) -> None:
        self._is_over = True
        self._waiter.wake()
