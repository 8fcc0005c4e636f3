"""Pure: how many streams of a service a user, or an address, has at this relay."""

from collections import Counter
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """At most so many streams of one service at once; 0: no limit."""

    per_user: int = 0
    per_address: int = 0


NO_LIMITS: Final = StreamLimits()


class Quotas:
    """Counts of one relay. A place that was taken must be given back."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, key: tuple[str, str, str], most: int) -> bool:
        """Take a place, if there is one. `key` is the service, what is counted, and who."""
        if most and self._counts[key] >= most:
            return False
        self._counts[key] += 1
        return True

    def give_back(self, key: tuple[str, str, str]) -> None:
        """The stream has ended."""
        self._counts[key] -= 1
        if self._counts[key] <= 0:
            del self._counts[key]
