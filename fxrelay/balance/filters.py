"""Pure: which servers a chain is asked about at all, and why the others are not."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fxrelay.balance.model import Action, Candidate, Dropped, Request
from fxrelay.cluster.members import Member, MemberState
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


@dataclass(frozen=True, slots=True)
class Pool:
    """Which nodes a service may run on. `nodes` None means every node that publishes the service; `where` is matched with static data."""

    service: str
    nodes: frozenset[RelayId] | None = None
    where: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What besides the servers decides: how many placements each has on its way, who can be reached, who was tried, who belongs to whom.

    `reachable` None means that everyone can be. `holders` maps reserved servers to their user; with `guards_start` they are kept from
    others' session starts too.
    """

    in_flight: Mapping[RelayId, int]
    excluded: Collection[RelayId] = ()
    reachable: Collection[RelayId] | None = None
    holders: Mapping[RelayId, str] | None = None
    guards_start: bool = False


def sift(members: Iterable[Member], pool: Pool, request: Request, around: Circumstances) -> tuple[list[Candidate], list[Dropped]]:
    """The candidates in order of id, and everyone else with the first reason that applied.

    The order of the filters is: pool, state (stale, down, draining), reachability, the switches for login or start (clustering guide,
    "The Server List"), reservations, fullness. Reservations concern logins only, unless starts are guarded: a start is already somebody's.
    """
    candidates: list[Candidate] = []
    dropped: list[Dropped] = []
    for member in members:
        reason = _reason(member, pool, request, around)
        if reason is None:
            candidates.append(Candidate(member.server, around.in_flight.get(member.server.server_id, 0)))
        else:
            dropped.append(Dropped(member.server.server_id, reason))
    candidates.sort(key=lambda candidate: candidate.server.server_id)
    return candidates, dropped


def _reason(member: Member, pool: Pool, request: Request, around: Circumstances) -> str | None:
    server = member.server
    server_id = server.server_id
    if pool.nodes is not None and server_id not in pool.nodes:
        return NOT_IN_POOL
    if pool.nodes is None and pool.service not in server.services:
        return NOT_SERVED
    if pool.where and not _matches(server.static_data, pool.where):
        return NO_MATCH
    if member.state is not MemberState.UP:
        return str(member.state.value)
    if server_id in around.excluded:
        return EXCLUDED
    if server.draining or member.is_drained:
        return DRAINING
    if around.reachable is not None and server_id not in around.reachable:
        return UNREACHABLE
    if server.disable or member.disabled:
        if request.action is Action.LOGIN and ("login" in server.disable or "login" in member.disabled):
            return LOGIN_DISABLED
        if request.action is Action.START and ("start" in server.disable or "start" in member.disabled):
            return START_DISABLED
    is_guarded = request.action is Action.LOGIN or around.guards_start
    if around.holders is not None and is_guarded and around.holders.get(server_id, request.user) != request.user:
        return RESERVED
    if 0 < server.max_sessions <= server.sessions + around.in_flight.get(server_id, 0):
        return FULL
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
