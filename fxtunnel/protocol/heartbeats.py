"""Pure: when a link's heartbeats are due, and what they tell: how long the path is, by PINGs and their PONGs, and whether bulk passes."""

from collections import deque
from typing import Final

SAMPLES: Final = 16
CALM_BYTES: Final = 65_536
"""A PING during which less than this passed, both ways together, tells how long the path is; any other can only show it shorter."""
BULK_BYTES: Final = 4_194_304
"""What passes from one heartbeat to the next on a link that carries bulk."""
IDLE_BYTES: Final = 512
"""Less than this passes from one heartbeat to the next where nothing passes but heartbeats."""
MAX_S: Final = 60.0
"""A PONG that is older, or from the future, answers no PING of ours."""
_SOON_S: Final = 0.001


class Heartbeats:
    """One link's. `passed_bytes` is always what has passed it in its life, both ways together."""

    __slots__ = ("_last_bytes", "_passed_before", "_round_trips", "min_rtt_s")

    def __init__(self) -> None:
        self.min_rtt_s = 0.0
        """The shortest of the last round trips that bulk did not lengthen; 0 before the first."""
        self._round_trips: deque[float] = deque(maxlen=SAMPLES)
        self._passed_before = 0
        self._last_bytes = 0

    def began(self, passed_bytes: int) -> None:
        """A PING goes out."""
        self._last_bytes = passed_bytes - self._passed_before
        self._passed_before = passed_bytes

    def answered(self, rtt_s: float, passed_bytes: int) -> None:
        """Its PONG is here."""
        if not 0 <= rtt_s < MAX_S:
            return
        # A window that fills the path makes every round trip longer: were it to forget how short one can be, it would grow for ever.
        is_calm = passed_bytes - self._passed_before < CALM_BYTES
        if is_calm or not self._round_trips or rtt_s < self.min_rtt_s:
            self._round_trips.append(max(rtt_s, 1e-6))
            self.min_rtt_s = min(self._round_trips)

    def is_idle(self, passed_bytes: int) -> bool:
        """Whether next to nothing passes, and did before the last PING."""
        return max(passed_bytes - self._passed_before, self._last_bytes) < IDLE_BYTES

    def is_bulk(self, passed_bytes: int) -> bool:
        """Whether bulk passes, or did before the last PING."""
        return max(passed_bytes - self._passed_before, self._last_bytes) >= BULK_BYTES


def next_beat(silent_s: float, heartbeat_s: float, dead_after_s: float, yield_s: float, *, is_idle: bool) -> tuple[bool, float]:
    """Whether a PING is due on a link on which nothing has arrived for `silent_s`, and when to ask next, in seconds.

    One that carries something tells every `heartbeat_s` how long its path is. One that is idle has only to be found dead in time: a PING
    and its PONG after half of `dead_after_s` are enough, and that for both ends if one of them yields to the other for `yield_s`.
    """
    quiet_s = max(heartbeat_s, dead_after_s / 2) + yield_s - silent_s
    if is_idle and quiet_s > _SOON_S:
        return False, min(heartbeat_s, quiet_s, dead_after_s - silent_s)
    return True, min(heartbeat_s, dead_after_s - silent_s)
