"""Pure: which servers a chain is asked about at all, and why the others are not."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, Final

from fxrelay.balance.model import Action, Candidate, Dropped
from fxrelay.balance.offered import Offered
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
        self._ids: list[RelayId] = []  # of those below, in order
        self._candidates = Offered([])
        self._coming: dict[RelayId, int] = {}  # placements that the candidates above count
        self._dropped: dict[RelayId, Dropped] = {}
        self._full: set[RelayId] = set()

    def peek(self, members: Collection[Member], user: str, around: Circumstances) -> Sequence[Candidate]:
        """The candidates that `sift` would give, until the next call; they are the sieve's own, so that nothing has to be copied."""
        self._catch_up(members)
        self._count(around.in_flight)
        if around.only is not None or self._gone(user, around):
            return self.sift(members, user, around)[0]
        return self._candidates

    def sift(self, members: Collection[Member], user: str, around: Circumstances) -> tuple[list[Candidate], list[Dropped]]:
        """The candidates in order of id, and everyone else with the first reason that applied."""
        self._catch_up(members)
        self._count(around.in_flight)
        candidates, dropped, gone = self._candidates.copy(), list(self._dropped.values()), self._gone(user, around)
        if around.only is not None:
            dropped += [Dropped(server_id, NOT_ASKED_FOR) for server_id in self._ids if server_id != around.only]
            gone = [(place, each) for place, each in gone if each.server_id == around.only]
        dropped += [each for _, each in gone]
        for place, _ in reversed(gone):
            del candidates[place]
        if around.only is not None:
            candidates = [candidate for candidate in candidates if candidate.server_id == around.only]
        return candidates, dropped

    def _gone(self, user: str, around: Circumstances) -> list[tuple[int, Dropped]]:
        """Candidates that are none for this request, in order, each with its place."""
        holders = around.holders if around.holders and (self._action is Action.LOGIN or around.guards_start) else {}
        gone = []
        for server_id in {*around.excluded, *holders, *around.in_flight, *self._full}:
            place = self._place(server_id)
            if place is not None:
                reason = self._reason_now(server_id, around.in_flight.get(server_id, 0), holders, user, around)
                if reason is not None:
                    gone.append((place, Dropped(server_id, reason)))
        gone.sort(key=itemgetter(0))
        return gone

    def _count(self, in_flight: Mapping[RelayId, int]) -> None:
        """Have the candidates count these placements."""
        if in_flight == self._coming:
            return
        for server_id in {*in_flight, *self._coming}:
            place, coming = self._place(server_id), in_flight.get(server_id, 0)
            if place is not None and self._candidates[place].in_flight != coming:
                self._candidates.change(place, Candidate(self._candidates[place].server, coming))
        self._coming = dict(in_flight)

    def _place(self, server_id: RelayId) -> int | None:
        place = bisect_left(self._ids, server_id)
        return place if place < len(self._ids) and self._ids[place] == server_id else None

    def _reason_now(self, server_id: RelayId, coming: int, holders: Mapping[RelayId, str], user: str, around: Circumstances) -> str | None:
        if server_id in around.excluded:
            return EXCLUDED
        if server_id in holders and holders[server_id] != user:
            return RESERVED
        room = self._known[server_id].room
        return FULL if room is not None and room <= coming else None

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
        candidates = sorted((known.candidate for known in self._known.values() if known.dropped is None), key=_ID)
        self._coming = {}
        self._candidates, self._ids = Offered(candidates), [candidate.server_id for candidate in candidates]
        self._dropped = {server_id: known.dropped for server_id, known in self._known.items() if known.dropped is not None}
        self._full = {server_id for server_id, known in self._known.items() if known.room is not None and known.room <= 0}

    def _look_again(self, member: Member) -> None:
        server_id = member.server.server_id
        self._coming.pop(server_id, None)
        known = self._known[server_id] = self._look_at(member)
        place = bisect_left(self._ids, server_id)
        is_there = place < len(self._ids) and self._ids[place] == server_id
        if known.dropped is not None:
            self._dropped[server_id] = known.dropped
            if is_there:
                del self._ids[place]
                self._candidates.leave(place)
        else:
            self._dropped.pop(server_id, None)
            if is_there:
                self._candidates.change(place, known.candidate)
            else:
                self._ids.insert(place, server_id)
                self._candidates.enter(place, known.candidate)
        if known.room is not None and known.room <= 0:
            self._full.add(server_id)
        else:
            self._full.discard(server_id)

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
