"""Task: what this relay knows of reservations, and how it asks the store about them: in worker threads, under a deadline.

What is asked while the store is busy goes to it together: one thread, one call of the store, one write to its disk.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Final, Literal, TypeVar

import trio

from fxrelay.balance.holders import Holders
from fxrelay.balance.reservations import Record
from fxrelay.balance.settling import Evidence
from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.reserving.event_reporter import EXPIRED, EventReporter
from fxrelay.reserving.ledger import Ledger, Written
from fxrelay.reserving.record_updates import RecordUpdate, RecordUpdates
from fxrelay.reserving.record_updates import T as Outcome
from fxtunnel.errors import StoreError
from fxtunnel.model import RelayId

T = TypeVar("T")

CALL_S: Final = 4.0
"""For one call to the store, its own deadlines and the wait for a thread included."""
ANSWER_S: Final = 1.8
"""How long to wait for a store that answers nobody: with everything else a client is told within two seconds. A store that is slow, but
answers others meanwhile, has CALL_S."""
PAUSE_S: Final = 1.0
"""For this long after such a silence callers are told at once; then one of them tries the store again."""
LANES: Final = 2
"""Threads for batched calls: while one waits for the disk, the other prepares. A store that hangs holds no more than these."""
AT_ONCE: Final = 64
"""Asks in one batch, at most."""
MAX_UNTIDIED: Final = 4_096


@dataclass(frozen=True, slots=True)
class ReservingConfig:
    """`lease_s` must be the same at all relays. `on_lost_lease`: what to do with logins that could not be renewed for so long."""

    relay_id: RelayId
    lease_s: float = 15.0
    on_lost_lease: Literal["keep", "end"] = "keep"


class _Waiting:
    """An ask, and the task that waits for it."""

    __slots__ = ("answer", "ask", "done")

    def __init__(self, ask: RecordUpdate[Any]) -> None:
        self.ask = ask
        self.answer: tuple[Any, Written] | Exception | None = None
        self.done = trio.Event()

    def tell(self, answer: tuple[Any, Written] | Exception) -> None:
        self.answer = answer
        self.done.set()


class ReservationCache:
    """Who has what, as far as it was read or heard; what the store says when asked goes in by `learn`."""

    def __init__(self, config: ReservingConfig, store: Store, transporter: Transporter) -> None:
        self.config = config
        self.ledger = Ledger(store, config.relay_id, config.lease_s)
        self.holders = Holders()
        self._threads = Threads()
        self.reporter = EventReporter(transporter, self._threads)
        self.changed = trio.Event()
        """Set when who has which server may have changed; made anew each time."""
        self.last_error = ""
        self.store_failed: Callable[[], None] = lambda: None
        """Called whenever something could not be done because the store could not be used."""
        self.untidied: set[tuple[RelayId, str]] = set()
        """Servers whose logins were found expired, and whose these were: the users' own documents may still say so."""
        self._waiting = deque[_Waiting]()
        self._some = trio.lowlevel.ParkingLot()
        self._lanes = 0
        self._answered_at = -math.inf
        self._silent_until = -math.inf
        self._looked: Evidence | None = None
        self._settles_at = math.inf
        self._strange = self._strange_before = 0
        """News of another epoch than the one looked at last: all, and those before that look."""

    @property
    def updates(self) -> RecordUpdates:
        """What can be asked of a record."""
        return self.ledger.updates

    async def run(self) -> None:
        """Take what is asked to the store until cancelled. Without it everything goes by itself."""
        async with trio.open_nursery() as nursery:
            for _ in range(LANES):
                nursery.start_soon(self._carry)

    async def _carry(self) -> None:
        self._lanes += 1
        try:
            while True:
                if not self._waiting:
                    await self._some.park()
                    continue
                together = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
                if self._waiting:
                    self._some.unpark()
                call = partial(self.ledger.do_all, [waiting.ask for waiting in together])
                answers: Sequence[tuple[Any, Written] | Exception] = ()
                try:
                    with trio.move_on_after(CALL_S):
                        answers = await self._threads.run(call)
                        if not all(isinstance(answer, StoreError) for answer in answers):
                            self._is_heard()
                finally:
                    for waiting, answer in zip_longest(together, answers):
                        waiting.tell(answer if answer is not None else _late())
        finally:
            self._lanes -= 1
            while not self._lanes and self._waiting:
                self._waiting.popleft().tell(StoreError("this relay is going away"))

    async def look(self) -> Evidence | StoreError:
        """See `Ledger.look`."""
        began, strange = trio.current_time(), self._strange
        looked = await self.ask(self.ledger.look)
        if not isinstance(looked, StoreError):
            self._looked, self._strange_before = looked, strange
            self._settles_at = began + looked.settles_in_ms(looked.seen_ms) / 1000
        return looked

    @property
    def is_settled(self) -> bool:
        """Whether a login that is in no record has ended: not while the store may have forgotten it, and its relay has yet to say so."""
        return self._strange == self._strange_before and trio.current_time() >= self._settles_at

    def silence(self) -> StoreError | None:
        """That the store has just answered nobody, and is not worth asking for somebody who waits. None also for the one who is to find
        out whether it does by now: he must ask.
        """
        now = trio.current_time()
        if now < self._silent_until:
            return StoreError(self.last_error or "no answer")
        if self._silent_until > -math.inf:
            self._silent_until = now + ANSWER_S  # the others need not wait as well
        return None

    async def do(self, ask: RecordUpdate[Outcome]) -> tuple[Outcome, Written] | StoreError:
        """The outcome of a step, or why there is no answer."""
        return _expected(*await self.do_all([ask]))

    async def do_soon(self, ask: RecordUpdate[Outcome]) -> tuple[Outcome, Written] | StoreError:
        """As `do`, for somebody who waits; after `silence`."""
        answer = _expected(*await self.do_all([ask], ANSWER_S))
        self._rest_after(answer)
        return answer

    async def do_all(self, together: Sequence[RecordUpdate[Any]], patience_s: float = CALL_S) -> list[tuple[Any, Written] | Exception]:
        """What comes of each of these steps, or why there is no answer. `patience_s` is for a store that answers nobody else either."""
        if not self._lanes:
            found = await self.ask(partial(self.ledger.do_all, together), patience_s)
            return self._told(found if not isinstance(found, StoreError) else [found] * len(together))
        waiting = [_Waiting(ask) for ask in together]
        self._waiting.extend(waiting)
        self._some.unpark()
        try:
            began = trio.current_time()
            for each in waiting:
                while each.answer is None:
                    deadline = min(began + CALL_S, max(began, self._answered_at) + patience_s)
                    if trio.current_time() >= deadline:
                        break
                    with trio.move_on_at(deadline):
                        await each.done.wait()
        finally:
            for each in waiting:
                if each.answer is None and each in self._waiting:
                    self._waiting.remove(each)
        return self._told([each.answer if each.answer is not None else _late(patience_s) for each in waiting])

    def _told(self, answers: list[tuple[Any, Written] | Exception]) -> list[tuple[Any, Written] | Exception]:
        self._note(next((answer for answer in answers if isinstance(answer, StoreError)), None))
        return answers

    def _note(self, error: StoreError | None) -> None:
        self.last_error = "" if error is None else str(error)
        if error is not None:
            self.store_failed()

    async def ask(self, call: Callable[[], T], patience_s: float = CALL_S) -> T | StoreError:
        """What `call` returns in a thread, or why there is no answer."""
        try:
            with trio.move_on_after(patience_s):
                result = await self._threads.run(call)
                self._is_heard()
                self._note(None)
                return result
        except StoreError as exc:
            self._note(exc)
            return exc
        late = _late(patience_s)
        self._note(late)
        return late

    async def ask_soon(self, call: Callable[[], T]) -> T | StoreError:
        """As `ask`, for somebody who waits; after `silence`."""
        answer = await self.ask(call, ANSWER_S)
        self._rest_after(answer)
        return answer

    def _rest_after(self, answer: object) -> None:
        self._silent_until = trio.current_time() + PAUSE_S if isinstance(answer, _Late) else -math.inf

    def _is_heard(self) -> None:
        self._answered_at, self._silent_until = trio.current_time(), -math.inf

    def learn(self, server_id: RelayId, written: Written) -> None:
        """Take in what this relay has just read or written itself."""
        for login in written.expired:
            self.reporter.happened(EXPIRED, server_id, login.user, login.login_id, written.record)
            if login.user != written.record.holder and len(self.untidied) < MAX_UNTIDIED:
                self.untidied.add((server_id, login.user))
        if self.know(server_id, written.record):
            self.reporter.publish(server_id, written.record)

    def know(self, server_id: RelayId, record: Record) -> bool:
        """Take in a record that was read or heard. Returns whether it is news."""
        is_news = self.holders.learn(server_id, record)
        if is_news:
            if self._looked is None or record.epoch != self._looked.mark.epoch:
                self._strange += 1
            changed, self.changed = self.changed, trio.Event()
            changed.set()
        return is_news


class _Late(StoreError):
    """Nothing was heard of the store in time."""


def _late(patience_s: float = CALL_S) -> _Late:
    return _Late(f"no answer within {patience_s:g} s")


def _expected(answer: tuple[Any, Written] | Exception) -> tuple[Any, Written] | StoreError:
    if isinstance(answer, Exception) and not isinstance(answer, StoreError):
        raise answer
    return answer
