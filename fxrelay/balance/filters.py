"""Pure: which servers a chain is asked about at all, and why the others are not."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from fxrelay.balance.model import Action, Candidate, Dropped
from fxrelay.cluster.members import Member, MemberState
from fxrelay.cluster.server import ServerObject
from fxtunnel.model import RelayId

NOT_IN_POOL: Final = "not-in-pool"
NOT_SERVED: Final = "service-not-there"
NO_MATCH: Final = "static-data-differs"
EXCLUDED: Final = "tried-before"
UNREACHABLE: Final = "no-path"
DRAINING: Final = "draining"
LOGIN_DISABLED: Final = "login-disabled"
START_DISABLED: Final = "start-disabled"
FULL: Final = "full"
RESERVED: Final = "reserved"
NOT_ASKED_FOR: Final = "not-asked-for"

_ID: Final = attrgetter("server.server_id")


@dataclass(frozen=True, slots=True)
class Pool:
    """Which nodes a service may run on. `nodes` None means every node that publishes the service; `where` is matched with static data."""

    service: str
    nodes: frozenset[RelayId] | None = None
    where: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What besides the servers decides: how many placements each has on its way, who was tried, who belongs to whom.

    `holders` maps reserved servers to their user; with `guards_start` they are kept from others' session starts too. `only` is the one
    server that the client asked for, if it did.
    """

    in_flight: Mapping[RelayId, int]
    excluded: Collection[RelayId] = ()
    holders: Mapping[RelayId, str] | None = None
    guards_start: bool = False
    only: RelayId | None = None


def everyone(server: ServerObject) -> bool:
    """There is a way to every server, or it does not matter whether there is."""
    return True


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found out about a member. `room` is what its maxSessions leave; None without such a limit."""

    member: Member
    candidate: Candidate
    dropped: Dropped | None
    room: int | None


class Sieve:
    """The filters of one pool for one action. What they say of a member is remembered for as long as nothing about it changes, so that a
    decision over a thousand servers costs little more than a walk along them.

    The order is: pool, state (stale, down, draining), reachability, the switches for login or start (clustering guide, "The Server List");
    then what no server says of itself: not asked for, tried before, reserved for somebody else, full. Reservations concern logins
    only, unless starts are guarded: a start is already somebody's.
    """

    def __init__(self, pool: Pool, action: Action, reaches: Callable[[ServerObject], bool] = everyone) -> None:
        self._pool = pool
        self._action = action
        self._reaches = reaches
        self._known: dict[RelayId, _Known] = {}

    def sift(self, members: Collection[Member], user: str, around: Circumstances) -> tuple[list[Candidate], list[Dropped]]:
        """The candidates in order of id, and everyone else with the first reason that applied."""
        candidates: list[Candidate] = []
        dropped: list[Dropped] = []
        known_members, in_flight, excluded, only = self._known, around.in_flight, around.excluded, around.only
        holders = around.holders if around.holders and (self._action is Action.LOGIN or around.guards_start) else {}
        if len(known_members) > 2 * len(members) + 100:
            known_members.clear()  # mostly of servers that are no more
        for member in members:
            server_id = member.server.server_id
            known = known_members.get(server_id)
            if known is None or known.member is not member:
                known = known_members[server_id] = self._look_at(member)
            coming = in_flight.get(server_id, 0)
            if known.dropped is not None:
                dropped.append(known.dropped)
            elif only is not None and server_id != only:
                dropped.append(Dropped(server_id, NOT_ASKED_FOR))
            elif server_id in excluded:
                dropped.append(Dropped(server_id, EXCLUDED))
            elif server_id in holders and holders[server_id] != user:
                dropped.append(Dropped(server_id, RESERVED))
            elif known.room is not None and known.room <= coming:
                dropped.append(Dropped(server_id, FULL))
            else:
                candidates.append(Candidate(member.server, coming) if coming else known.candidate)
        candidates.sort(key=_ID)
        return candidates, dropped

    def _look_at(self, member: Member) -> _Known:
        server, reason = member.server, self._reason(member)
        return _Known(
            member,
            Candidate(server),
            Dropped(server.server_id, reason) if reason is not None else None,
            server.max_sessions - server.sessions if server.max_sessions > 0 else None,
        )

    def _reason(self, member: Member) -> str | None:
        outside = reason_outside(member, self._pool)
        if outside is not None:
            return outside
        server = member.server
        if member.state is not MemberState.UP:
            return str(member.state.value)
        if server.draining or member.is_drained:
            return DRAINING
        if not self._reaches(server):
            return UNREACHABLE
        if self._action is Action.LOGIN and ("login" in server.disable or "login" in member.disabled):
            return LOGIN_DISABLED
        if self._action is Action.START and ("start" in server.disable or "start" in member.disabled):
            return START_DISABLED
        return None


def reason_outside(member: Member, pool: Pool) -> str | None:
    """Why the server does not belong to the pool, whatever its state; None if it does."""
    server = member.server
    if pool.nodes is not None and server.server_id not in pool.nodes:
        return NOT_IN_POOL
    if pool.nodes is None and pool.service not in server.services:
        return NOT_SERVED
    if pool.where and not _matches(server.static_data, pool.where):
        return NO_MATCH
    return None


def _matches(static_data: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Every wanted value is there; a list in the static data matches if it holds the value."""
    for key, value in wanted.items():
        if key not in static_data:
            return False
        found = static_data[key]
        if found != value and not (isinstance(found, list) and value in found):
            return False
    return True
