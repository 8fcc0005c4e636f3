"""Pure: how long the path to the peer is, by what its PONGs say."""

from collections import deque
from typing import Final

SAMPLES: Final = 16
CALM_BYTES: Final = 65_536
"""A round trip during which less than this passed, both ways together, tells how long the path is; any other can only show it shorter."""
MAX_S: Final = 60.0
"""A PONG that is older, or from the future, answers no PING of ours."""


class RoundTrips:
    """The shortest of the last `SAMPLES` round trips: one that bulk data did not lengthen."""

    __slots__ = ("_passed_before", "_samples", "shortest_s")

    def __init__(self) -> None:
        self.shortest_s = 0.0
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._passed_before = 0

    def began(self, passed_bytes: int) -> None:
        """A PING goes out; so many bytes have passed the link in its life, both ways."""
        self._passed_before = passed_bytes

    def ended(self, rtt_s: float, passed_bytes: int) -> None:
        """Its PONG is here."""
        if not 0 <= rtt_s < MAX_S:
            return
        # A window that fills the path makes every round trip longer: were it to forget how short one can be, it would grow for ever.
        is_calm = passed_bytes - self._passed_before < CALM_BYTES
        if is_calm or not self._samples or rtt_s < self.shortest_s:
            self._samples.append(max(rtt_s, 1e-6))
            self.shortest_s = min(self._samples)
