"""Task: the rule of reservations applied to the store's records, one atomic update each. Blocking: for worker threads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from fxrelay.balance import reservations as rule
from fxrelay.balance.homes import decode_homes, encode_homes, key_of, with_home, without_home
from fxrelay.balance.reservation_text import BadRecord, decode_record, encode_record
from fxrelay.balance.reservations import Granted, Login, Moment, Reason, Record, Rejected
from fxrelay.balance.settling import Evidence, beat, decode_mark, encode_mark
from fxrelay.cluster.ports import RESERVATION_MARKS, RESERVATION_USERS, RESERVATIONS, Both, Present, Store, Update
from fxrelay.reserving.record_updates import RecordUpdate, RecordUpdates, T
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId

MARK: Final = "mark"
LOOKS: Final = 3
"""How often a commit looks again because what it knew of the store's memory was too old."""
MAX_KNOWN: Final = 4_096


@dataclass(frozen=True, slots=True)
class Written:
    """A record after an update, and the logins that this update found expired: whoever writes that also reports it."""

    record: Record
    expired: tuple[Login, ...]


class Ledger:
    """The records of one relay's cluster. Any number of threads may call.

    Raises:
        StoreError: every call may; what was asked for may or may not be written.
    """

    def __init__(self, store: Store, relay_id: RelayId, lease_s: float) -> None:
        self.lease_ms = int(lease_s * 1000)
        self.updates = RecordUpdates(relay_id, self.lease_ms)
        self._store = store
        self._evidence: Evidence | None = None
        self._read: dict[str, tuple[str, Record]] = {}
        self._texts = _Texts()

    @property
    def epoch(self) -> str:
        """The store's, as it was when it was last looked at; empty before."""
        return self._evidence.mark.epoch if self._evidence is not None else ""

    @property
    def doubt(self) -> str:
        """Why the store may forget what it acknowledges; see `Store`."""
        return self._store.doubt

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

    def do_all(self, updates: Sequence[RecordUpdate[Any]]) -> list[tuple[Any, Written] | Exception]:
        """Several steps, each by itself: of each, in order, what came of it, or why nothing did. Who is to be granted something is rejected
        as long as the store cannot be trusted to know who holds what. Raises nothing.
        """
        results: list[tuple[Any, Written] | Exception] = [StoreError("was not asked")] * len(updates)
        left = list(range(len(updates)))
        for _ in range(LOOKS):
            try:
                for place, result in zip(left, self._apply_all([updates[place] for place in left]), strict=True):
                    results[place] = result
                left = [place for place in left if _is_stale(results[place])]
                if not left:
                    break
                self.look()
            except Exception as exc:
                for place in left:
                    results[place] = exc
                break
        return results

    def do(self, ask: RecordUpdate[T]) -> tuple[T, Written]:
        """One step."""
        (result,) = self.do_all([ask])
        if isinstance(result, Exception):
            raise result
        return result

    def homes(self, user: str) -> tuple[str, ...]:
        """The servers that a user has, or had until recently."""
        key = key_of(user)
        found = self._store.get(RESERVATION_USERS, key) if key else None
        return decode_homes(found.text if found is not None else None)

    def clear(self, server_id: str) -> tuple[Record, Record]:
        """Step 7, by an administrator; also repairs what nobody can read. Returns the record before, if it can be, and after."""
        found: list[tuple[Record, Record]] = []

        def change(present: Present) -> str | Both:
            before = _readable(present.text)
            at = Moment(present.now_ms, present.epoch, present.number, 0)
            found.append((before, replace(rule.clear(at), revision=present.number)))
            text = encode_record(found[-1][1])
            return Both(text, encode_homes(without_home(decode_homes(present.beside), server_id))) if user else text

        try:
            document = self._store.get(RESERVATIONS, server_id)
            user = key_of(_readable(document.text if document is not None else None).holder)
            self._write(Update(RESERVATIONS, server_id, change, (RESERVATION_USERS, user) if user else None))
        except StoreError:
            user = ""
            self._store.delete(RESERVATIONS, server_id)  # what cannot even be read as text
            self._write(Update(RESERVATIONS, server_id, change))
        return found[-1]

    def _write(self, update: Update) -> None:
        (result,) = self._store.update_all([update])
        if isinstance(result, Exception):
            raise result

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

    def _apply_all(self, updates: Sequence[RecordUpdate[Any]]) -> list[tuple[Any, Written] | Exception]:
        steps = [_Step(ask, self._evidence, self._texts) for ask in updates]
        done = self._store.update_all([step.update for step in steps])
        return [each if isinstance(each, Exception) else step.results[-1] for step, each in zip(steps, done, strict=True)]


class _Texts:
    """Records and their texts as they were last: mostly the same relay writes a record again, and need not decode what it has encoded."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str | None, Record]] = {}

    def decode(self, server_id: str, text: str | None) -> Record:
        """See `decode_record`."""
        known = self._known.get(server_id)
        return known[1] if known is not None and known[0] == text else decode_record(text)

    def encode(self, server_id: str, record: Record) -> str:
        """See `encode_record`."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        text = encode_record(record)
        self._known[server_id] = text, record
        return text


class _Step:
    """An ask on its way through the store. `results`: what came of it at each try; the last one counts."""

    __slots__ = ("_ask", "_evidence", "_texts", "_user", "results", "update")

    def __init__(self, ask: RecordUpdate[Any], evidence: Evidence | None, texts: _Texts) -> None:
        self._ask = ask
        self._evidence = evidence
        self._texts = texts
        self._user = key_of(ask.user)
        self.results: list[tuple[Any, Written]] = []
        self.update = Update(RESERVATIONS, ask.server_id, self._change, (RESERVATION_USERS, self._user) if self._user else None)

    def _change(self, present: Present) -> str | Both | None:
        ask, evidence = self._ask, self._evidence
        server_id = ask.server_id
        try:
            before = self._texts.decode(server_id, present.text)
        except BadRecord as exc:
            raise StoreError(f"the reservation of {server_id} is damaged ({exc}); run: fxrelay release {server_id}") from exc
        # Without knowing what the store remembers nobody's login may be ended.
        is_fresh = evidence is not None and evidence.is_fresh(present.now_ms, present.epoch)
        horizon_ms = evidence.horizon_ms(present.now_ms) if evidence is not None and is_fresh else 0
        if ask.is_grant and (evidence is None or not is_fresh or evidence.settles_in_ms(present.now_ms)):
            reason = Reason.UNSETTLED if is_fresh else Reason.STALE
            self.results.append((Rejected(before, reason), Written(before, ())))
            return None
        homes = decode_homes(present.beside)
        elsewhere = next((home for home in homes if ask.would_do(home) and home != server_id), "") if ask.would_do is not None else ""
        outcome = ask.apply(before, Moment(present.now_ms, present.epoch, present.number, horizon_ms), elsewhere)
        after = _record_of(outcome)
        is_same = after == before
        after = after if is_same else replace(after, revision=present.number)
        left = {login.login_id for login in after.logins}
        ended = before.epoch == present.epoch and not is_same
        expired = tuple(login for login in before.logins if ended and login.login_id not in left and login.expires_ms <= horizon_ms)
        self.results.append((outcome, Written(after, expired)))
        after_homes = with_home(homes, server_id) if after.holder == ask.user else without_home(homes, server_id)
        if self._user and after_homes != homes:
            return Both(self._texts.encode(server_id, after), encode_homes(after_homes))
        return None if is_same else self._texts.encode(server_id, after)


def _readable(text: str | None) -> Record:
    try:
        return decode_record(text)
    except BadRecord:
        return Record()


def _is_stale(result: tuple[Any, Written] | Exception) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], Rejected) and result[0].reason is Reason.STALE


def _record_of(outcome: Record | Granted | Rejected) -> Record:
    return outcome if isinstance(outcome, Record) else outcome.record
