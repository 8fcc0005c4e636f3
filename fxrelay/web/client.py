"""Task: the client's side of an HTTP connection: heads and bytes in, answers out, each wait under its deadline."""

from typing import Final

import trio

from fxrelay.web.heads import MAX_HEAD_BYTES, BadHead, HeadScanner
from fxrelay.web.ports import WebLimits
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.answers import Refused
from fxtunnel.protocol.frames import EARLY_BYTES

RECEIVE_BYTES: Final = 65_536


class ClientGone(Exception):
    """The client has gone, or does nothing: nobody is left to be answered. `str()` says how."""


class ClientSide:
    """A client's connection. `send` and `receive` may run at once, each in one task."""

    def __init__(self, stream: trio.abc.Stream, limits: WebLimits) -> None:
        self.stream = stream
        self.limits = limits
        self.scanner = HeadScanner()
        self.bytes_in = 0
        self.bytes_out = 0
        self._tunnel = stream if isinstance(stream, TunnelStream) else None
        self._send_nowait = stream.send_nowait if isinstance(stream, TunnelStream) else None
        self._waits = trio.CancelScope()
        self._is_waiting = False

    def accept(self) -> None:
        """ACCEPT the stream: no other relay is to serve this client. May be repeated. `send`, and a wait for more bytes, imply it."""
        if self._tunnel is not None:
            self._tunnel.stream.accept()

    async def next_head(self, *, is_first: bool) -> bytes | None:
        """The next request's head; None when the client says nothing more, nothing in time, or `stop_waiting` was called before it began.

        Raises:
            BadHead: this is no request, or it does not come to an end in time.
            ClientGone: the client left in the middle of it.
        """
        limits, scanner = self.limits, self.scanner
        waits_s = limits.head_timeout_s if is_first or scanner.rest else limits.keep_alive_s
        self._waits = scope = trio.CancelScope(deadline=trio.current_time() + waits_s)
        with scope:
            while True:
                head = scanner.next_head()
                if head is not None:
                    return head
                self._is_waiting = not scanner.rest
                data = await self._next()
                if not data:
                    break
                if self._is_waiting and not is_first:
                    scope.deadline = trio.current_time() + limits.head_timeout_s
                self._is_waiting = False
                scanner.feed(data)
        self._is_waiting = False
        if not scanner.rest:
            return None
        if scope.cancelled_caught:
            raise BadHead(408, "the request's head did not come to an end in time")
        raise ClientGone("left in the middle of a request's head")

    def stop_waiting(self) -> None:
        """End a wait for the next request, if there is one."""
        if self._is_waiting:
            self._waits.cancel()

    async def receive(self) -> bytes:
        """The next bytes of a body.

        Raises:
            Refused: none came in time.
            ClientGone: the client left.
        """
        with trio.move_on_after(self.limits.stall_timeout_s):
            data = await self._next()
            if not data:
                raise ClientGone("left in the middle of a request's body")
            return data
        raise self.too_slow()

    def too_slow(self) -> Refused:
        """The answer to a client whose body has stalled."""
        return Refused(408, "BodyTimeout", "The request's body did not arrive in time.")

    async def wait_until_gone(self) -> None:
        """Until the client leaves, or says so much that is not asked for yet that nothing more is read. Safe to cancel.

        Raises:
            ClientGone: the client left. Saying nothing more (a half-closed connection) is leaving, too: browsers that give up do that.
        """
        while len(self.scanner.rest) <= MAX_HEAD_BYTES:
            data = await self._receive()
            if not data:
                self.accept()  # no other relay is to find that out as well
                raise ClientGone("left before it had its answer")
            self.scanner.feed(data)

    async def send(self, data: bytes) -> None:
        """Send all of it. No checkpoint if it goes at once: between two requests there are others.

        Raises:
            ClientGone: the client left, or takes nothing any more.
        """
        self.accept()
        if self._send_nowait is not None and self._send_nowait(data):
            self.bytes_out += len(data)
            return
        with trio.move_on_after(self.limits.stall_timeout_s):
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise ClientGone("left before it had its answer") from exc
            self.bytes_out += len(data)
            return
        raise ClientGone("takes nothing of its answer")

    async def _next(self) -> bytes:
        if self.bytes_in >= EARLY_BYTES:
            self.accept()  # the gateway keeps back until then what is more
        data = await self._receive()
        if not data:
            self.accept()  # no other relay is to find that out as well
        return data

    async def _receive(self) -> bytes:
        try:
            data = await self.stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ClientGone("broke the connection") from exc
        self.bytes_in += len(data)
        return bytes(data)
