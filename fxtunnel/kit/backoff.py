"""Pure: how long to wait before trying again, so that a thousand relays cut off together do not come back together."""

import math
import random
from typing import Final

# A gateway may ask for a pause, but not talk a relay into staying away for good.
MAX_REQUESTED_S: Final = 300.0
# Beyond it 2**n would only overflow: the cap has long been reached.
_MAX_DOUBLINGS: Final = 32


class FullJitter:
    """Random waits below an upper end that doubles from `base_s` to `cap_s` with every failure."""

    def __init__(self, base_s: float = 0.25, cap_s: float = 30.0, *, rng: random.Random) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._rng = rng
        self._failures = 0

    def next_s(self, at_least_s: float = 0.0) -> float:
        """Seconds to wait after one more failure.

        `at_least_s` is what the other side asked for (300 s at most are honoured); the random part comes on top of it, since all
        who were turned away were told the same.
        """
        upper_s = min(self._cap_s, self._base_s * 2 ** min(self._failures, _MAX_DOUBLINGS))
        self._failures += 1
        requested_s = min(max(at_least_s, 0.0), MAX_REQUESTED_S) if not math.isnan(at_least_s) else 0.0
        return requested_s + self._rng.uniform(0.0, upper_s)

    def reset(self) -> None:
        """It worked: the next failure counts as the first."""
        self._failures = 0
