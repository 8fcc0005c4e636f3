"""Pure: how fast relays that arrive are dealt with, as measured; and when those who are turned away should come again."""

from typing import Final

from fxtunnel.control.busy import RetryAfter

FIRST_GAP_S: Final = 0.005
"""Assumed until something has been measured: about the CPU time that one relay takes to arrive."""
_LEAST_GAP_S: Final = 0.0005
_MOST_GAP_S: Final = 0.5
_WEIGHT: Final = 1 / 32
TURNS_A_RELAY: Final = 2
"""A control link and a data link."""
LEAST_S: Final = 0.25
MOST_S: Final = 15.0
"""Longest wait that is asked for. Beyond it all come in the second half of this time, at random."""


class RetrySpacing:
    """Gives each peer that is turned away a time of its own, spaced as fast as arrivals were dealt with lately.

    Times are monotonic seconds. A crowd of strangers that never comes again costs the others MOST_S at most.
    """

    __slots__ = ("_booked_until", "_gap_s", "_last", "_was_crowded")

    def __init__(self) -> None:
        self._gap_s = FIRST_GAP_S
        self._last = 0.0
        self._was_crowded = False
        self._booked_until = 0.0

    @property
    def gap_s(self) -> float:
        """Seconds from one turn's end to the next, while others waited."""
        return self._gap_s

    def note_done(self, now: float, *, is_crowded: bool) -> None:
        """A turn has ended, well or not. `is_crowded`: others wait, so the time until the next turn ends is a measure of our speed."""
        if self._was_crowded:
            gap_s = min(max(now - self._last, 0.0), _MOST_GAP_S)
            self._gap_s = max(_LEAST_GAP_S, self._gap_s + (gap_s - self._gap_s) * _WEIGHT)
        self._last, self._was_crowded = now, is_crowded

    def wait_s(self, waiting: int) -> float:
        """How long a peer with `waiting` others ahead of it would wait, in seconds."""
        return waiting * self._gap_s

    def book(self, now: float, waiting: int) -> RetryAfter:
        """The next free time behind those who wait here and those who have been given a time before."""
        at = max(self._booked_until, now + max(LEAST_S, self.wait_s(waiting)))
        if at - now > MOST_S:
            return RetryAfter(MOST_S / 2, MOST_S / 2)
        self._booked_until = at + TURNS_A_RELAY * self._gap_s
        return RetryAfter(at - now, max(LEAST_S, (at - now) / 4))
