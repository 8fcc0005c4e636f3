"""Pump: the logins that this relay has let in, and what becomes of each: renewed, released, lost."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from fxrelay.balance.login_attempt import Attempt, AttemptEvent
from fxrelay.balance.reservations import Token
from fxtunnel.model import RelayId

MAX_ENDING: Final = 4_096
"""While the store does not answer; what strangers can cause is not kept beyond that."""


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """What a service asks of its reservations. `linger_ms`: how long a user keeps a server after the last login.

    `lifetime_ms`: the store keeps the login for so long, whoever runs or dies; 0: as long as this relay renews it.
    """

    linger_ms: int = 0
    hold_while_sessions: bool = False
    lifetime_ms: int = 0


@dataclass(eq=False, slots=True)
class Hold:
    """A login on a server. `confirmed_at`: monotonic seconds when its last good renewal was sent."""

    server_id: RelayId
    user: str
    attempt: Attempt
    terms: LeaseTerms
    token: Token
    since_ms: int
    confirmed_at: float
    lock: trio.Lock = field(default_factory=trio.Lock)
    is_ending: bool = False
    is_lost: bool = False
    not_before: float = 0.0
    """When it may be released: a step whose answer did not come may still be under way."""
    on_lost: list[Callable[[], None]] = field(default_factory=list)
    known_as: str = ""
    """The id of its login, if it is not the attempt's."""
    ends_ms: int = 0
    """The store's clock when a login that the store keeps ends by itself."""
    ended_ms: int = 0
    """The store's clock when it was over, for those whose servers are held while there are sessions."""

    @property
    def login_id(self) -> str:
        """The id of its login in the record."""
        return self.known_as or self.attempt.attempt_id

    @property
    def is_unseen(self) -> bool:
        """Whether this relay never heard that it was granted: whatever the record holds of it will not be used."""
        return not self.token.fence

    @property
    def is_kept(self) -> bool:
        """Whether the store keeps it by itself."""
        return self.terms.lifetime_ms > 0

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` when the server no longer belongs to the user; at once, if that is so already."""
        if self.is_lost:
            lost()
        else:
            self.on_lost.append(lost)


class Leases:
    """All holds of one relay. Belongs to the trio thread."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._holds: dict[str, Hold] = {}
        self._ending: dict[str, Hold] = {}
        self._monotonic = monotonic
        self.something_ends = trio.Event()

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self._monotonic()

    def add(self, hold: Hold) -> None:
        """A login was let in."""
        hold.attempt = hold.attempt.after(AttemptEvent.LET_IN)
        self._holds[hold.login_id] = hold

    def holds(self) -> list[Hold]:
        """Those to be renewed by this relay."""
        return [hold for hold in self._holds.values() if not hold.is_kept]

    def kept(self) -> list[Hold]:
        """Those that the store keeps."""
        return [hold for hold in self._holds.values() if hold.is_kept]

    def get(self, login_id: str) -> Hold | None:
        """The hold of this login, if this relay has it."""
        return self._holds.get(login_id)

    def is_ending(self, login_id: str) -> bool:
        """Whether it is on its way out of its record."""
        return login_id in self._ending

    def forget(self, hold: Hold) -> None:
        """It has ended, and its record knows."""
        hold.is_ending = True
        self._holds.pop(hold.login_id, None)

    @property
    def has_room(self) -> bool:
        """Whether what would end by itself soon may be taken out besides."""
        return len(self._ending) < MAX_ENDING

    def end(self, hold: Hold) -> None:
        """The login is over: it has to be taken out of its record. May be repeated."""
        if hold.is_ending or hold.is_lost:
            return
        hold.is_ending = True
        self._holds.pop(hold.login_id, None)
        self._ending[hold.login_id] = hold
        self.something_ends.set()

    def ending(self) -> list[Hold]:
        """Those to be taken out of their records, and whose time for it has come."""
        now = self.now
        return [hold for hold in self._ending.values() if hold.not_before <= now]

    @property
    def has_ending(self) -> bool:
        """Whether anything is to be taken out, now or later."""
        return bool(self._ending)

    def ended(self, hold: Hold) -> None:
        """It is out of its record, or will be by its lease."""
        self._ending.pop(hold.login_id, None)

    def was_granted(self, login_id: str) -> None:
        """Keep this login in its record, though the answer to an earlier commit of it did not come, or it ended and was made again."""
        self._ending.pop(login_id, None)

    def lose(self, hold: Hold) -> None:
        """The server no longer belongs to the user: tell whoever watches the hold."""
        if hold.is_lost or hold.is_ending:
            return
        hold.is_lost = True
        hold.attempt = hold.attempt.after(AttemptEvent.EXPIRE)
        self._holds.pop(hold.login_id, None)
        watchers, hold.on_lost = hold.on_lost, []
        for lost in watchers:
            lost()
