"""Pure: the rule of reservations: one record per server, and how each step of the algorithm changes it (docs/RESERVATIONS.md).

The published algorithm (clustering guide, "The Server Reservation Algorithm") has seven steps. The record is changed by one atomic
operation of the store, which hands the rule what it needs to know about the world: `Moment`. Times are the store's clock, ms since
1970, and nobody else's.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

DAEMON_CLAIM: Final = "fastx/daemon"
"""A login with this claim starts sessions for others (clustering guide, "Notes on Login Types"): it never reserves and never counts."""
ENTRY_TTL_MS: Final = 180_000
"""An entry is forgotten this long after its last request (the published algorithm has no end for it, and anyone may cause one)."""
ENTRY_HARD_MS: Final = 600_000
"""An entry is forgotten this long after it was made, however many requests follow."""
MAX_ENTRIES: Final = 64
"""Entries of one server. One more takes the place of the oldest of the address that has most."""
MAX_ENTRIES_PER_ADDRESS: Final = 8
"""Of one client address, so that nobody can take all entries of a server."""
MAX_LOGINS: Final = 256
"""Logins of one user on one server."""
MAX_LINGER_MS: Final = 7 * 86_400_000
"""A week: no setting may keep a server for longer after its last login."""


class Reason(StrEnum):
    """Why a login is not let in. The words are for logs, metrics and `--json`."""

    RESERVED = "reserved"
    """The server belongs to another user."""
    NO_ENTRY = "no-entry"
    """Somebody else's commit cleared the entry, or it expired."""
    OWN_LOGIN = "own-login"
    """The user has a login there already, and a second one is not wanted."""
    ELSEWHERE = "elsewhere"
    """The user has another server that would do."""
    TOO_MANY = "too-many"
    """Entries of this client, or logins of this user."""
    UNSETTLED = "unsettled"
    """The store has forgotten, or may have: who holds what is not known yet."""
    STALE = "stale"
    """What this relay knows of the store's memory is too old: look again."""
    FENCED = "fenced"
    """The server was given to somebody since: this holder's token is worth nothing."""


class OwnerRelogin(StrEnum):
    """What a user's second login does: prefer the server that the user has already, or keep away from it as everybody else does."""

    PREFER = "prefer"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class Token:
    """Proof of a grant: a later grant of the server has a higher fence, or another epoch (the store's memory). Never given twice."""

    epoch: str
    fence: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A login that is being authenticated (step 2). `user` is only what the client says."""

    entry_id: str
    user: str
    address: str
    relay: str
    created_ms: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Login:
    """A login that was let in. It ends at `expires_ms` unless its relay renews it by `ttl_ms`; lingering, it only keeps the server.

    `is_for_sessions`: the server is to stay its user's while he has sessions there. Any relay may see to that, also when the one that let
    him in is gone.
    """

    login_id: str
    user: str
    relay: str
    expires_ms: int
    ttl_ms: int
    is_lingering: bool = False
    is_for_sessions: bool = False

    @property
    def awaits_sessions(self) -> bool:
        """Whether the login has ended and only the user's sessions keep the server."""
        return self.is_lingering and self.is_for_sessions

    @property
    def outlasts(self) -> bool:
        """Whether it stays when its user has another login. A login that merely lingers does not."""
        return self.is_for_sessions or not self.is_lingering


@dataclass(frozen=True, slots=True)
class Record:
    """What the store keeps for a server. All logins are of one user. `since_ms`: when that user got it.

    `was` is the token of the holder that re-asserted what it held before the store forgot; None for a grant of the present epoch.
    `revision` is the number of the write that made it.
    """

    epoch: str = ""
    fence: int = 0
    since_ms: int = 0
    logins: tuple[Login, ...] = ()
    entries: tuple[Entry, ...] = ()
    was: Token | None = None
    revision: int = 0

    @property
    def holder(self) -> str:
        """The user the server belongs to (step 6); empty if to nobody."""
        return self.logins[0].user if self.logins else ""

    @property
    def token(self) -> Token:
        """Of the last grant."""
        return Token(self.epoch, self.fence)


@dataclass(frozen=True, slots=True)
class Moment:
    """When the rule is applied: the store's clock and epoch, and a number that no write to this record had before.

    Logins that ended before `horizon_ms` are dead: usually that is now; after a time in which no relay could renew anything, it is the
    beginning of that time, until everyone has had the chance to.
    """

    now_ms: int
    epoch: str
    number: int
    horizon_ms: int


@dataclass(frozen=True, slots=True)
class Granted:
    """The server is the user's; `token` goes with the login."""

    record: Record
    token: Token
    is_new: bool


@dataclass(frozen=True, slots=True)
class Rejected:
    """The login is not let in. The record may have been cleaned up all the same. `holder`: who has the server, if that is why."""

    record: Record
    reason: Reason
    holder: str = ""


def is_daemon(claims: Mapping[str, Any]) -> bool:
    """Whether a login is a link daemon's. What the claim says does not matter, only that it is there."""
    return DAEMON_CLAIM in claims


def purge(record: Record, at: Moment) -> Record:
    """Without what has expired, and without what another epoch's logins left behind.

    A clock that was set back makes nobody wait longer than the time he was given.
    """
    if record.epoch != at.epoch:
        return Record(at.epoch, revision=record.revision)
    logins = tuple(_clamped(login, at) for login in record.logins if login.expires_ms > at.horizon_ms)
    entries = tuple(
        entry
        for entry in record.entries
        if at.now_ms < entry.expires_ms <= at.now_ms + ENTRY_TTL_MS and at.now_ms < entry.created_ms + ENTRY_HARD_MS
    )
    if logins == record.logins and entries == record.entries:
        return record
    return replace(record, logins=logins, entries=entries)


def enter(record: Record, entry_id: str, user: str, address: str, relay: str, at: Moment) -> Record | Rejected:
    """Step 2: note that a login is being authenticated. Entering again under the same id is one more request of it."""
    record = purge(record, at)
    if any(entry.entry_id == entry_id for entry in record.entries):
        return touch(record, entry_id, at)
    if sum(entry.address == address for entry in record.entries) >= MAX_ENTRIES_PER_ADDRESS:
        return Rejected(record, Reason.TOO_MANY)
    entries = record.entries
    if len(entries) >= MAX_ENTRIES:
        entries = _with_room(entries)
    entry = Entry(entry_id, user, address, relay, at.now_ms, at.now_ms + ENTRY_TTL_MS)
    return replace(record, entries=(*entries, entry))


def touch(record: Record, entry_id: str, at: Moment) -> Record:
    """Step 4: another request of this login. What has expired does not come back."""
    record = purge(record, at)
    entries = tuple(
        replace(entry, expires_ms=min(at.now_ms + ENTRY_TTL_MS, entry.created_ms + ENTRY_HARD_MS)) if entry.entry_id == entry_id else entry
        for entry in record.entries
    )
    return replace(record, entries=entries)


def go_on(record: Record, entry_id: str, at: Moment) -> Record | Rejected:
    """Step 4, where a login is known to have begun: as `touch`, but not without its entry. Somebody's commit cleared it, or it expired."""
    record = touch(record, entry_id, at)
    if all(entry.entry_id != entry_id for entry in record.entries):
        return Rejected(record, Reason.RESERVED if record.holder else Reason.NO_ENTRY, record.holder)
    return record


def abandon(record: Record, entry_id: str, at: Moment) -> Record:
    """The login failed, was given up, or was rejected."""
    record = purge(record, at)
    return replace(record, entries=tuple(entry for entry in record.entries if entry.entry_id != entry_id))


def commit(record: Record, entry_id: str, login: Login, relogin: OwnerRelogin, at: Moment, elsewhere: str = "") -> Granted | Rejected:
    """Step 5, as one atomic operation; only who is granted may be let in. Repeating it with the same login changes no login.

    The literal algorithm asks for the entry alone. Then a login that was selected from a list made before somebody else's commit enters
    after that commit has cleared the entries, finds its own, and there are two users: so the logins themselves are asked here. `elsewhere`
    is a server that the user has and should use; with it he does not get this one, unless he has it, too.
    """
    record = purge(record, at)
    if any((known.login_id, known.user, known.is_lingering) == (login.login_id, login.user, False) for known in record.logins):
        return Granted(abandon(record, entry_id, at), record.token, False)
    own = [known for known in record.logins if known.outlasts]
    if record.holder not in ("", login.user):
        return Rejected(abandon(record, entry_id, at), Reason.RESERVED, record.holder)
    if own and relogin is OwnerRelogin.DENY:
        return Rejected(abandon(record, entry_id, at), Reason.OWN_LOGIN, record.holder)
    if elsewhere and not record.holder and relogin is OwnerRelogin.PREFER:
        return Rejected(abandon(record, entry_id, at), Reason.ELSEWHERE)
    if all(entry.entry_id != entry_id for entry in record.entries):
        return Rejected(record, Reason.NO_ENTRY)
    if len(own) >= MAX_LOGINS:
        return Rejected(abandon(record, entry_id, at), Reason.TOO_MANY, record.holder)
    base = record if record.holder else Record(at.epoch, at.number, at.now_ms, revision=record.revision)
    # One that has ended, and was made with the same token, begins again.
    others = tuple(known for known in own if known.login_id != login.login_id)
    granted = replace(base, logins=(*others, login), entries=())
    return Granted(granted, granted.token, not record.holder)


def renew(record: Record, login: Login, token: Token, since_ms: int, at: Moment) -> Granted | Rejected:
    """Step 6: what is held stays held. The token decides; a lease that lapsed is taken up again if nobody was let in since.

    In an epoch that remembers nothing of it, the holder says so: `re-assert`. Of two who do, the later grant is right.
    """
    record = purge(record, at)
    others = tuple(
        known for known in record.logins if known.login_id != login.login_id and (known.awaits_sessions or not known.is_lingering)
    )
    if not record.fence:  # nothing was granted in this epoch
        return _granted(Record(at.epoch, at.number, since_ms, (login,), (), token, record.revision))
    if token.epoch == at.epoch:
        if record.fence != token.fence or record.holder not in ("", login.user):
            return Rejected(record, Reason.FENCED, record.holder)
        return _granted(replace(record, logins=(*others, login)))
    if record.was is None or record.was.epoch != token.epoch or record.was.fence > token.fence:
        return Rejected(record, Reason.FENCED, record.holder)
    if record.was.fence < token.fence:
        return _granted(Record(at.epoch, at.number, since_ms, (login,), (), token, record.revision))
    return _granted(replace(record, logins=(*others, login)))


def extend(record: Record, login_id: str, ttl_ms: int, at: Moment) -> Record:
    """Step 6, for a login that the store keeps by itself: it lasts for `ttl_ms` from now. One that has ended does not come back."""
    record = purge(record, at)
    logins = tuple(
        replace(login, expires_ms=at.now_ms + ttl_ms, ttl_ms=ttl_ms) if login.login_id == login_id and not login.is_lingering else login
        for login in record.logins
    )
    return replace(record, logins=logins)


def release(record: Record, login_id: str, linger_ms: int, at: Moment) -> Record:
    """Step 7: a login ends. With the last one the server is free, or is its user's for another `linger_ms`. May be repeated."""
    record = purge(record, at)
    ended = [login for login in record.logins if login.login_id == login_id and login.outlasts]
    if not ended:
        return record
    others = tuple(login for login in record.logins if login.login_id != login_id)
    if linger_ms > 0 and not others:
        linger_ms = min(linger_ms, MAX_LINGER_MS)
        others = (replace(ended[0], expires_ms=at.now_ms + linger_ms, ttl_ms=linger_ms, is_lingering=True, is_for_sessions=False),)
    return replace(record, logins=others)


def put_off(record: Record, login_id: str, ttl_ms: int, at: Moment) -> Record:
    """Step 7, put off: a login has ended, but its user has, or may have, sessions on the server, and keeps it for another `ttl_ms`.

    One such login is enough for a record: the one that ended last, as a session that it began may not be told yet when those of an earlier
    one are known to be over. One that is gone does not come back. May be repeated.
    """
    record = purge(record, at)
    ended = next((login for login in record.logins if login.login_id == login_id), None)
    if ended is None:
        return record
    waits = replace(ended, expires_ms=at.now_ms + ttl_ms, ttl_ms=ttl_ms, is_lingering=True, is_for_sessions=True)
    logins = tuple(
        waits if login.login_id == login_id else login for login in record.logins if login.login_id == login_id or not login.awaits_sessions
    )
    return replace(record, logins=logins)


def clear(at: Moment) -> Record:
    """Step 7, by an administrator: nobody's logins and nobody's entries. Holders find their tokens refused."""
    return Record(at.epoch, at.number)


def _granted(record: Record) -> Granted:
    return Granted(record, record.token, False)


def _clamped(login: Login, at: Moment) -> Login:
    latest_ms = at.now_ms + login.ttl_ms
    return replace(login, expires_ms=latest_ms) if login.expires_ms > latest_ms else login


def _with_room(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    counts = Counter(entry.address for entry in entries)
    most = max(counts.values())
    victim = min((entry for entry in entries if counts[entry.address] == most), key=lambda entry: (entry.created_ms, entry.entry_id))
    return tuple(entry for entry in entries if entry is not victim)
