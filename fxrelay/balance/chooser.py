"""Task: chooses nodes for the streams of pools: the cluster as it is known, the filters, the chain, and a claim on the result."""

import json
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import trio

from fxrelay.balance.chain import Deciding, decide, decide_nowait, is_instant, needs_no_task
from fxrelay.balance.claims import TAKES_NO_PART, ClosedSeat, NoClaim, PlacementClaim
from fxrelay.balance.filters import RESERVED, CandidateFilter, FilterContext, Pool, reason_outside
from fxrelay.balance.holders import against, of_others, prefer
from fxrelay.balance.model import Action, Cancellable, Candidate, ChainEntry, Decision, Dropped, Environment, Request
from fxrelay.balance.path_rules import PathRules
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.balance.seating import NO_RULES, Queueing, Seating, SeatRules
from fxrelay.balance.wait_queue import WaitQueue
from fxrelay.cluster.inflight import Placement, PlacementId
from fxrelay.cluster.members import Member, MemberState, sessions_of
from fxrelay.cluster.server import ServerObject
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.identity import identity_of
from fxrelay.delivery.ports import Claim, Node, NoNode, Seat, Wanted
from fxtunnel.codes import Code
from fxtunnel.model import GatewayId, RelayId, ServiceName

logger = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 1.0
"""A stream that waits for a server looks again after this long even without news: reservations also expire."""


Told = Callable[[Node | NoNode | None], None]


@dataclass(frozen=True, slots=True)
class Balancing:
    """A pool and how its nodes are chosen."""

    pool: Pool
    chain: tuple[ChainEntry, ...]
    action: Action = Action.START
    seats: SeatRules = NO_RULES
    is_instant: bool = field(init=False)
    needs_no_task: bool = field(init=False)
    """Whether `Deciding` can ask the chain. Kept, since asking every entry for each stream is measurable."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_instant", is_instant(self.chain))
        object.__setattr__(self, "needs_no_task", needs_no_task(self.chain))


class PoolChooser:
    """Implements `Chooser`. What it places is counted in the view at once, and told to the other relays by `tell`, see `PlacementNews`."""

    def __init__(
        self, view: ClusterView, path_rules: PathRules, environment: Environment, tell: Callable[[str, Placement], None], instance: str
    ) -> None:
        self._view = view
        self.path_rules = path_rules
        self._environment = environment
        self._tell = tell
        self._instance = instance
        self._balancing: Mapping[ServiceName, Balancing] = {}
        self._candidate_filters: dict[tuple[str, Action, GatewayId], CandidateFilter] = {}
        self._lines: defaultdict[ServiceName, WaitQueue] = defaultdict(WaitQueue)
        self.seating: Seating | None = None
        """Reservations. None: this relay takes no part in them, and reserves no server for anybody."""
        self.decisions = 0
        self.failures: dict[str, int] = {}

    def reconfigure(self, balancing: Mapping[ServiceName, Balancing]) -> None:
        """Pools and chains from now on, and `path_rules` as it is now; decisions that are under way end as they began."""
        self._balancing = balancing
        self._candidate_filters = {}

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        """See `Chooser`."""
        balancing = self._balancing.get(wanted.service)
        if balancing is None:
            await trio.lowlevel.checkpoint()
            return NoNode(Code.NO_SERVICE, "not served here")
        if balancing.seats.guard_start and self.seating is None:
            await trio.lowlevel.checkpoint()
            return NoNode(Code.CONNECT_FAILED, TAKES_NO_PART)
        queue, line = balancing.seats.queue, self._lines[wanted.service]
        if queue is None or not line:
            answer, decision = await self._choose(balancing, wanted, excluded)
            if answer is not None:
                return answer
            if queue is None or not _may_wait(decision):
                return self._refusal(wanted, decision)
        return await self._wait(balancing, queue, wanted, excluded)

    def choose_nowait(self, wanted: Wanted) -> Node | None:
        """See `Chooser`. Chains of built-in entries need no task; reservations, lines and refusals do."""
        balancing = self._balancing.get(wanted.service)
        if balancing is None or not balancing.is_instant or not self._is_free(balancing, wanted):
            return None
        request = self._request(balancing, wanted)
        decision = decide_nowait(balancing.chain, request, self._peek(balancing, request, wanted), (), self._environment)
        return self._free_node(balancing, request, wanted, decision)

    def choose_soon(self, wanted: Wanted, then: Told) -> Cancellable | None:
        """See `Chooser`. For chains with scripts, whose processes are asked from the reactor."""
        balancing = self._balancing.get(wanted.service)
        if balancing is None or not balancing.needs_no_task or not self._is_free(balancing, wanted):
            return None
        request = self._request(balancing, wanted)
        told = partial(self._decided, balancing, request, wanted, then)
        deciding = Deciding(balancing.chain, (request, self._peek(balancing, request, wanted), self._environment), told)
        return deciding if deciding.begin() else None

    def _decided(
        self,
        balancing: Balancing,
        request: Request,
        wanted: Wanted,
        then: Told,
        decision: Decision | None,
    ) -> None:
        if decision is None or decision.failure is None:
            then(self._free_node(balancing, request, wanted, decision) if decision is not None else None)
            return
        self.decisions += 1
        dropped = self._candidates(balancing, request, wanted, ())[1]
        then(self._refusal(wanted, replace(decision, dropped=tuple(dropped))))

    def _request(self, balancing: Balancing, wanted: Wanted) -> Request:
        """The request to decide about. Sessions and data are gathered only if scripts are asked, since nobody else needs them."""
        action = _action(balancing, wanted)
        user = wanted.user if action is Action.LOGIN or wanted.is_proven else ""
        if is_instant(balancing.chain):
            return Request(action, wanted.service, user)
        return Request(
            action,
            wanted.service,
            user,
            sessions_of(self._view.everyone(), user) if user else (),
            {"sub": user} if wanted.is_proven else {},
            wanted.groups,
            data={**({"serverId": wanted.node} if wanted.node else {}), **(wanted.data or {})},
        )

    def _is_free(self, balancing: Balancing, wanted: Wanted) -> bool:
        """Whether the stream can have its node without waiting in line and without a reservation."""
        if self._lines.get(wanted.service):
            return False
        is_login = _action(balancing, wanted) is Action.LOGIN
        return not (is_login if self.seating is not None else balancing.seats.guard_start)

    def _peek(self, balancing: Balancing, request: Request, wanted: Wanted) -> Sequence[Candidate]:
        candidate_filter = self._candidate_filter(balancing.pool, request.action, wanted.gateway_id)
        return candidate_filter.peek(self._view.everyone(), request.user, self._around(balancing, request, wanted, ()))

    def _free_node(self, balancing: Balancing, request: Request, wanted: Wanted, decision: Decision) -> Node | None:
        """The node that was chosen; None if it has gone, or has to be reserved."""
        member = self._view.members.get(decision.server_id, self._view.now) if decision.server_id is not None else None
        if member is None or _reserves(balancing, member.server, request.action):
            return None
        self.decisions += 1
        return self._node(member, wanted, self._claim(member.server.server_id))

    async def named(self, wanted: Wanted, server_id: RelayId) -> Node | NoNode:
        """The node with this id, if it belongs to the service's pool, also when it takes no new sessions. Its claim counts nothing: what is
        named was placed before. Raises nothing.
        """
        await trio.lowlevel.checkpoint()
        balancing = self._balancing.get(wanted.service)
        member = self._view.members.get(server_id, self._view.now)
        if balancing is None or member is None or reason_outside(member, balancing.pool) is not None:
            return NoNode(Code.NO_SERVICE, "no such node in the pool")
        if member.state is MemberState.DOWN:
            return NoNode(Code.CONNECT_FAILED, "the node is down")
        return self._node(member, wanted, NoClaim())

    def seat_here(self, wanted: Wanted) -> Seat | None:
        """See `Seats`."""
        balancing = self._balancing.get(wanted.service)
        member = self._view.members.get(self._environment.local_id, self._view.now)
        if balancing is None or not _reserves(balancing, member.server if member is not None else None, balancing.action):
            return None
        if self.seating is None:
            return ClosedSeat()
        candidates = self._candidates(balancing, self._request(balancing, wanted), wanted, ())[0]
        return self.seating.seat(self._environment.local_id, wanted.user, balancing.seats, _would_do(balancing.seats, candidates))

    def waiting(self) -> dict[ServiceName, int]:
        """How many wait for a server, by service."""
        return {service: len(line) for service, line in self._lines.items() if line}

    async def _wait(self, balancing: Balancing, queue: Queueing, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        line = self._lines[wanted.service]
        if len(line) >= queue.most:
            return NoNode(Code.BUSY, "too many wait for a reserved server", position=len(line) + 1)
        since = wanted.since or time.monotonic()
        position = 0
        with line.place(since) as place, trio.move_on_after(max(0.0, since + queue.wait_s - time.monotonic())):
            try:
                while True:
                    if not place.turn.is_set():
                        await place.turn.wait()
                        # The stream ahead has been given a server but does not hold it yet: trying now could take it away from that one.
                        await self._next_change()
                    changed = self._changed()
                    answer, decision = await self._choose(balancing, wanted, excluded)
                    if answer is not None:
                        return answer
                    if not _may_wait(decision):
                        return self._refusal(wanted, decision)
                    with trio.move_on_after(LOOK_AGAIN_S):
                        await changed.wait()
            finally:
                position = place.position
        return NoNode(Code.BUSY, f"no reserved server was free within {queue.wait_s:g} s", position=position)

    def _changed(self) -> trio.Event:
        return self.seating.changed if self.seating is not None else trio.Event()

    async def _next_change(self) -> None:
        with trio.move_on_after(LOOK_AGAIN_S):
            await self._changed().wait()

    async def _choose(self, balancing: Balancing, wanted: Wanted, excluded: frozenset[RelayId]) -> tuple[Node | NoNode | None, Decision]:
        """The node, or None and a decision that says why there is none."""
        request = self._request(balancing, wanted)
        if wanted.came_back and self.seating is not None and request.action is Action.LOGIN and wanted.user:
            await self.seating.find_homes(wanted.user)  # the node that refused it may have known of another node that the user has
        candidates, dropped = self._candidates(balancing, request, wanted, excluded)
        self.decisions += 1
        preferred = self._preferred(balancing, request, candidates)
        decision = await decide(balancing.chain, request, preferred, dropped, self._environment)
        member = self._view.members.get(decision.server_id, self._view.now) if decision.server_id is not None else None
        if member is None:
            return None, decision
        server = member.server
        seat = None
        if _reserves(balancing, server, request.action):
            if self.seating is None or not wanted.user:
                why = "whose stream it is cannot be told" if self.seating is not None else "this relay takes no part in reservations"
                return NoNode(Code.CONNECT_FAILED, f"{server.server_id} is for one user only, and {why}"), decision
            seat = self.seating.seat(server.server_id, wanted.user, balancing.seats, _would_do(balancing.seats, candidates))
        return self._node(member, wanted, self._claim(server.server_id), seat), decision

    def _candidates(
        self, balancing: Balancing, request: Request, wanted: Wanted, excluded: Collection[RelayId]
    ) -> tuple[list[Candidate], list[Dropped]]:
        around = self._around(balancing, request, wanted, excluded)
        candidate_filter = self._candidate_filter(balancing.pool, request.action, wanted.gateway_id)
        candidates: list[Candidate]
        candidates, dropped = candidate_filter.apply(self._view.everyone(), request.user, around)
        return candidates, dropped

    def _preferred(self, balancing: Balancing, request: Request, candidates: list[Candidate]) -> list[Candidate]:
        if self.seating is None or not any(_reserves(balancing, candidate.server, request.action) for candidate in candidates):
            return candidates
        now_ms, holders = self._view.now_ms, self.seating.holders
        return prefer(candidates, request.user, holders.users(now_ms), holders.wanted(now_ms), balancing.seats.relogin)

    def _around(self, balancing: Balancing, request: Request, wanted: Wanted, excluded: Collection[RelayId]) -> FilterContext:
        seats = balancing.seats
        holders: Mapping[RelayId, str] = self.seating.holders.users(self._view.now_ms) if self.seating is not None else {}
        if request.action is Action.LOGIN:
            holders = against(holders, request.user, seats.relogin)
        elif seats.guard_start:
            holders = of_others(holders, wanted.user or identity_of(wanted.client))
        return FilterContext(
            self._view.in_flight.counts(self._view.now),
            excluded,
            holders,
            seats.guard_start,
            wanted.node,
        )

    def _candidate_filter(self, pool: Pool, action: Action, gateway_id: GatewayId) -> CandidateFilter:
        key = (pool.service, action, gateway_id)
        found = self._candidate_filters.get(key)
        if found is None:
            found = self._candidate_filters[key] = CandidateFilter(pool, action, partial(self.path_rules.reaches, gateway_id=gateway_id))
        return found

    def _refusal(self, wanted: Wanted, decision: Decision) -> NoNode:
        failure = decision.failure
        name = failure.name if failure is not None else "ServerGone"
        self.failures[name] = self.failures.get(name, 0) + 1
        reasons = ", ".join(sorted({dropped.reason for dropped in decision.dropped}))
        logger.warning(
            "no node for service %s (trace %s): %s%s%s",
            wanted.service,
            wanted.trace_id,
            f"{failure.name}: {failure.message}" if failure is not None else "the server chosen has gone",
            f"; filtered out: {reasons}" if reasons else "",
            f"; {json.dumps(failure.detail)}" if failure is not None and failure.detail else "",
        )
        message = failure.message if failure is not None else "The server chosen has gone."
        code = Code.FORBIDDEN if failure is not None and failure.is_refusal else Code.CONNECT_FAILED
        return NoNode(code, f"{name} (trace {wanted.trace_id})", name, message)

    def _node(self, member: Member, wanted: Wanted, claim: Claim, seat: Seat | None = None) -> Node:
        server = member.server
        return Node(
            server.server_id,
            self.path_rules.is_local(server),
            self.path_rules.direct_address(server),
            self.path_rules.can_redirect(server, wanted.gateway_id),
            claim,
            seat,
        )

    def _claim(self, server_id: RelayId) -> PlacementClaim:
        placement = Placement(PlacementId(f"{self._instance[:16]}-{secrets.token_hex(8)}"), server_id, self._view.now_ms)
        self._view.in_flight.add(placement, self._view.now)
        return PlacementClaim(self._view, placement, self._tell)


def _action(balancing: Balancing, wanted: Wanted) -> Action:
    return Action(wanted.action) if wanted.action else balancing.action


def _reserves(balancing: Balancing, server: ServerObject | None, action: Action) -> bool:
    if action is not Action.LOGIN:
        return False
    return balancing.seats.always or (server is not None and server.enable_reservations)


def _would_do(seats: SeatRules, candidates: list[Candidate]) -> Callable[[str], bool] | None:
    """Tells of a server whether it would do for the login; None where a user may have several servers."""
    if seats.relogin is not OwnerRelogin.PREFER:
        return None
    return lambda server_id: any(candidate.server_id == server_id for candidate in candidates)


def _may_wait(decision: Decision) -> bool:
    """Whether it would help if somebody else left: then the stream may wait."""
    return any(dropped.reason == RESERVED for dropped in decision.dropped)
