"""Task: the rule of reservations applied to the store's records, one atomic update each. Blocking: for worker threads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from fxrelay.balance import reservations as rule
from fxrelay.balance.reservation_text import BadRecord, decode_record, encode_record
from fxrelay.balance.reservations import Granted, Login, Moment, OwnerRelogin, Reason, Record, Rejected, Token
from fxrelay.balance.settling import Evidence, beat, decode_mark, encode_mark
from fxrelay.cluster.ports import RESERVATION_MARKS, RESERVATIONS, Present, Store
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId

T = TypeVar("T", Record, Granted | Rejected, Record | Rejected)
Good = TypeVar("Good", Record, Granted)

MARK: Final = "mark"
LOOKS: Final = 3
"""How often a commit looks again because what it knew of the store's memory was too old."""


@dataclass(frozen=True, slots=True)
class Written:
    """A record after an update, and the logins that this update found expired: whoever writes that is the one to tell it."""

    record: Record
    expired: tuple[Login, ...]


class Ledger:
    """The records of one relay's cluster. Any number of threads may call.

    Raises:
        StoreError: every call may; what was asked for may or may not be written.
    """

    def __init__(self, store: Store, relay_id: RelayId, lease_s: float) -> None:
        self.lease_ms = int(lease_s * 1000)
        self._store = store
        self._relay_id = relay_id
        self._evidence: Evidence | None = None
        self._read: dict[str, tuple[str, Record]] = {}

    @property
    def epoch(self) -> str:
        """The store's, as it was when it was last looked at; empty before."""
        return self._evidence.mark.epoch if self._evidence is not None else ""

    def look(self) -> Evidence:
        """Beat the mark, and see whether the store has forgotten anything."""
        self._store.epoch()  # asks a Redis whether it still keeps what it is told

        def change(present: Present) -> str | None:
            mark = decode_mark(present.text) if present.text is not None else None
            fresh = beat(mark, present.epoch, present.now_ms, self.lease_ms)
            seen.append(Evidence(fresh, present.now_ms, self.lease_ms))
            return encode_mark(fresh) if fresh != mark else None

        seen: list[Evidence] = []
        self._store.update(RESERVATION_MARKS, MARK, change)
        self._evidence = seen[-1]
        return seen[-1]

    def enter(self, server_id: str, entry_id: str, user: str, address: str) -> tuple[Record | Rejected, Written]:
        """Step 2, and each request of step 4. Not before something may be granted: the request brings a password to the server."""
        return self._once_settled(server_id, lambda record, at: rule.enter(record, entry_id, user, address, self._relay_id, at))

    def go_on(self, server_id: str, entry_id: str) -> tuple[Record | Rejected, Written]:
        """Step 4, for a login that must have its entry. As `enter`, not before something may be granted."""
        return self._once_settled(server_id, lambda record, at: rule.go_on(record, entry_id, at))

    def extend(self, server_id: str, login_id: str, ttl_ms: int) -> Written:
        """Step 6, for a login that the store keeps by itself."""
        return self._apply(server_id, lambda record, at: rule.extend(record, login_id, ttl_ms, at), _itself)[1]

    def abandon(self, server_id: str, entry_id: str) -> Written:
        """The login came to nothing."""
        return self._apply(server_id, lambda record, at: rule.abandon(record, entry_id, at), _itself)[1]

    def commit(
        self, server_id: str, entry_id: str, login_id: str, user: str, relogin: OwnerRelogin, ttl_ms: int = 0
    ) -> tuple[Granted | Rejected, Written]:
        """Step 5, for an entry that was made before. `ttl_ms`: how long the store keeps the login by itself; 0: a lease."""

        def apply(record: Record, at: Moment) -> Granted | Rejected:
            return rule.commit(record, entry_id, self._login(login_id, user, at, ttl_ms), relogin, at)

        return self._once_settled(server_id, apply)

    def take(self, server_id: str, login_id: str, user: str, address: str, relogin: OwnerRelogin) -> tuple[Granted | Rejected, Written]:
        """Steps 2 and 5 at once, for a login that has nothing in between: its entry is gone when others could see it."""

        def both(record: Record, at: Moment) -> Granted | Rejected:
            entered = rule.enter(record, login_id, user, address, self._relay_id, at)
            if isinstance(entered, Rejected):
                return entered
            return rule.commit(entered, login_id, self._login(login_id, user, at), relogin, at)

        return self._once_settled(server_id, both)

    def renew(
        self, server_id: str, login_id: str, user: str, token: Token, since_ms: int, ttl_ms: int = 0
    ) -> tuple[Granted | Rejected, Written]:
        """Step 6: keep what is held, or say after a loss of memory that it is. `ttl_ms` as for `commit`."""

        def again(record: Record, at: Moment) -> Granted | Rejected:
            return rule.renew(record, self._login(login_id, user, at, ttl_ms), token, since_ms, at)

        return self._apply(server_id, again, _record_of)

    def release(self, server_id: str, login_id: str, linger_ms: int) -> Written:
        """Step 7. May be repeated."""
        return self._apply(server_id, lambda record, at: rule.release(record, login_id, linger_ms, at), _itself)[1]

    def sweep(self, server_id: str) -> Written:
        """Write down that what has expired is gone."""
        return self._apply(server_id, rule.purge, _itself)[1]

    def clear(self, server_id: str) -> tuple[Record, Record]:
        """Step 7, by an administrator; also repairs what nobody can read. Returns the record before, if it can be, and after."""
        records: list[tuple[Record, Record]] = []

        def change(present: Present) -> str:
            try:
                before = decode_record(present.text)
            except BadRecord:
                before = Record()
            at = Moment(present.now_ms, present.epoch, present.number, 0)
            records.append((before, replace(rule.clear(before, at), revision=present.number)))
            return encode_record(records[-1][1])

        try:
            self._store.update(RESERVATIONS, server_id, change)
        except StoreError:
            self._store.delete(RESERVATIONS, server_id)  # what cannot even be read as text
            self._store.update(RESERVATIONS, server_id, change)
        return records[-1]

    def records(self) -> Iterator[tuple[str, Record]]:
        """All records that can be read. Most are as they were when they were read last, and are not decoded again."""
        before, after = self._read, dict[str, tuple[str, Record]]()
        for document in self._store.documents(RESERVATIONS):
            known = before.get(document.key)
            if known is None or known[0] != document.text:
                try:
                    known = document.text, decode_record(document.text)
                except BadRecord:
                    continue
            after[document.key] = known
            yield document.key, known[1]
        self._read = after

    def _once_settled(self, server_id: str, apply: Callable[[Record, Moment], Good | Rejected]) -> tuple[Good | Rejected, Written]:
        """`apply`, or a rejection as long as the store cannot be trusted to know who holds what."""
        for _ in range(LOOKS):
            outcome, written = self._apply(server_id, self._proven(apply), _record_of)
            if not (isinstance(outcome, Rejected) and outcome.reason is Reason.STALE):
                break
            self.look()
        return outcome, written

    def _proven(self, apply: Callable[[Record, Moment], Good | Rejected]) -> Callable[[Record, Moment], Good | Rejected]:
        evidence = self._evidence

        def checked(record: Record, at: Moment) -> Good | Rejected:
            if evidence is None or not evidence.is_fresh(at.now_ms, at.epoch):
                return Rejected(record, Reason.STALE)
            if evidence.settles_in_ms(at.now_ms):
                return Rejected(record, Reason.UNSETTLED)
            return apply(record, at)

        return checked

    def _login(self, login_id: str, user: str, at: Moment, ttl_ms: int = 0) -> Login:
        ttl_ms = ttl_ms or self.lease_ms
        return Login(login_id, user, self._relay_id, at.now_ms + ttl_ms, ttl_ms)

    def _apply(self, server_id: str, apply: Callable[[Record, Moment], T], record_of: Callable[[T], Record]) -> tuple[T, Written]:
        evidence = self._evidence
        results: list[tuple[T, Written]] = []

        def change(present: Present) -> str | None:
            try:
                before = decode_record(present.text)
            except BadRecord as exc:
                raise StoreError(f"the reservation of {server_id} is damaged ({exc}); run: fxrelay release {server_id}") from exc
            # Who does not know what the store remembers ends nobody's login.
            is_fresh = evidence is not None and evidence.is_fresh(present.now_ms, present.epoch)
            horizon_ms = evidence.horizon_ms(present.now_ms) if evidence is not None and is_fresh else 0
            outcome = apply(before, Moment(present.now_ms, present.epoch, present.number, horizon_ms))
            after = record_of(outcome)
            is_same = after == before
            after = after if is_same else replace(after, revision=present.number)
            left = {login.login_id for login in after.logins}
            ended = before.epoch == present.epoch and not is_same
            expired = tuple(login for login in before.logins if ended and login.login_id not in left and login.expires_ms <= horizon_ms)
            results.append((outcome, Written(after, expired)))
            return None if is_same else encode_record(after)

        self._store.update(RESERVATIONS, server_id, change)
        return results[-1]


def _record_of(outcome: Record | Granted | Rejected) -> Record:
    return outcome if isinstance(outcome, Record) else outcome.record


def _itself(record: Record) -> Record:
    return record
