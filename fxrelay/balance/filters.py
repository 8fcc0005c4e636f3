"""Pure: which servers a chain is asked about at all, and why the others are not."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from fxrelay.balance.candidates import CandidateList, CandidateSubset
from fxrelay.balance.model import Action, Candidate, Dropped
from fxrelay.cluster.members import Member, MemberState
from fxrelay.cluster.roster import Mark, Roster
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
_SORT_FROM: Final = 8
"""When more than one member in this many has changed, all are sorted anew."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Which nodes a service may run on. `nodes` None means every node that publishes the service; `where` is matched with static data."""

    service: str
    nodes: frozenset[RelayId] | None = None
    where: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FilterContext:
    """What the filters need besides the servers: how many placements each has on its way, which were tried, which are reserved for whom.

    `holders` maps reserved servers to their user; with `guards_start` they are kept from others' session starts too. `only` is the one
    server that the client asked for, if it did.
    """

    in_flight: Mapping[RelayId, int]
    excluded: Collection[RelayId] = ()
    holders: Mapping[RelayId, str] | None = None
    guards_start: bool = False
    only: RelayId | None = None


def everyone(server: ServerObject) -> bool:
    """The default for reachability: every server counts as reachable."""
    return True


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found out about a member. `room` is what its maxSessions leave; None without such a limit."""

    member: Member
    candidate: Candidate
    dropped: Dropped | None
    room: int | None

    def has_room(self, coming: int) -> bool:
        """Whether another placement fits in beside those on their way."""
        return self.room is None or self.room > coming


class CandidateFilter:
    """The filters of one pool for one action. What they say of a member is remembered for as long as nothing about it changes, so that a
    decision over a thousand servers of a `Roster` looks only at those that have changed.

    The order is: pool, state (stale, down, draining), reachability, the switches for login or start (clustering guide, "The Server List");
    then what no server says of itself: not asked for, tried before, reserved for somebody else, full. Reservations concern logins
    only, unless starts are guarded: a start is already somebody's.
    """

    def __init__(self, pool: Pool, action: Action, reaches: Callable[[ServerObject], bool] = everyone) -> None:
        self._pool = pool
        self._action = action
        self._reaches = reaches
        self._known: dict[RelayId, _Known] = {}
        self._mark: Mark | None = None
        self._candidates = CandidateList([])
        self._coming: dict[RelayId, int] = {}  # placements that are counted there
        self._dropped: dict[RelayId, Dropped] = {}
        self._full: set[RelayId] = set()  # neither here nor there

    def peek(self, members: Collection[Member], user: str, around: FilterContext) -> Sequence[Candidate]:
        """The candidates that `apply` would give; most often they are the filter's own, which change at the next call."""
        self._catch_up(members)
        self._count(around.in_flight)
        gone = self._gone(user, around)
        return self._left(gone, around.only) if gone or around.only is not None else self._candidates

    def apply(self, members: Collection[Member], user: str, around: FilterContext) -> tuple[CandidateSubset, list[Dropped]]:
        """The candidates in order of id, and everyone else with the first reason that applied."""
        self._catch_up(members)
        self._count(around.in_flight)
        gone = self._gone(user, around)
        reasons = dict.fromkeys(sorted(self._full), FULL) | {each.server_id: each.reason for each in gone}
        if around.only is not None:
            others = {candidate.server_id for candidate in self._candidates} | self._full
            reasons |= dict.fromkeys(sorted(others - {around.only}), NOT_ASKED_FOR)
        dropped = [Dropped(server_id, reason) for server_id, reason in reasons.items()]
        return self._left(gone, around.only), [*self._dropped.values(), *dropped]

    def _left(self, gone: Sequence[Dropped], only: RelayId | None) -> CandidateSubset:
        if only is not None:
            return self._candidates.only([] if any(each.server_id == only for each in gone) else [only])
        places = [place for each in gone if (place := self._candidates.place(each.server_id)) is not None]
        return self._candidates.without(places)

    def _gone(self, user: str, around: FilterContext) -> list[Dropped]:
        """Who takes part, full or not, but not in this request, in order."""
        holders = around.holders if around.holders and (self._action is Action.LOGIN or around.guards_start) else {}
        gone = []
        for server_id in {*around.excluded, *holders}:
            known = self._known.get(server_id)
            if known is None or known.dropped is not None:
                continue
            if server_id in around.excluded:
                gone.append(Dropped(server_id, EXCLUDED))
            elif holders[server_id] != user:
                gone.append(Dropped(server_id, RESERVED))
        gone.sort(key=attrgetter("server_id"))
        return gone

    def _count(self, in_flight: Mapping[RelayId, int]) -> None:
        """Have the candidates count these placements."""
        if in_flight == self._coming:
            return
        changed = in_flight.items() ^ self._coming.items()
        self._coming = dict(in_flight)
        for server_id in {server_id for server_id, _ in changed}:
            known = self._known.get(server_id)
            if known is not None and known.dropped is None:
                self._seat(known)

    def _catch_up(self, members: Collection[Member]) -> None:
        changed = None
        if isinstance(members, Roster):
            changed = members.since(self._mark)
            self._mark = members.mark
        if changed is None or len(changed) * _SORT_FROM > len(members):
            self._look_at_all(members)
            return
        for member in changed:
            self._look_again(member)

    def _look_at_all(self, members: Collection[Member]) -> None:
        before = self._known
        self._known = {member.server.server_id: self._known_of(member, before) for member in members}
        candidates = sorted((known.candidate for known in self._known.values() if known.dropped is None and known.has_room(0)), key=_ID)
        self._coming = {}
        self._candidates = CandidateList(candidates)
        self._dropped = {server_id: known.dropped for server_id, known in self._known.items() if known.dropped is not None}
        self._full = {server_id for server_id, known in self._known.items() if known.dropped is None and not known.has_room(0)}

    def _look_again(self, member: Member) -> None:
        server_id = member.server.server_id
        known = self._known[server_id] = self._look_at(member)
        if known.dropped is not None:
            self._dropped[server_id] = known.dropped
            self._full.discard(server_id)
            self._leave(server_id)
        else:
            self._dropped.pop(server_id, None)
            self._seat(known)

    def _seat(self, known: _Known) -> None:
        """Have it among the candidates, or among those that are full."""
        server_id = known.candidate.server_id
        coming = self._coming.get(server_id, 0)
        if not known.has_room(coming):
            self._full.add(server_id)
            self._leave(server_id)
            return
        self._full.discard(server_id)
        candidate = Candidate(known.candidate.server, coming) if coming else known.candidate
        place = self._candidates.place(server_id)
        if place is None:
            self._candidates.enter(candidate)
        else:
            self._candidates.change(place, candidate)

    def _leave(self, server_id: RelayId) -> None:
        place = self._candidates.place(server_id)
        if place is not None:
            self._candidates.leave(place)

    def _known_of(self, member: Member, before: Mapping[RelayId, _Known]) -> _Known:
        known = before.get(member.server.server_id)
        return known if known is not None and known.member is member else self._look_at(member)

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
