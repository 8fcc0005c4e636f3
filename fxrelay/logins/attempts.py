"""Pump: logins that are under way at this relay: which server each is at, and how many one address may have. Belongs to the trio thread."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fxrelay.balance.reservations import ENTRY_HARD_MS, ENTRY_TTL_MS
from fxrelay.reserving.reservations import Entered
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId

MAX_ONGOING: Final = 4_096
MAX_ONGOING_PER_ADDRESS: Final = 64
MAX_AT_ONCE: Final = 1_024
"""Requests of logins that are held at once, by whomever."""


@dataclass(eq=False, slots=True)
class Ongoing:
    """A login of several requests. `began`, `touched`: monotonic seconds. `entered` None: its server is nobody's alone, or, if `reserves`,
    it has failed and may enter anew.
    """

    server_id: RelayId
    user: str
    address: str
    began: float
    touched: float
    entered: Entered | None
    is_busy: bool = False
    reserves: bool = False

    def is_over(self, now: float) -> bool:
        """Whether its time is over, as an entry's is."""
        return now - self.touched > ENTRY_TTL_MS / 1000 or now - self.began > ENTRY_HARD_MS / 1000


class Attempts:
    """The logins under way, by what their next request will repeat. An address that begins too many loses its own oldest ones."""

    def __init__(self) -> None:
        self._ongoing: OrderedDict[str, Ongoing] = OrderedDict()
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._ongoing)

    def find(self, key: str, now: float) -> Ongoing | None:
        """The login whose next request this is."""
        found = self._ongoing.get(key)
        if found is not None and found.is_over(now):
            self.drop(key)
            return None
        return found

    def keep(self, key: str, ongoing: Ongoing, now: float) -> None:
        """Expect another request of the login."""
        self.drop(key)
        while self._ongoing and next(iter(self._ongoing.values())).is_over(now):
            self.drop(next(iter(self._ongoing)))
        if self._by_address[ongoing.address] >= MAX_ONGOING_PER_ADDRESS:
            self._drop_oldest_of(ongoing.address)
        elif len(self._ongoing) >= MAX_ONGOING:
            self._drop_oldest_of(self._by_address.most_common(1)[0][0])
        ongoing.touched = now
        self._ongoing[key] = ongoing
        self._by_address[ongoing.address] += 1

    def drop(self, key: str) -> None:
        """Expect no further request of this login."""
        found = self._ongoing.pop(key, None)
        if found is not None:
            self._by_address[found.address] -= 1
            if not self._by_address[found.address]:
                del self._by_address[found.address]

    def _drop_oldest_of(self, address: str) -> None:
        oldest = next((key for key, found in self._ongoing.items() if found.address == address), None)
        if oldest is not None:
            self.drop(oldest)


class Quota:
    """How many requests of logins are held, in all and for one address."""

    def __init__(self) -> None:
        self._by_address: Counter[str] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    @contextmanager
    def place(self, address: str, most: int) -> Iterator[None]:
        """Count one more until the block ends.

        Raises:
            Refused: there are too many.
        """
        if self._by_address[address] >= most:
            raise Refused(429, "TooManyLogins", "Too many logins from your address are under way. Please try again.", retry_after_s=5.0)
        if self._total >= MAX_AT_ONCE:
            raise Refused(503, "Busy", "Too many logins are under way. Please try again.", retry_after_s=5.0)
        self._by_address[address] += 1
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]
