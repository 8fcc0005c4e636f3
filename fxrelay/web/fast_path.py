"""Pump: the fast path for requests that need no task: no body, a node that is connected already, an answer in one piece.

A task is woken twice for a request, and its scopes and objects cost more than all parsing; here a request costs a third
(docs/adr/0011). What is not as simple as that is handed to the connection's task as it came, so there is one place where requests are
refused, retried, streamed and switched.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from fxrelay.web.bodies import LAST_CHUNK, BadBody, chunk
from fxrelay.web.client import ClientSide
from fxrelay.web.forwarding import Answer, answer_back
from fxrelay.web.heads import BadHead, RequestHead, ResponseHead, parse_response
from fxrelay.web.link import RECEIVE_BYTES, ServiceLink
from fxrelay.web.planning import Plan
from fxrelay.web.reaching import Reacher
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.waiter import Waiter

MAX_PLANS: Final = 4
"""Plans kept for one connection: browsers send a few kinds of heads."""
MAX_PLANNED_BYTES: Final = 2_048
"""Of header fields that are remembered with their plan."""
_SIMPLE: Final = re.compile(rb"(GET|HEAD|OPTIONS) (/[!\"$-~]*) HTTP/1\.1")
_NODE_PATHS: Final = (b"/node/", b"/rnode/")
_END: Final = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Handed:
    """What the task has to do. `raw` is a head to be served; with `link`, it was sent there `waited_s` ago and all that came back is in the
    link's scanner. `unsent` is an answer that the client did not take at once. `is_over`: there will be no other request. Nothing of all
    that: look for the next head.
    """

    raw: bytes | None = None
    link: ServiceLink | None = None
    waited_s: float = 0.0
    unsent: bytes = b""
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was answered, for the access log. Times are the reactor's."""

    plan: Plan
    method: bytes
    path: bytes
    link: ServiceLink
    status: int
    body_bytes: int
    began: float


@dataclass(frozen=True, slots=True)
class FastPathRules:
    """What the service's rules say. `plan` is asked once for each kind of head; None: it is not for us. `served` hears of each answer."""

    plan: Callable[[bytes], Plan | None]
    served: Callable[[Served], None]
    has_node_paths: bool
    response_timeout_s: float
    keep_alive_s: float


class FastPath:
    """Serves a connection while its task waits in `wait`."""

    __slots__ = (
        "_began",
        "_client",
        "_deadline",
        "_handed",
        "_is_active",
        "_line",
        "_link",
        "_links",
        "_plan",
        "_plans",
        "_raw",
        "_reactor",
        "_sleep",
        "_terms",
        "_tunnel",
        "_waiter",
        "_wakes_at",
        "is_last",
    )

    def __init__(self, reactor: Reactor, tunnel: TunnelStream, client: ClientSide, links: Reacher, terms: FastPathRules) -> None:
        self._reactor = reactor
        self._tunnel = tunnel
        self._client = client
        self._links = links
        self._terms = terms
        self._plans: dict[bytes, Plan] = {}
        self._handed: Handed | None = None
        self._is_active = False
        self._waiter = Waiter()
        self._deadline = 0.0
        self._sleep = trio.CancelScope()
        self._wakes_at = 0.0
        self._link: ServiceLink | None = None
        self._raw = b""
        self._line = b"", b""
        self._plan: Plan | None = None
        self._began = 0.0
        self.is_last = False
        """Whether the request that is being answered is the last one."""

    async def wait(self) -> Handed:
        """Serve until there is something for the task. Cancelling leaves the connection to `stop`."""
        self._handed = None
        self._is_active = True
        self._wakes_at = 0.0  # nobody sleeps yet
        self._tunnel.on_arrival = self._turn
        self._deadline = time.monotonic() + self._terms.keep_alive_s
        self._turn()
        if self._handed is not None:
            await trio.lowlevel.checkpoint()
        while self._handed is None:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                self._time_out()
                break
            with trio.move_on_after(left_s) as self._sleep:
                self._wakes_at = self._deadline
                await self._waiter.wait()
        handed, self._handed = self._handed, None
        assert handed is not None
        return handed

    def drain(self) -> None:
        """No more requests: end at once, or after the one that is being answered."""
        self.is_last = True
        if self._is_active and self._link is None:
            self._hand(Handed(is_over=True))

    def stop(self) -> None:
        """Let go of everything: the connection is broken or over."""
        self._is_active = False
        self._tunnel.on_arrival = None
        for link in (self._link, self._handed.link if self._handed is not None else None):
            if link is not None:
                link.abort()
        self._link = self._handed = None

    def _turn(self) -> None:
        """From the reactor, and after each answer: the client may have said something."""
        if self._link is not None or not self._is_active:
            return  # one after the other; what arrives waits in the tunnel's stream
        tunnel, scanner = self._tunnel, self._client.scanner
        if scanner.rest:
            self._hand(Handed())
            return
        data = tunnel.receive_nowait()
        if not data:
            if tunnel.is_at_end:
                self._hand(Handed())
            return
        self._client.bytes_in += len(data)
        end = scanner.whole_head(data)
        if end < 0:
            scanner.feed(data)
            self._hand(Handed())
            return
        if len(data) > end + 4:
            scanner.feed(data[end + 4 :])
        self._request(data[:end])

    def _request(self, raw: bytes) -> None:
        line, _, block = raw.partition(b"\r\n")
        simple = _SIMPLE.fullmatch(line)
        if simple is None or (self._terms.has_node_paths and simple[2].startswith(_NODE_PATHS)):
            self._hand(Handed(raw))
            return
        plan, tail = self._planned(block, raw)
        link = self._links.take_idle(plan.node) if plan is not None else None
        if plan is None or link is None:
            self._hand(Handed(raw))
            return
        wire = line + tail
        if link.send_nowait(wire) != len(wire):
            link.abort()
            self._hand(Handed(raw))
            return
        link.on_readable = self._on_answer
        self._link, self._plan, self._raw, self._line = link, plan, raw, (simple[1], simple[2])
        self._began = self._reactor.now
        self._wait_until(self._began + self._terms.response_timeout_s)

    def _planned(self, block: bytes, raw: bytes) -> tuple[Plan | None, bytes]:
        """The plan for these fields, and what the service gets after the request line."""
        plan = self._plans.get(block)
        if plan is None:
            for known in reversed(self._plans.values()):
                if known.template is not None and (tail := known.template.tail_of(block)) is not None:
                    return known, tail
            plan = self._new_plan(block, raw)
        return plan, plan.tail if plan is not None else b""

    def _new_plan(self, block: bytes, raw: bytes) -> Plan | None:
        plan = self._terms.plan(raw)
        if plan is not None and len(block) <= MAX_PLANNED_BYTES:
            if len(self._plans) >= MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[block] = plan
        return plan

    def _on_answer(self) -> None:
        """From the reactor: the service has said something."""
        link, plan = self._link, self._plan
        assert link is not None
        assert plan is not None
        try:
            data = link.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # It had closed the idle connection: nothing was received, and the request may be sent once more (RFC 9112, 9.3.1).
            self._link = None
            link.abort()
            self._hand(Handed(self._raw))
            return
        end = link.scanner.whole_head(data)
        found = self._whole_answer(data, end) if end >= 0 else None
        if found is None:
            link.scanner.feed(data)
            link.on_readable = None
            self._link = None
            self._hand(Handed(self._raw, link, self._reactor.now - self._began))
            return
        self._answer(link, plan, *found)

    def _whole_answer(self, data: bytes, end: int) -> tuple[ResponseHead, Answer, bytes] | None:
        """The response, if it is final and complete; None otherwise, also for a malformed one, which the task deals with."""
        plan = self._plan
        assert plan is not None
        try:
            head = parse_response(data[:end])
            if head.status < 200:
                return None
            request = plan.head if plan.head.method == self._line[0] else _with_method(plan.head, self._line[0])
            answer = answer_back(head, request, keeps_alive=plan.keeps_alive and not self.is_last)
            payload = answer.body.feed(data[end + 4 :])
        except (BadHead, BadBody):
            return None
        return (head, answer, payload) if answer.body.is_done else None

    def _answer(self, link: ServiceLink, plan: Plan, head: ResponseHead, answer: Answer, payload: bytes) -> None:
        out = answer.wire + (chunk(payload) + LAST_CHUNK if answer.is_chunked else payload)
        self._link = None
        if answer.keeps_link and not answer.body.rest:
            self._links.keep(link)
        else:
            link.close()
        is_over = self.is_last or not answer.keeps_client
        self._terms.served(Served(plan, *self._line, link, head.status, len(payload), self._began))
        if not self._tunnel.send_nowait(out):
            self._hand(Handed(unsent=out, is_over=is_over))
            return
        self._client.bytes_out += len(out)
        if is_over:
            self._hand(Handed(is_over=True))
            return
        self._wait_until(self._reactor.now + self._terms.keep_alive_s)
        self._turn()

    def _wait_until(self, deadline: float) -> None:
        """What is waited for has to come by then. The task that sleeps is told only of what is earlier than the end of its sleep: it
        looks again by itself, and telling it with every request would cost more than the request.
        """
        self._deadline = deadline
        if deadline < self._wakes_at:
            self._wakes_at = deadline
            self._sleep.deadline = trio.current_time() + deadline - self._reactor.now

    def _time_out(self) -> None:
        link, self._link = self._link, None
        if link is None:
            self._hand(Handed(is_over=True))
        else:
            link.on_readable = None
            self._hand(Handed(self._raw, link, self._terms.response_timeout_s))

    def _hand(self, handed: Handed) -> None:
        self._handed = handed
        self._is_active = False
        self._tunnel.on_arrival = None
        self._waiter.wake()


def _with_method(head: RequestHead, method: bytes) -> RequestHead:
    return RequestHead(method, head.target, head.version, head.fields, head.length)
