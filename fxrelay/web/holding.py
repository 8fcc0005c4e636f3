"""Task: requests that are held: received whole, sent to one node after the other until it is decided, and answered whole."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import trio

from fxrelay.delivery.ports import Node, NoNode
from fxrelay.web.access import RequestRecord
from fxrelay.web.bodies import BadBody, request_body, response_body
from fxrelay.web.client import ClientGone, ClientSide
from fxrelay.web.exchange import MAX_INTERIM
from fxrelay.web.forwarding import Backward, response_back
from fxrelay.web.heads import BadHead, Field, RequestHead, ResponseHead, parse_response
from fxrelay.web.link import ServiceLink
from fxrelay.web.ports import Reply, WholeAnswer
from fxrelay.web.reaching import Held, Reacher
from fxtunnel.errors import NodeError
from fxtunnel.kit.answers import Refused

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


async def read_whole(client: ClientSide, head: RequestHead, most_bytes: int) -> bytes:
    """The body of a request. What is behind it stays with the client.

    Raises:
        Refused: it is too large or malformed, or does not come in time.
        ClientGone: the client left.
    """
    if not head.has_body:
        return b""
    if (head.length or 0) > most_bytes:
        raise _too_large()
    if head.version == b"1.1" and b"100-continue" in head.tokens(b"expect"):
        await client.send(CONTINUE)  # RFC 9110, 10.1.1: the service is not asked before the body is here
    reader, data, body = request_body(head.length), client.scanner.take_rest(), bytearray()
    while True:
        try:
            body += reader.feed(data)
        except BadBody as exc:
            raise Refused(400, "BadRequest", f"The request's body is malformed: {exc}.") from exc
        if len(body) > most_bytes:
            raise _too_large()
        if reader.is_done:
            client.scanner.feed(reader.rest)
            return bytes(body)
        data = await client.receive()


async def while_there(client: ClientSide, ask: Callable[[], Awaitable[Reply]]) -> Reply:
    """What `ask` returns. Cancelled when the client leaves: nothing may be done for a client that no longer waits for it. Safe to cancel: a
    reply that is there by then is undone.

    Raises:
        ClientGone: he left; `ask` was cancelled.
        Refused: as `ask`.
    """
    replies: list[Reply] = []
    failures: list[Exception] = []

    async def watch() -> None:
        try:
            await client.wait_until_gone()
        except ClientGone as exc:
            failures.append(exc)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                replies.append(await ask())
            except Refused as exc:
                failures.append(exc)
            nursery.cancel_scope.cancel()
    except BaseException:  # the nursery waits for `watch` to end, and what cancels us meanwhile takes the reply with it
        for reply in replies:
            reply.undone()
        raise
    if replies:
        return replies[0]
    raise failures[0]


def answer_whole(head: RequestHead, reply: Reply, *, keeps_client: bool) -> bytes:
    """The reply as bytes for the client."""
    answer = reply.answer
    has_body = head.method != b"HEAD" and answer.status not in (204, 304)
    fields = tuple(each for each in answer.fields if each.name not in (b"content-length", b"transfer-encoding"))
    if has_body:
        fields = (*fields, Field(b"content-length", b"Content-Length", b"%d" % len(answer.body)))
    is_old = head.version == b"1.0"
    connection = b"close" if not keeps_client else b"keep-alive" if is_old else b""
    wire = response_back(ResponseHead(answer.status, answer.reason, b"1.1", fields), Backward(False, connection, reply.extra))
    return wire + answer.body if has_body else wire


class WholeSender:
    """Implements `Sender` for one request. `wire` makes its head, with the length of the body that is sent."""

    def __init__(self, reacher: Reacher, head: RequestHead, wire: Callable[[RequestHead], bytes], body: bytes, timeout_s: float) -> None:
        length = len(body) if head.has_body else 0
        fields = tuple(each for each in head.fields if each.name != b"expect")
        self._reacher = reacher
        self._method = head.method
        self._data = wire(replace(head, length=length, fields=fields)) + body
        self._timeout_s = timeout_s
        self.visit: RequestRecord | None = None
        self.before: Callable[[], None] = lambda: None
        """Called when a node is about to get the request."""

    async def send(self, node: Node, most_bytes: int) -> WholeAnswer:
        """See `Sender`."""
        self.before()
        with Held() as held:
            held.take(node.claim)
            link = await self._reacher.to_node(node, held)
            if isinstance(link, NoNode):
                raise NodeError(link.text)
            if self.visit is not None:
                self.visit.node, self.visit.way = link.node or "", link.way
            try:
                with trio.move_on_after(self._timeout_s):
                    return await self._ask(link, most_bytes)
                raise Refused(504, "Timeout", "The service did not answer in time.")
            finally:
                link.abort()

    async def _ask(self, link: ServiceLink, most_bytes: int) -> WholeAnswer:
        with suppress(trio.BrokenResourceError):  # it may have answered all the same
            await link.send(self._data)
        head = await self._final_head(link)
        try:
            reader = response_body(self._method, head)
            body, data = bytearray(), link.scanner.take_rest()
            while True:
                body += reader.feed(data)
                if len(body) > most_bytes:
                    raise _bad_gateway(f"its answer is longer than {most_bytes} bytes")
                if reader.is_done:
                    break
                data = await link.receive()
                if not data:
                    if not reader.end():
                        raise _bad_gateway("it ended its response too early")
                    break
        except (BadHead, BadBody) as exc:
            raise _bad_gateway(str(exc)) from exc
        except trio.BrokenResourceError as exc:
            raise _bad_gateway("it broke off its response") from exc
        return WholeAnswer(head.status, head.reason, head.fields, bytes(body))

    async def _final_head(self, link: ServiceLink) -> ResponseHead:
        interim = 0
        while True:
            try:
                raw = link.scanner.next_head()
                head = parse_response(raw) if raw is not None else None
            except BadHead as exc:
                raise _bad_gateway(str(exc)) from exc
            if head is None:
                try:
                    data = await link.receive()
                except trio.BrokenResourceError:
                    data = b""
                if not data:
                    raise _bad_gateway("it closed the connection without an answer")
                link.scanner.feed(data)
            elif head.status >= 200:
                return head
            else:
                interim += 1
                if head.status == 101 or interim > MAX_INTERIM:
                    raise _bad_gateway("it answers a login with something else")


def _too_large() -> Refused:
    return Refused(413, "TooLarge", "The request's body is larger than a login may be.")


def _bad_gateway(why: str) -> Refused:
    return Refused(502, "BadGateway", "The service gave no valid answer.", detail=why)
