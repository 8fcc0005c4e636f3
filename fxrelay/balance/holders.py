"""Pure: who has which server, as this relay knows it: for filters, preferences and people. Only a commit in the store decides."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fxrelay.balance.model import Candidate
from fxrelay.balance.reservations import OwnerRelogin, Record
from fxtunnel.model import RelayId


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one server. `expires_ms`: when the last login ends by itself."""

    record: Record
    expires_ms: int


class Holders:
    """The newest record of every server that this relay has read or heard of. Belongs to one thread."""

    def __init__(self) -> None:
        self._standings: dict[RelayId, Standing] = {}
        self._servers: dict[str, RelayId] = {}

    def __len__(self) -> int:
        return len(self._standings)

    def learn(self, server_id: RelayId, record: Record) -> bool:
        """A server's record. Returns whether it is news for who wants the server; an older one of the same epoch is none."""
        known = self._standings.get(server_id)
        if known is not None and known.record.epoch == record.epoch and record.revision <= known.record.revision:
            return False
        self._standings[server_id] = Standing(record, max((login.expires_ms for login in record.logins), default=0))
        if known is None or known.record.logins != record.logins:
            self._index(server_id, known.record if known is not None else Record(), record)
        return known is None or (known.record.holder, known.record.entries) != (record.holder, record.entries)

    def forget(self, server_ids: Iterable[RelayId]) -> None:
        """The store was read to its end, and does not have these."""
        for server_id in server_ids:
            standing = self._standings.pop(server_id, None)
            if standing is not None:
                self._index(server_id, standing.record, Record())

    def _index(self, server_id: RelayId, before: Record, after: Record) -> None:
        for login in before.logins:
            if self._servers.get(login.login_id) == server_id:
                del self._servers[login.login_id]
        for login in after.logins:
            self._servers[login.login_id] = server_id

    def server_of(self, login_id: str, now_ms: int) -> RelayId | None:
        """The server on which this login counts."""
        server_id = self._servers.get(login_id)
        standing = self._standings.get(server_id) if server_id is not None else None
        if standing is None or not any(
            login.login_id == login_id and now_ms < login.expires_ms and not login.is_lingering for login in standing.record.logins
        ):
            return None
        return server_id

    def standings(self) -> Mapping[RelayId, Standing]:
        """Everything known."""
        return self._standings

    def user(self, server_id: RelayId, now_ms: int) -> str:
        """Who has this server; empty if nobody has it."""
        standing = self._standings.get(server_id)
        return standing.record.holder if standing is not None and _is_held(standing, now_ms) else ""

    def users(self, now_ms: int) -> dict[RelayId, str]:
        """The reserved servers and their users."""
        return {server_id: standing.record.holder for server_id, standing in self._standings.items() if _is_held(standing, now_ms)}

    def wanted(self, now_ms: int) -> frozenset[RelayId]:
        """Servers for which somebody is being authenticated."""
        return frozenset(
            server_id
            for server_id, standing in self._standings.items()
            if any(now_ms < entry.expires_ms for entry in standing.record.entries)
        )


def _is_held(standing: Standing, now_ms: int) -> bool:
    return bool(standing.record.logins) and now_ms < standing.expires_ms


def against(holders: Mapping[RelayId, str], user: str, relogin: OwnerRelogin) -> Mapping[RelayId, str]:
    """The holders as the filters should see them: where second logins are not wanted, a server is reserved for its own user too."""
    if relogin is OwnerRelogin.PREFER:
        return holders
    return {server_id: "" if holder == user else holder for server_id, holder in holders.items()}


def of_others(holders: Mapping[RelayId, str], user: str) -> dict[RelayId, str]:
    """The holders that keep this user off their servers."""
    return {server_id: holder for server_id, holder in holders.items() if holder != user}


def prefer(
    candidates: list[Candidate], user: str, holders: Mapping[RelayId, str], wanted: Iterable[RelayId], relogin: OwnerRelogin
) -> list[Candidate]:
    """The candidates a login should be given one of: the user's own server, else those that nobody else is about to get, else all.

    A deterministic chain would send all who come at once to one server, and all but one of them would fail after they had authenticated.
    """
    own = [candidate for candidate in candidates if holders.get(candidate.server_id) == user]
    if own and relogin is OwnerRelogin.PREFER:
        return own
    soft = frozenset(wanted)
    quiet = [candidate for candidate in candidates if candidate.server_id not in soft and not candidate.in_flight]
    return quiet or candidates
