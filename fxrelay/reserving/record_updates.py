"""Pure: what a relay asks of a server's record: the rule's steps, each as one update of the store that others may go with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fxrelay.balance import reservations as rule
from fxrelay.balance.reservations import Granted, Login, Moment, OwnerRelogin, Record, Rejected, Token

T = TypeVar("T", Record, Granted | Rejected, Record | Rejected)

WouldDo = Callable[[str], bool]
"""Whether a server would do as well for a login: then a user who has it already gets no other one."""


@dataclass(frozen=True, slots=True)
class RecordUpdate(Generic[T]):
    """One step. `apply` gets the record, the moment, and a server that the user has and that would do (empty: none).

    `user`: whose servers are written down in the same step; empty: nobody's. `is_grant`: not before the store has settled.
    """

    server_id: str
    apply: Callable[[Record, Moment, str], T]
    user: str = ""
    is_grant: bool = False
    would_do: WouldDo | None = None


class RecordUpdates:
    """The steps as this relay takes them."""

    def __init__(self, relay_id: str, lease_ms: int) -> None:
        self._relay_id = relay_id
        self._lease_ms = lease_ms

    def enter(self, server_id: str, entry_id: str, user: str, address: str) -> RecordUpdate[Record | Rejected]:
        """Step 2, and each request of step 4. Not before something may be granted: the request brings a password to the server."""
        return RecordUpdate(server_id, lambda record, at, _: rule.enter(record, entry_id, user, address, self._relay_id, at), is_grant=True)

    def go_on(self, server_id: str, entry_id: str) -> RecordUpdate[Record | Rejected]:
        """Step 4, for a login that must have its entry. As `enter`, not before something may be granted."""
        return RecordUpdate(server_id, lambda record, at, _: rule.go_on(record, entry_id, at), is_grant=True)

    def extend(self, server_id: str, login_id: str, ttl_ms: int) -> RecordUpdate[Record]:
        """Step 6, for a login that the store keeps by itself."""
        return RecordUpdate(server_id, lambda record, at, _: rule.extend(record, login_id, ttl_ms, at))

    def commit(
        self, server_id: str, entry_id: str, login_id: str, user: str, relogin: OwnerRelogin, ttl_ms: int = 0
    ) -> RecordUpdate[Granted | Rejected]:
        """Step 5, for an entry that was made before. `ttl_ms`: how long the store keeps the login by itself; 0: a lease."""

        def apply(record: Record, at: Moment, elsewhere: str) -> Granted | Rejected:
            return rule.commit(record, entry_id, self._login(login_id, user, at, ttl_ms), relogin, at, elsewhere)

        return RecordUpdate(server_id, apply, user, True)

    def take(
        self,
        server_id: str,
        login_id: str,
        user: str,
        address: str,
        relogin: OwnerRelogin,
        would_do: WouldDo | None = None,
        is_for_sessions: bool = False,
    ) -> RecordUpdate[Granted | Rejected]:
        """Steps 2 and 5 at once, for a login that has nothing in between: its entry is gone when others could see it."""

        def both(record: Record, at: Moment, elsewhere: str) -> Granted | Rejected:
            entered = rule.enter(record, login_id, user, address, self._relay_id, at)
            if isinstance(entered, Rejected):
                return entered
            login = replace(self._login(login_id, user, at), is_for_sessions=is_for_sessions)
            return rule.commit(entered, login_id, login, relogin, at, elsewhere)

        return RecordUpdate(server_id, both, user, True, would_do)

    def renew(
        self, server_id: str, login_id: str, user: str, token: Token, since_ms: int, ttl_ms: int = 0, is_for_sessions: bool = False
    ) -> RecordUpdate[Granted | Rejected]:
        """Step 6: keep what is held, or say after a loss of memory that it is. `ttl_ms` as for `commit`."""

        def again(record: Record, at: Moment, _: str) -> Granted | Rejected:
            login = replace(self._login(login_id, user, at, ttl_ms), is_for_sessions=is_for_sessions)
            return rule.renew(record, login, token, since_ms, at)

        return RecordUpdate(server_id, again, user)

    def put_off(self, server_id: str, login_id: str, user: str) -> RecordUpdate[Record]:
        """Step 7, put off for a lease: the user has sessions there, or may have."""
        return RecordUpdate(server_id, lambda record, at, _: rule.put_off(record, login_id, self._lease_ms, at), user)

    def give_up(self, server_id: str, entry_id: str, login_id: str, user: str) -> RecordUpdate[Record]:
        """Whatever an attempt has left in the record, an entry or a login, nobody will use it. May be repeated."""
        return RecordUpdate(server_id, lambda record, at, _: rule.release(rule.abandon(record, entry_id, at), login_id, 0, at), user)

    def release(self, server_id: str, login_id: str, user: str, linger_ms: int) -> RecordUpdate[Record]:
        """Step 7. May be repeated."""
        return RecordUpdate(server_id, lambda record, at, _: rule.release(record, login_id, linger_ms, at), user)

    def sweep(self, server_id: str, user: str = "") -> RecordUpdate[Record]:
        """Write down that what has expired is gone, and whether the server is this user's."""
        return RecordUpdate(server_id, lambda record, at, _: rule.purge(record, at), user)

    def _login(self, login_id: str, user: str, at: Moment, ttl_ms: int = 0) -> Login:
        ttl_ms = ttl_ms or self._lease_ms
        return Login(login_id, user, self._relay_id, at.now_ms + ttl_ms, ttl_ms)
