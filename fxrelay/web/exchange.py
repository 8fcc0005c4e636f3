"""Task: one request and its response, both ways at once, between a client and a service."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from fxrelay.web.access import RequestRecord
from fxrelay.web.bodies import LAST_CHUNK, BadBody, chunk
from fxrelay.web.client import ClientGone, ClientSide
from fxrelay.web.forwarding import Answer, Backward, answer_back, response_back, switched_back
from fxrelay.web.heads import BadHead, RequestHead, ResponseHead, parse_response
from fxrelay.web.link import ServiceLink
from fxrelay.web.upload import Upload
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.answers import Refused

MAX_INTERIM: Final = 16
"""Interim (1xx) responses that a service may send for one request."""
REPEATABLE: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
"""RFC 9110, 9.2.2."""


class StaleLink(Exception):
    """The service had closed its idle connection: nothing was received, and the request may be sent once more."""


class CutOff(Exception):
    """A response cannot be brought to its end: the client must not take what it has for the whole. `str()` says why."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. `wire` is the request's head for the service; `cookies` are fields to add to the response."""

    head: RequestHead
    wire: bytes
    upgrade: bytes
    keeps_alive: bool
    response_timeout_s: float
    max_body_bytes: int
    cookies: Sequence[bytes]
    answered: Callable[[ResponseHead], Awaitable[Sequence[bytes]]] | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is left afterwards. `switched`: the service agreed to the upgrade, nothing has been sent of that yet."""

    keeps_client: bool = False
    keeps_link: bool = False
    switched: bytes = b""


class Exchange:
    """Runs once. The client's bytes behind the request stay in its scanner, the service's in the link's."""

    def __init__(self, client: ClientSide, link: ServiceLink, order: Order, visit: RequestRecord) -> None:
        self._client = client
        self._link = link
        self._order = order
        self._visit = visit
        self._is_sent = False
        self._upload: Upload | None = None
        self._waited_s = 0.0
        self._has_interim = False
        self._has_answer = False
        self._waits = trio.CancelScope()

    async def run(self) -> Outcome:
        """Bring the request there and the response back.

        Raises:
            StaleLink: see there; at most for a used link.
            Refused: there is no response, and the client has been sent nothing yet.
            CutOff: the response broke off, and part of it was sent.
            ClientGone: nobody waits for it.
        """
        if not self._order.head.has_body:
            self._is_sent = True
            await self._send(self._order.wire)
            return await self._respond()
        return await self._both_ways()

    async def resume(self, waited_s: float) -> Outcome:
        """As `run`, for a request that was sent so many seconds ago."""
        self._is_sent = True
        self._waited_s = waited_s
        return await self._respond()

    async def _both_ways(self) -> Outcome:
        failures: list[Exception] = []
        outcomes: list[Outcome] = []

        async def until_over(part: Callable[[], Awaitable[Outcome | None]]) -> None:
            try:
                outcome = await part()
            except (StaleLink, Refused, CutOff, ClientGone) as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()
                return
            if outcome is not None:
                outcomes.append(outcome)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_over, self._send_request)
            nursery.start_soon(until_over, self._respond)
        if failures:
            if self._has_answer and isinstance(failures[0], Refused):
                raise CutOff(str(failures[0]))  # something has been sent already
            raise failures[0]
        return outcomes[0]

    async def _send(self, data: bytes) -> bool:
        """To the service; no checkpoint if all goes at once. One that has closed may still have answered: `_respond` finds out."""
        sent, patience_s = self._link.send_nowait(data), self._order.response_timeout_s
        if sent == len(data):
            return True
        rest = memoryview(data)[sent:]
        try:
            while rest:
                with trio.fail_after(patience_s):
                    rest = rest[await self._link.send_some(rest) :]
        except trio.TooSlowError:
            self._waits.deadline = trio.current_time()  # an answer that has begun goes on; no other one is waited for
        except trio.BrokenResourceError:
            self._waits.deadline = trio.current_time() + patience_s
        return not rest

    async def _send_request(self) -> None:
        client, order = self._client, self._order
        if not await self._send(order.wire):
            return
        upload = self._upload = Upload(client, self._link, self._visit, order.head.length, order.max_body_bytes)
        tunnel = client.stream if isinstance(client.stream, TunnelStream) else None
        out = upload.feed(client.scanner.take_rest())
        while True:
            if out and not await self._send(out):
                return
            if upload.is_done:
                break
            if tunnel is None or tunnel.is_at_end:
                out = upload.feed(await client.receive())
            else:
                out = await upload.pass_on(tunnel)
        upload.is_passed = True
        self._note_sent(upload)

    def _note_sent(self, upload: Upload | None) -> None:
        """If the body has been passed on: what came behind it is the client's next request. Twice is once."""
        if upload is not None and upload.is_passed and not self._is_sent:
            self._client.scanner.feed(upload.rest)
            self._is_sent = True
            self._waits.deadline = trio.current_time() + self._order.response_timeout_s

    async def _respond(self) -> Outcome:
        order = self._order
        with self._waits:
            if self._is_sent:
                self._waits.deadline = min(self._waits.deadline, trio.current_time() + order.response_timeout_s - self._waited_s)
            head = await self._final_head()
        if self._waits.cancelled_caught:
            raise Refused(504, "Timeout", "The service did not answer in time.")
        if head.status == 101:
            try:
                return Outcome(switched=switched_back(head, order.upgrade))
            except BadHead as exc:
                raise _bad_gateway(str(exc)) from exc
        self._note_sent(self._upload)
        keeps_alive = order.keeps_alive and self._is_sent and not order.upgrade
        try:
            answer = answer_back(head, order.head, keeps_alive=keeps_alive, cookies=order.cookies)
        except BadHead as exc:
            raise _bad_gateway(str(exc)) from exc
        if order.answered is not None:
            extra = await order.answered(head)
            if extra:
                answer = answer_back(head, order.head, keeps_alive=keeps_alive, cookies=(*order.cookies, *extra))
        self._visit.status = head.status
        await self._stream(answer)
        keeps_link = answer.keeps_link and self._is_sent and not order.upgrade and not answer.body.rest
        return Outcome(answer.keeps_client, keeps_link)

    async def _final_head(self) -> ResponseHead:
        """The final response's head, or the 101 that was asked for. Interim ones go to the client, if it knows them."""
        order, interim = self._order, 0
        while True:
            head = await self._next_head()
            if head.status == 101 and not order.upgrade:
                raise _bad_gateway("the service switches to a protocol that nobody asked for")
            if head.status == 101 or head.status >= 200:
                return head
            interim += 1
            if interim > MAX_INTERIM:
                raise _bad_gateway(f"the service sends more than {MAX_INTERIM} interim responses")
            if order.head.version == b"1.1":
                self._has_interim = True
                await self._client.send(response_back(head, Backward()))

    async def _next_head(self) -> ResponseHead:
        link = self._link
        while True:
            try:
                raw = link.scanner.next_head()
                if raw is not None:
                    return parse_response(raw)
            except BadHead as exc:
                raise _bad_gateway(str(exc)) from exc
            try:
                data = await link.receive_later()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                is_repeatable = not self._order.head.has_body and self._order.head.method in REPEATABLE
                if link.is_used and is_repeatable and not link.scanner.rest and not self._has_interim:
                    raise StaleLink
                raise _bad_gateway("the service closed the connection without an answer")
            link.scanner.feed(data)

    async def _stream(self, answer: Answer) -> None:
        """The response to the client: its head, and its body."""
        client, link, visit = self._client, self._link, self._visit
        wire, body, is_chunked = answer.wire, answer.body, answer.is_chunked
        visit.first_byte_at = trio.current_time()
        self._has_answer = True
        data = link.scanner.take_rest()
        while True:
            try:
                payload = body.feed(data)
            except BadBody as exc:
                await self._send_some(wire)
                raise CutOff(f"the service's body is malformed: {exc}") from exc
            out = wire + (chunk(payload) if is_chunked else payload)
            if body.is_done and is_chunked:
                out += LAST_CHUNK
            if out:
                await client.send(out)
                visit.bytes_out += len(payload)
            if body.is_done:
                return
            wire = b""
            try:
                with trio.fail_after(client.limits.idle_timeout_s):
                    data = await link.receive()
            except (trio.BrokenResourceError, trio.TooSlowError) as exc:
                raise CutOff("the service broke off its response") from exc
            if not data:
                if not body.end():
                    raise CutOff("the service ended its response too early")
                if is_chunked:
                    await client.send(LAST_CHUNK)
                return

    async def _send_some(self, wire: bytes) -> None:
        if wire:
            await self._client.send(wire)


def _bad_gateway(why: str) -> Refused:
    return Refused(502, "BadGateway", "The service gave no valid answer.", detail=why)
