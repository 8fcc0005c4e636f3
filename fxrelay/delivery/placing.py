"""Task: streams of pools: a node is chosen for each and connected to by the first path that works; then the gateway gets its ACCEPT.

The reactor hands an OPEN over through a bounded channel; a task asks the chooser and connects. What the gateway sends meanwhile is kept by
`Placing`, and by `PlacedDelivery` while a connection is tried; when the stream ends, the task is cancelled.
"""

import logging
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.delivery import DeliveryDesk
from fxrelay.delivery.identity import identity_of
from fxrelay.delivery.placed import PlacedDelivery, Placing
from fxrelay.delivery.ports import Asking, Chooser, Entries, Node, NoNode, NotAdmitted, NotTaken, Seat, Seats, Then, Wanted
from fxrelay.delivery.services import AnyService, Endpoint, PoolService
from fxtunnel.codes import Code
from fxtunnel.model import GatewayId, RelayId
from fxtunnel.protocol.opening import Opening
from fxtunnel.protocol.stream import Stream

if TYPE_CHECKING:
    from fxtunnel.engine.reactor import Timer
    from fxtunnel.engine.session import Session

logger = logging.getLogger(__name__)

MAX_PLACINGS: Final = 4_096
"""Streams for which a node is being chosen at the same time. More mean that the chooser hangs, and are refused (`busy`)."""
MAX_NODES: Final = 4
"""Nodes tried for one stream."""
MAX_LOST: Final = 64
"""How often a stream may find its chosen node reserved by another user a moment earlier."""
LOST_AGAIN_S: Final = 0.2
"""Before the same node is tried again: the chooser's view of it is out of date."""
ACCEPT_AFTER_S: Final = 6.0
"""A stream that may wait longer than gateways do (10 s) is accepted after this long. It cannot be redirected afterwards."""
ALL_PATHS: Final[tuple[PathKind, ...]] = ("local", "redirect", "direct")


class Placer:
    """Finds nodes for streams. `place` is for the reactor, `run` is the task that serves it; `paths` may be replaced at any time.

    `seats` says which streams have to take a seat on this node after being redirected here. `entries` admits the streams of guarded
    services; without it all of them are refused.
    """

    def __init__(self, chooser: Chooser, paths: tuple[PathKind, ...] = ALL_PATHS, seats: Seats | None = None) -> None:
        self.paths = paths
        self._seats = seats
        self.entries: Entries | None = None
        self.placings: set[Placing] = set()
        self._chooser = chooser
        self._orders, self._ordered = trio.open_memory_channel[Placing](MAX_PLACINGS)

    def place(
        self, desk: DeliveryDesk, session: "Session", stream: Stream, service: PoolService, opening: Opening, gateway_id: GatewayId
    ) -> None:
        """Take the stream on. It is served, redirected or refused within the desk's place_timeout_s, plus what it may wait for a node."""
        placing = Placing(desk, session, stream, service, opening, _wanted(service, opening, gateway_id))
        node = self._chooser.choose_nowait(placing.wanted)
        desk.count_opening(service)
        if node is None and self._ask(placing):
            return
        if node is None or not self._set_out(placing, node):
            self._order(placing)

    def place_here(
        self, desk: DeliveryDesk, session: "Session", stream: Stream, service: PoolService, opening: Opening, gateway_id: GatewayId
    ) -> bool:
        """Take on a stream that was redirected to this node, if it needs a seat here; otherwise false."""
        wanted = _wanted(service, opening, gateway_id)
        seat = self._seats.seat_here(wanted) if self._seats is not None else None
        if seat is None:
            return False
        placing = Placing(desk, session, stream, service, opening, wanted)
        placing.seat = seat
        desk.count_opening(service)
        self._order(placing)
        return True

    def place_guarded(
        self, desk: DeliveryDesk, session: "Session", stream: Stream, service: AnyService, opening: Opening, gateway_id: GatewayId
    ) -> None:
        """Take on a stream of a guarded service: it is admitted first, and then placed, or connected to the service's one address."""
        wanted = _wanted(service, opening, gateway_id)
        placing = Placing(desk, session, stream, service, opening, wanted)
        if self.entries is None:
            placing.give_up(Code.NO_SERVICE, "this relay admits nobody")
            return
        placing.entry = self.entries.entry(service.name, opening, wanted.trace_id)
        desk.count_opening(service)
        self._order(placing)

    def _ask(self, placing: Placing) -> bool:
        """Have a node chosen without a task. False: only a task can do that."""
        if placing.wait_s or len(self.placings) >= MAX_PLACINGS:
            return False
        asked = _Asked(self, placing)
        asking = self._chooser.choose_soon(placing.wanted, asked.told)
        if asking is None:
            return False
        self.placings.add(placing)
        placing.asking = asked
        asked.begin(asking)
        return True

    def chosen(self, placing: Placing, answer: Node | NoNode | None) -> None:
        """What came of `choose_soon`."""
        if placing.is_over:
            if isinstance(answer, Node):
                answer.claim.release()
        elif isinstance(answer, NoNode):
            self._turn_away(placing, answer.code, answer.text)
        elif answer is None or not self._set_out(placing, answer):
            self._order(placing)

    def _set_out(self, placing: Placing, node: Node) -> bool:
        """Take the first path to the node without a task, as most streams can. False: no path was begun; a task has to go on."""
        placing.claim = node.claim
        limits = placing.desk.limits
        if limits.connect_timeout_s > limits.place_timeout_s:  # only a task can end a connection attempt before connect_timeout_s
            placing.first = node, self.paths
            return False
        for position, path in enumerate(self.paths):
            if path == "redirect":
                if _can_redirect(placing, node):
                    placing.redirect(node.server_id)
                    return True
                continue
            endpoints = _endpoints(placing, node, path)
            if not endpoints:
                continue
            connected, addresses = placing.desk.connect_first(endpoints)
            if isinstance(connected, str):
                placing.problem = (Code.CONNECT_FAILED, connected)
                continue
            placing.first = node, self.paths[position + 1 :]
            placing.resume = self._order
            placing.desk.admit(PlacedDelivery(placing, connected, addresses, path), placing.session, placing.stream)
            return True
        placing.first = node, ()
        return False

    def _order(self, placing: Placing) -> None:
        """Have a task go on with the stream, or refuse it."""
        try:
            if len(self.placings) >= MAX_PLACINGS:
                raise trio.WouldBlock
            self._orders.send_nowait(placing)
        except trio.WouldBlock:
            self._turn_away(placing, Code.BUSY, "too many streams wait for a node")
        except trio.BrokenResourceError:
            self._turn_away(placing, Code.DRAINING, "this relay is going away")
        else:
            self.placings.add(placing)

    def _turn_away(self, placing: Placing, code: Code, text: str) -> None:
        placing.give_up(code, text)
        placing.release()
        placing.release_entry()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Place streams until cancelled; those that are not placed by then are reset. Run it once."""
        try:
            with self._ordered:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    async for placing in self._ordered:
                        nursery.start_soon(self._serve, placing)
        finally:
            self.abort_all()

    def abort_all(self) -> None:
        """End every stream that has no node yet, with RST."""
        for placing in list(self.placings):
            placing.fail(Code.SHUTDOWN)

    async def _serve(self, placing: Placing) -> None:
        try:
            with placing.scope as scope:
                left_s = placing.wanted.since + placing.desk.limits.place_timeout_s + placing.wait_s - time.monotonic()
                scope.deadline = trio.current_time() + left_s
                await self._serve_admitted(placing)
            await placing.leave()
            problem = placing.problem if not scope.cancelled_caught else None
            placing.give_up(*(problem or (Code.CONNECT_TIMEOUT, "no node in time")))
        except Exception:
            logger.exception("a stream's node could not be chosen (trace %s)", placing.wanted.trace_id)
            placing.fail(Code.INTERNAL_ERROR)
        finally:
            self.placings.discard(placing)
            placing.fail(Code.SHUTDOWN)
            placing.release()
            placing.release_entry()

    async def _serve_admitted(self, placing: Placing) -> None:
        """Serve, redirect, or leave a `problem` that says why not."""
        entry, service, opening = placing.entry, placing.service, placing.opening
        if entry is not None:
            answer = entry.admit()
            if isinstance(answer, NotAdmitted):
                placing.problem = (answer.code, answer.text)
                return
            wanted = placing.wanted
            user = answer.user or wanted.user
            placing.wanted = replace(wanted, node=answer.node, user=user, groups=answer.groups, is_proven=bool(answer.user))
            if isinstance(service, PoolService) and opening.via is not None and self._seats is not None:
                placing.seat = self._seats.seat_here(placing.wanted)
        if isinstance(service, PoolService) and opening.via is None:
            await self._find(placing)
        else:
            await self._serve_here(placing)

    async def _find(self, placing: Placing) -> None:
        excluded: frozenset[RelayId] = frozenset()
        lost, last = 0, None
        while len(excluded) < MAX_NODES and lost < MAX_LOST:
            answer, paths = placing.first or (await self._choose(placing, excluded), self.paths)
            placing.first = None
            if isinstance(answer, NoNode):
                if placing.problem is None or answer.code.is_final:
                    placing.problem = (answer.code, answer.text)
                return
            then = await self._reach(placing, answer, paths)
            if placing.is_over or placing.is_final:
                return
            placing.release()
            if then is Then.AGAIN and (answer.server_id != last or placing.wait_s):
                lost += 1
                placing.problem = None
                if answer.server_id == last:
                    await trio.sleep(LOST_AGAIN_S)  # the chooser still takes it for free; the store knows better
                last = answer.server_id
            else:
                excluded |= {answer.server_id}
        placing.problem = placing.problem or (Code.CONNECT_FAILED, "no path to the nodes chosen")

    async def _choose(self, placing: Placing, excluded: frozenset[RelayId]) -> Node | NoNode:
        """Ask the chooser. A stream that waits longer than the gateway would is accepted meanwhile, and its bytes are kept here."""
        if not placing.wait_s or placing.stream.accepted:
            return await self._ask_chooser(placing, excluded)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept_later, placing, max(0.0, placing.wanted.since + ACCEPT_AFTER_S - time.monotonic()))
            answer = await self._ask_chooser(placing, excluded)
            nursery.cancel_scope.cancel()
        return answer

    async def _ask_chooser(self, placing: Placing, excluded: frozenset[RelayId]) -> Node | NoNode:
        answer = await self._chooser.choose(placing.wanted, excluded)
        if isinstance(answer, Node):
            placing.claim, placing.seat = (
                answer.claim,
                answer.seat,
            )  # noted here, since the caller may be cancelled before it gets the answer
        return answer

    async def _serve_here(self, placing: Placing) -> None:
        """Serve a stream on this node or not at all: it was redirected by a relay that knows others, or its service has one address."""
        is_free = await self._use(placing, None) and (placing.seat is None or await self._sit(placing, placing.seat))
        if is_free and not await self._connect(placing, placing.service.endpoints, "local"):
            placing.problem = placing.problem or (Code.CONNECT_FAILED, "the service's host name does not resolve")

    async def _use(self, placing: Placing, node: RelayId | None) -> bool:
        """Ask the last questions about the stream: may it have `node` (None: this one)? False: it may not, or is gone."""
        refused = await placing.entry.use(node) if placing.entry is not None else None
        if refused is not None:
            placing.problem, placing.is_final = (refused.code, refused.text), True
        return refused is None and not placing.is_over

    async def _sit(self, placing: Placing, seat: Seat) -> bool:
        """Reserve the node for the stream's user. False: that failed, or the stream is gone."""
        taken = await seat.take()
        if isinstance(taken, NotTaken):
            placing.problem = (Code.CONNECT_FAILED, taken.text)
            placing.is_final = taken.then is Then.GIVE_UP or placing.opening.via is not None
            placing.quicker = taken.then is Then.AGAIN
            return False
        return not placing.is_over

    async def _reach(self, placing: Placing, node: Node, paths: tuple[PathKind, ...]) -> Then:
        """Try the paths to the node until the stream is served, redirected or gone. Returns what to do if it is none of these."""
        for path in paths:
            if path == "redirect":
                if _can_redirect(placing, node):
                    placing.redirect(node.server_id)
                    return Then.GIVE_UP
                continue
            endpoints = _endpoints(placing, node, path)
            if not endpoints:
                continue
            if not await self._use(placing, node.server_id):
                return Then.GIVE_UP
            if placing.seat is not None and not await self._sit(placing, placing.seat):
                return Then.AGAIN if placing.quicker else Then.ELSEWHERE
            if await self._connect(placing, endpoints, path):
                return Then.GIVE_UP
        return Then.ELSEWHERE

    async def _connect(self, placing: Placing, endpoints: tuple[Endpoint, ...], path: PathKind) -> bool:
        """Connect the stream to the first endpoint that takes it. True: it is being served, or is gone."""
        if placing.is_over:
            return True
        connected, addresses = placing.desk.connect_first(endpoints)
        if isinstance(connected, str):
            placing.problem = (Code.CONNECT_FAILED, connected)
            return False
        placing.settled = trio.Event()
        delivery = PlacedDelivery(placing, connected, addresses, path)
        self.placings.discard(placing)  # while it has a socket, the desk counts and ends it
        placing.desk.admit(delivery, placing.session, placing.stream)
        try:
            await placing.settled.wait()
        finally:
            delivery.withdraw()
        if not placing.is_over:
            self.placings.add(placing)
        return placing.is_over


class _Asked:
    """Implements `Asking` for a stream: a question that ends with the stream, and ends the stream when its time is up."""

    __slots__ = ("_asking", "_placer", "_placing", "_timer")

    def __init__(self, placer: Placer, placing: Placing) -> None:
        self._placer = placer
        self._placing = placing
        self._asking: Asking | None = None
        self._timer: Timer | None = None

    def begin(self, asking: Asking) -> None:
        """The question has been asked."""
        desk = self._placing.desk
        self._asking = asking
        self._timer = desk.reactor.call_later(desk.limits.place_timeout_s, self._late)

    def told(self, answer: Node | NoNode | None) -> None:
        """The answer has come."""
        self._placing.asking = None
        self._leave()
        self._placer.chosen(self._placing, answer)

    def cancel(self) -> None:
        """See `Asking`."""
        self._leave()
        if self._asking is not None:
            self._asking.cancel()

    def _leave(self) -> None:
        self._placer.placings.discard(self._placing)
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        self._placing.give_up(Code.CONNECT_TIMEOUT, "no node in time")


def _can_redirect(placing: Placing, node: Node) -> bool:
    is_open = not placing.is_over and not placing.stream.accepted
    return node.can_redirect and is_open and node.server_id not in placing.opening.avoid


def _endpoints(placing: Placing, node: Node, path: PathKind) -> tuple[Endpoint, ...]:
    """The endpoints of the node's service by this path; empty if the path does not lead there."""
    service = placing.service
    assert isinstance(service, PoolService)
    if path == "local":
        return service.endpoints if node.is_local else ()
    endpoint = service.endpoint_at(node.address) if node.address else None
    return (endpoint,) if endpoint is not None else ()


async def _accept_later(placing: Placing, after_s: float) -> None:
    await trio.sleep(after_s)
    if not placing.is_over:
        placing.stream.accept()


def _wanted(service: AnyService, opening: Opening, gateway_id: GatewayId) -> Wanted:
    return Wanted(
        service.name,
        opening.client,
        gateway_id,
        opening.trace or secrets.token_hex(4),
        opening.node,
        identity_of(opening.client),
        time.monotonic(),
        came_back=bool(opening.avoid),
    )
