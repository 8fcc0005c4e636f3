"""Pure: receive windows. How much a stream may be sent before its reader has taken anything, and how that grows.

Three kinds of memory are promised. A *first window* is promised to every stream, and shrinks in steps while many streams are open, so that
thousands of readers that never read cannot fill the memory. *Growth* goes to streams whose reader keeps up, from a budget of its own. The
kernels on the way take some bytes even if nobody reads: before a reader has taken more than that, growth may use only half of the budget.
What *rings* grow by is for sessions whose peer acknowledges late, because the path is long or because it lies.
"""

from typing import Final

from fxtunnel.protocol.frames import EARLY_BYTES

FIRST_WINDOW_BYTES: Final = 32_768
CROWDED_WINDOW_BYTES: Final = 8_192
SMALLEST_WINDOW_BYTES: Final = EARLY_BYTES
LOCAL_WINDOW_BYTES: Final = 1_048_576
"""How far a window grows on a short path: enough to keep both ends busy. Larger windows cost little less CPU and queue
interactive streams behind bulk ones (docs/adr/0004)."""
FAST_CONSUMPTION_S: Final = 1.0
"""On a short path a reader keeps up if it takes a whole window in less than this."""
MIN_GROWTH_RTT_S: Final = 0.002
"""Windows follow the path only when its minimum round trip is longer than this; without the floor, queueing delay that the window itself
causes would be taken for path length, and grow it for ever."""
PROOF_BYTES: Final = 131_072
"""What the kernels on the way may take for a reader that never reads: less than this does not show that somebody does."""
USEFUL_WINDOW_BYTES: Final = 262_144
"""The last quarter of the growth budget is reserved for windows up to this size, however long others keep the rest."""
_QUARTER: Final = 2
_HALF: Final = 1
"""Shifts: how much of a window is free when credit goes back. Half is enough where the path is short, and is half as many frames."""
FASTEST_GROWTH: Final = 4
"""How many times larger one round trip may make a window."""


class WindowBudget:
    """What one daemon has promised to buffer for its peers' streams, and to keep for their replay beyond the first size of rings."""

    __slots__ = ("_first_bytes", "_growth_bytes", "_rings_bytes", "grown_bytes", "promised_bytes", "rings_bytes")

    def __init__(self, memory_bytes: int) -> None:
        self._first_bytes = memory_bytes * 3 // 8
        self._growth_bytes = memory_bytes // 4
        self._rings_bytes = memory_bytes // 8
        self.promised_bytes = 0
        self.grown_bytes = 0
        self.rings_bytes = 0

    def take_first(self) -> int:
        """A first window for one more stream, or 0 when there is no memory left for it. Give it back with `release`."""
        promised = self.promised_bytes
        limit = self._first_bytes
        if promised + FIRST_WINDOW_BYTES <= limit >> 1:
            window = FIRST_WINDOW_BYTES
        elif promised + CROWDED_WINDOW_BYTES <= limit - (limit >> 2):
            window = CROWDED_WINDOW_BYTES
        elif promised + SMALLEST_WINDOW_BYTES <= limit:
            window = SMALLEST_WINDOW_BYTES
        else:
            return 0
        self.promised_bytes = promised + window
        return window

    def take_growth(self, wanted_bytes: int, window_bytes: int, taken_bytes: int) -> int:
        """Up to `wanted_bytes` more for a window of `window_bytes` whose reader keeps up, and has taken `taken_bytes` in its life.

        Without a proof there is the first half. With one there are three quarters, and all of it up to USEFUL_WINDOW_BYTES.
        """
        limit, grown = self._growth_bytes, self.grown_bytes
        if taken_bytes < PROOF_BYTES:
            granted = min(wanted_bytes, (limit >> 1) - grown)
        else:
            useful = min(wanted_bytes, USEFUL_WINDOW_BYTES - window_bytes, limit - grown)
            granted = max(useful, min(wanted_bytes, limit - (limit >> 2) - grown))
        if granted <= 0:
            return 0
        self.grown_bytes += granted
        return granted

    def take_ring(self, wanted_bytes: int) -> bool:
        """Whether a ring may grow by that much: by half of what is left at most, so that there is some for those who come later."""
        if wanted_bytes > (self._rings_bytes - self.rings_bytes) >> 1:
            return False
        self.rings_bytes += wanted_bytes
        return True

    def release_ring(self, grown_bytes: int) -> None:
        """A ring has let go of what it had grown by."""
        self.rings_bytes -= grown_bytes

    def release(self, first_bytes: int, grown_bytes: int) -> None:
        """A stream has ended."""
        self.promised_bytes -= first_bytes
        self.grown_bytes -= grown_bytes


class ReceiveWindow:
    """The receive side of one stream's credit.

    `first_bytes` is what OPEN or ACCEPT grants. `left_bytes` is what the peer may still send; going below zero is its fault
    (`flow-control`).
    """

    __slots__ = (
        "_budget",
        "_consumed",
        "_measured",
        "_part",
        "_since",
        "_taken",
        "_trip_bytes",
        "first_bytes",
        "left_bytes",
        "window_bytes",
    )

    def __init__(self, budget: WindowBudget, first_bytes: int) -> None:
        self._budget = budget
        self._consumed = 0
        self._measured = 0
        self._part = _QUARTER
        self._trip_bytes = 0
        self._since = 0.0
        self._taken = 0
        self.first_bytes = first_bytes
        self.window_bytes = first_bytes
        self.left_bytes = first_bytes

    def consumed(self, amount_bytes: int) -> bool:
        """The reader took that much. True when credit should go back (`grant`): a quarter of the window is free, half of a local one."""
        self._consumed += amount_bytes
        return self._consumed << self._part >= self.window_bytes

    def grant(self, now: float, min_rtt_s: float, max_window_bytes: int) -> int:
        """Credit to return, in bytes; the window grows on the way when the reader has kept up with a whole window of it."""
        amount = self._consumed
        self._consumed = 0
        self._measured += amount
        self._taken += amount
        if min_rtt_s > MIN_GROWTH_RTT_S:
            amount += self._follow_path(now, min_rtt_s, max_window_bytes)
        elif self._measured >= (window := self.window_bytes) and self._measured >= PROOF_BYTES:
            if (now - self._since) * window < FAST_CONSUMPTION_S * self._measured and window < LOCAL_WINDOW_BYTES:
                amount += self._grow(min(window, LOCAL_WINDOW_BYTES - window, max_window_bytes - window))
                self._part = _HALF if self.window_bytes == LOCAL_WINDOW_BYTES else _QUARTER
            self._measured = 0
            self._since = now
        self.left_bytes += amount
        return amount

    def _follow_path(self, now: float, min_rtt_s: float, max_window_bytes: int) -> int:
        """Growth towards twice what the reader takes in a round trip, looked at once in each: how the kernel sizes its own windows.

        What is measured is as old as the round trip, and on the way up the sender may have been held back by what the window was then. So
        what was added since the last look counts again and again (docs/adr/0004).
        """
        self._part = _QUARTER
        window = self.window_bytes
        elapsed_s = now - self._since if self._since else min_rtt_s
        if self._measured << 1 < window or elapsed_s < 0.9 * min_rtt_s:
            if not self._since:
                self._since = now - min_rtt_s
            return 0
        trip_bytes = int(self._measured * min_rtt_s / elapsed_s)
        wanted = 2 * trip_bytes + max(0, 4 * (trip_bytes - self._trip_bytes))
        self._trip_bytes = trip_bytes
        self._measured = 0
        self._since = now
        return self._grow(min(wanted, FASTEST_GROWTH * window, max_window_bytes) - window)

    def _grow(self, wanted_bytes: int) -> int:
        growth = self._budget.take_growth(wanted_bytes, self.window_bytes, self._taken) if wanted_bytes > 0 else 0
        self.window_bytes += growth
        return growth

    def returned(self, amount_bytes: int) -> None:
        """The reader gives back bytes that it took: they count as taken when they have left."""
        self._consumed -= amount_bytes

    def finish(self) -> None:
        """Nothing more will arrive: give the memory back, but for what the reader has not taken yet. That is given back by `close`."""
        unread = self.window_bytes - self.left_bytes - self._consumed
        kept = min(unread, self.first_bytes)
        self._budget.release(self.first_bytes - kept, self.window_bytes - self.first_bytes - (unread - kept))
        self.first_bytes, self.window_bytes = kept, unread

    def close(self) -> None:
        """Give the memory back. May be repeated."""
        self._budget.release(self.first_bytes, self.window_bytes - self.first_bytes)
        self.first_bytes = self.window_bytes = 0
