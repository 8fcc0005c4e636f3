"""Task: chooses nodes for the streams of pools: the cluster as it is known, the filters, the chain, and a claim on the result."""

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from fxrelay.balance.chain import decide
from fxrelay.balance.filters import Circumstances, Pool, Sieve, reason_outside
from fxrelay.balance.model import Action, Decision, Entry, Environment, Request
from fxrelay.balance.ways import Ways
from fxrelay.cluster.inflight import Placement, PlacementId
from fxrelay.cluster.members import Member, MemberState
from fxrelay.cluster.ports import PLACEMENTS, Store, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ENDED, PLACED, ClusterView, encode_placement
from fxrelay.delivery.ports import Claim, Node, NoNode, Wanted
from fxtunnel.codes import Code
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.model import GatewayId, RelayId, ServiceName

logger = logging.getLogger(__name__)

PUBLISH_QUEUE: Final = 1_024
NEXT_NUMBER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Balancing:
    """A pool and how its nodes are chosen."""

    pool: Pool
    chain: tuple[Entry, ...]
    action: Action = Action.START


class ClusterEnvironment:
    """What entries may ask for: the counter all relays share, or one of this relay's own while the store is away."""

    def __init__(self, local_id: RelayId, store: Store, threads: Threads) -> None:
        self._local_id = local_id
        self._store = store
        self._threads = threads
        self._own: dict[str, int] = {}

    @property
    def local_id(self) -> RelayId:
        """See `Environment`."""
        return self._local_id

    async def next_number(self, counter: str) -> int:
        """See `Environment`."""
        number: int | None = None
        try:
            with trio.move_on_after(NEXT_NUMBER_S):
                number = await self._threads.run(lambda: self._store.add(counter, 1))
        except StoreError:
            pass  # the follower says so in status and log
        self._own[counter] = number = self._own.get(counter, 0) + 1 if number is None else number
        return number


class PoolChooser:
    """Implements `Chooser`. `run` tells the others about placements; `choose` works without it, but then only this relay knows."""

    def __init__(
        self, view: ClusterView, ways: Ways, environment: Environment, transporter: Transporter, threads: Threads, instance: str
    ) -> None:
        self._view = view
        self._ways = ways
        self._environment = environment
        self._transporter = transporter
        self._threads = threads
        self._instance = instance
        self._balancing: Mapping[ServiceName, Balancing] = {}
        self._sieves: dict[tuple[str, Action, GatewayId], Sieve] = {}
        self._news_in, self._news_out = trio.open_memory_channel[str](PUBLISH_QUEUE)
        self.decisions = 0
        self.failures: dict[str, int] = {}

    def reconfigure(self, balancing: Mapping[ServiceName, Balancing]) -> None:
        """Pools and chains from now on; decisions that are under way end as they began."""
        self._balancing = balancing
        self._sieves = {}

    async def run(self) -> None:
        """Tell the other relays about placements until cancelled. What they do not hear they learn from the servers' updates."""
        async for text in self._news_out:
            try:
                await self._threads.run(lambda text=text: self._transporter.publish(PLACEMENTS, text))  # type: ignore[misc]
            except TransporterError as exc:
                logger.debug("a placement was not told: %s", exc)

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        """See `Chooser`."""
        balancing = self._balancing.get(wanted.service)
        if balancing is None:
            await trio.lowlevel.checkpoint()
            return NoNode(Code.NO_SERVICE, "not served here")
        around = Circumstances(self._view.in_flight.counts(self._view.now), excluded, only=wanted.node)
        decision = await self._decide(balancing, Request(balancing.action, wanted.service), wanted.gateway_id, around)
        member = self._view.members.get(decision.server_id, self._view.now) if decision.server_id is not None else None
        if member is None:
            return self._refusal(wanted, decision)
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
        return self._node(member, wanted, _NoClaim())

    async def _decide(self, balancing: Balancing, request: Request, gateway_id: GatewayId, around: Circumstances) -> Decision:
        sieve = self._sieve(balancing.pool, request.action, gateway_id)
        candidates, dropped = sieve.sift(self._view.everyone(), request.user, around)
        self.decisions += 1
        return await decide(balancing.chain, request, candidates, dropped, self._environment)

    def _sieve(self, pool: Pool, action: Action, gateway_id: GatewayId) -> Sieve:
        key = (pool.service, action, gateway_id)
        found = self._sieves.get(key)
        if found is None:
            found = self._sieves[key] = Sieve(pool, action, partial(self._ways.reaches, gateway_id=gateway_id))
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
        return NoNode(Code.CONNECT_FAILED, f"{name} (trace {wanted.trace_id})", name, message)

    def _node(self, member: Member, wanted: Wanted, claim: Claim) -> Node:
        server = member.server
        return Node(
            server.server_id,
            self._ways.is_local(server),
            self._ways.direct_address(server),
            self._ways.can_redirect(server, wanted.gateway_id),
            claim,
        )

    def _claim(self, server_id: RelayId) -> "PlacementClaim":
        placement = Placement(PlacementId(f"{self._instance[:16]}-{secrets.token_hex(8)}"), server_id, self._view.now_ms)
        self._view.in_flight.add(placement, self._view.now)
        return PlacementClaim(self._view, placement, self._tell)

    def _tell(self, event: str, placement: Placement) -> None:
        with suppress(trio.WouldBlock, trio.BrokenResourceError):  # then the servers' own updates will tell
            self._news_in.send_nowait(encode_placement(event, placement))


class _NoClaim:
    """Implements `Claim` for what is counted already."""

    def connected(self) -> None:
        """See `Claim`."""

    def release(self) -> None:
        """See `Claim`."""

    def hand_over(self) -> None:
        """See `Claim`."""


class PlacementClaim:
    """Implements `Claim`: a placement that all relays count until the node does."""

    __slots__ = ("_placement", "_released", "_tell", "_view")

    def __init__(self, view: ClusterView, placement: Placement, tell: Callable[[str, Placement], None]) -> None:
        self._view = view
        self._placement = placement
        self._tell = tell
        self._released = False
        tell(PLACED, placement)

    def connected(self) -> None:
        """See `Claim`."""
        placement = self._placement
        self._placement = later = Placement(placement.placement_id, placement.server_id, self._view.now_ms)
        self._view.in_flight.add(later, self._view.now)
        self._tell(PLACED, later)

    def hand_over(self) -> None:
        """See `Claim`."""
        if not self._released:
            self._released = True
            self.connected()

    def release(self) -> None:
        """See `Claim`."""
        if not self._released:
            self._released = True
            self._view.in_flight.withdraw(self._placement.placement_id)
            self._tell(ENDED, self._placement)
