"""Task: stands before the requests of HTTP services with logins: holds logins, brings users to their servers, and sees logouts."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from fxrelay.balance.holders import of_others
from fxrelay.balance.seating import SeatRules
from fxrelay.cluster.members import MemberState
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.identity import identity_of
from fxrelay.logins.attempts import Attempts, Quota
from fxrelay.logins.passes import PassCookies
from fxrelay.logins.recognising import Kind, kind_of, login_id_of, shown_tokens
from fxrelay.logins.rules import LoginRules
from fxrelay.reserving.kept import find_login, is_kept
from fxrelay.reserving.leases import LeaseTerms
from fxrelay.reserving.reservations import Reservations
from fxrelay.web.ports import Allow, HeldRequest, NodeChooser, RequestFacts, Unable
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.jwt_keys import TokenVerifier
from fxtunnel.kit.process import keep_going
from fxtunnel.model import RelayId, ServiceName

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks for logins that have ended, and for servers that are down."""
STALLED_SHARE: Final = 0.25
"""Share of `cluster.down_s` after which this relay's process counts as having been held up itself."""
MAX_LATER: Final = 1_024
"""Extensions that wait for the store. What finds no room is tried with the next request."""
AT_ONCE: Final = 4
_ANY: Final = Allow()
_UNAVAILABLE: Final = "ReservationsUnavailable"
_LATER: Final = "Reserved servers cannot be given out at the moment. Please try again in a moment."
LATER_S: Final = 5.0
MAX_GONE: Final = 4_096
GONE_S: Final = 10.0
"""For this long a login that is known to have ended is not looked up again."""


@dataclass(frozen=True, slots=True)
class LoginService:
    """One service with logins. `verifier` None: users are who they say they are when the service lets them in."""

    rules: LoginRules
    passes: PassCookies
    seats: SeatRules
    verifier: TokenVerifier | None = None
    user_claim: str = "sub"

    def terms(self, lifetime_ms: int) -> LeaseTerms:
        """What its logins are committed with."""
        return LeaseTerms(self.seats.linger_ms, self.seats.hold_while_sessions, lifetime_ms)


@dataclass(frozen=True, slots=True)
class Live:
    """A login that a request shows. `until_unix`: when it ends at the latest; 0: not known."""

    server_id: RelayId
    login_id: str
    user: str
    until_unix: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """`cluster.lease_s` and `cluster.down_s`."""

    lease_s: float = 15.0
    down_s: float = 90.0


@dataclass(frozen=True, slots=True)
class _Extend:
    """The login lasts for `ttl_ms` from now."""

    server_id: RelayId
    login_id: str
    ttl_ms: int


MakeHeld = Callable[["LoginGate", LoginService, RequestFacts], HeldRequest]


class LoginGate:
    """Implements `RequestGate`. `run` it once, as long as requests come."""

    def __init__(
        self, chooser: NodeChooser, view: ClusterView, make_held: MakeHeld, timing: Timing, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.chooser = chooser
        self.reservations: Reservations | None = None
        self.attempts = Attempts()
        self.quota = Quota()
        self.wall_clock = wall_clock
        self._view = view
        self._make_held = make_held
        self._timing = timing
        self._silent_since: dict[RelayId, float | None] = {}
        """None: this relay has heard of it; else when it was first seen to be down."""
        self._services: Mapping[ServiceName, LoginService] = {}
        self._guarded: frozenset[ServiceName] = frozenset()
        self._watchers: dict[str, set[Callable[[], None]]] = {}
        self._gone: dict[str, float] = {}
        self._later_in, self._later_out = trio.open_memory_channel[_Extend](MAX_LATER)

    def reconfigure(self, services: Mapping[ServiceName, LoginService], guarded: frozenset[ServiceName] = frozenset()) -> None:
        """What services say about logins from now on. `guarded` have none, and keep off nodes that are somebody else's."""
        self._services, self._guarded = dict(services), guarded

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell the store of logins that last longer, end those of dead servers, and end what hangs on ended logins; until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(keep_going, "telling the store of logins", self._tell)
            nursery.start_soon(keep_going, "looking for logins that have ended", self._look)
            task_status.started()

    def concerns(self, service: ServiceName) -> bool:
        """See `RequestGate`."""
        return service in self._services or service in self._guarded

    async def admit(self, request: RequestFacts) -> Allow:
        """See `RequestGate`."""
        service = self._services.get(request.service)
        if service is None and request.service not in self._guarded:
            return _ANY
        reservations = self.reservations
        if reservations is None:
            raise unavailable("this relay takes no part in reservations until it is restarted")
        if service is None:
            return Allow(closed=self._closed(reservations, request.user or identity_of(request.client)))
        kind = self._kind(service, request)
        if kind is Kind.LOGIN:
            return Allow(held=self._make_held(self, service, request))
        live = await self._live(service, request, reservations)
        closed: frozenset[RelayId] = frozenset()
        if service.seats.guard_start:
            closed = self._closed(reservations, live.user if live is not None else identity_of(request.client))
        if live is None:
            return Allow(closed=closed)
        self._prolong(service, live)
        login_id, is_logout = live.login_id, kind is Kind.LOGOUT
        watch = None if is_logout else lambda lost: self._watch(login_id, lost)
        # A user with too many connections may still log out.
        return Allow(None if request.is_named else live.server_id, closed, None, watch, "" if is_logout else live.user)

    async def answered(self, request: RequestFacts, node: RelayId | None, status: int, fields: object) -> tuple[bytes, ...]:
        """See `RequestGate`."""
        service, reservations = self._services.get(request.service), self.reservations
        if service is None or reservations is None or self._kind(service, request) is not Kind.LOGOUT:
            return ()
        live = self._find(service, request, reservations)
        is_token = live is not None and live.login_id in map(login_id_of, shown_tokens(service.rules, request.fields))
        # 401 to the login's own token: it was over before. Whatever else it is, nobody was logged out by it.
        if not (200 <= status < 400 or (status == 401 and is_token)):
            return ()
        if live is not None:
            reservations.end_login(live.server_id, live.login_id, service.terms(0))
            self._is_gone(live.login_id)
        return (service.passes.withdraw(),)

    def _closed(self, reservations: Reservations, user: str) -> frozenset[RelayId]:
        return frozenset(of_others(reservations.holders.users(self._view.now_ms), user))

    async def _tell(self) -> None:
        async for extend in self._later_out:
            if self.reservations is not None:
                await self.reservations.extend(extend.server_id, extend.login_id, extend.ttl_ms)

    def _kind(self, service: LoginService, request: RequestFacts) -> Kind:
        kind = kind_of(service.rules, request.method, request.path)
        return kind if kind is not Kind.ORDINARY else kind_of(service.rules, request.method, request.inner_path or request.path)

    async def _live(self, service: LoginService, request: RequestFacts, reservations: Reservations) -> Live | None:
        """The login that the request shows. The store is asked only about one that should be there, and is not known here.

        Raises:
            Refused: it showed one that has ended, or the store does not tell, or has forgotten.
        """
        live = self._find(service, request, reservations)
        shown = service.passes.read(request.fields)
        if live is not None or not shown:
            return live
        found = shown[0]
        if found.until_unix > self.wall_clock() and not self._has_just_gone(found.login_id):
            if not await reservations.look_at(found.server_id):
                raise unanswered("the store does not tell whether a login still counts")
            live = self._find(service, request, reservations)
            if live is not None:
                return live
            if not reservations.is_settled:
                raise unanswered("the store has forgotten who is logged in, and not every relay has said so again")
            self._is_gone(found.login_id)
        raise Refused(
            401, "LoginEnded", "Your reservation of a server has ended. Please log in again.", fields=(service.passes.withdraw(),)
        )

    def _find(self, service: LoginService, request: RequestFacts, reservations: Reservations) -> Live | None:
        """The login that the request shows, as far as it is known here."""
        now_unix = self.wall_clock()
        for found in service.passes.read(request.fields):
            live = self._counted(found.login_id, reservations, found.until_unix)
            if live is not None and live.server_id == found.server_id and found.until_unix > now_unix:
                return live
        for token in shown_tokens(service.rules, request.fields):
            live = self._counted(login_id_of(token), reservations, 0)
            if live is not None:
                return live
        return None

    def _counted(self, login_id: str, reservations: Reservations, until_unix: int) -> Live | None:
        server_id = reservations.holders.server_of(login_id, self._view.now_ms)
        if server_id is None or reservations.leases.is_ending(login_id):
            return None
        login = find_login(reservations.holders.standings()[server_id].record, login_id)
        return Live(server_id, login_id, login.user, until_unix) if login is not None else None

    def _prolong(self, service: LoginService, live: Live) -> None:
        """A login that ends by itself when nothing is asked for: something was."""
        idle_ms, reservations = int(service.rules.bounds.idle_s * 1000), self.reservations
        if not idle_ms or reservations is None or not live.until_unix:
            return
        login = find_login(reservations.holders.standings()[live.server_id].record, live.login_id)
        ttl_ms = min(idle_ms, int((live.until_unix - self.wall_clock()) * 1000))
        if login is None or ttl_ms <= 0 or login.expires_ms - self._view.now_ms > ttl_ms * 3 / 4:
            return
        with suppress(trio.WouldBlock):  # then the next request will
            self._later_in.send_nowait(_Extend(live.server_id, live.login_id, ttl_ms))

    def _watch(self, login_id: str, lost: Callable[[], None]) -> Callable[[], None]:
        watchers = self._watchers.setdefault(login_id, set())
        watchers.add(lost)

        def unwatch() -> None:
            watchers.discard(lost)
            if not watchers:
                self._watchers.pop(login_id, None)

        return unwatch

    def _is_gone(self, login_id: str) -> None:
        while len(self._gone) >= MAX_GONE:
            del self._gone[next(iter(self._gone))]
        self._gone[login_id] = trio.current_time()

    def _has_just_gone(self, login_id: str) -> bool:
        return self._gone.get(login_id, -math.inf) + GONE_S > trio.current_time()

    async def _look(self) -> None:
        while True:
            began = trio.current_time()
            await trio.sleep(LOOK_S)
            if trio.current_time() - began - LOOK_S > self._timing.down_s * STALLED_SHARE:
                self._silent_since.clear()
            reservations = self.reservations
            if reservations is None or not reservations.upkeep.has_read:
                continue
            for login_id in list(self._watchers):
                # A store that has forgotten ends nobody's login; a logout does.
                may_be_over = reservations.is_settled or self._has_just_gone(login_id)
                if may_be_over and self._counted(login_id, reservations, 0) is None:
                    for lost in list(self._watchers.get(login_id, ())):
                        lost()
            self._free_dead_servers(reservations)

    def _free_dead_servers(self, reservations: Reservations) -> None:
        """A server that has said nothing for `cluster.down_s`, while this relay could hear it, has no logins any more.

        One that was silent before this relay began, or while it stood still, gets as long again: after a rest of all relays the first one
        must not end everything, and what was said while this relay stood still it has not read yet.
        """
        now = self._view.now
        for server_id, standing in list(reservations.holders.standings().items()):
            member = self._view.members.get(server_id, now)
            if member is None:
                continue
            if member.state is not MemberState.DOWN:
                self._silent_since[server_id] = None
                continue
            since = self._silent_since.setdefault(server_id, now)
            if since is not None and now - since < self._timing.down_s:
                continue
            for login in standing.record.logins:
                if is_kept(login, int(self._timing.lease_s * 1000)) and not reservations.leases.is_ending(login.login_id):
                    logger.warning("%s is down: the login of %s there ends", server_id, login.user)
                    reservations.end_login(server_id, login.login_id, LeaseTerms())


def unavailable(why: str) -> Refused:
    """The answer while reservations cannot be decided, whichever relay is asked."""
    return Refused(503, _UNAVAILABLE, _LATER, retry_after_s=LATER_S, detail=why)


def unanswered(why: str) -> Unable:
    """The same, because the store does not answer here."""
    return Unable(503, _UNAVAILABLE, _LATER, retry_after_s=LATER_S, detail=why)
