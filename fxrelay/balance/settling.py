"""Pure: whether the store can be trusted to know who holds what: it may have forgotten, or nobody may have been able to renew anything.

All relays with reserved pools share one mark in the store and beat it every third of a lease. Whoever finds that it is gone, or belongs to
another epoch, knows that the store has forgotten: nothing is granted for one lease, in which those who hold something say so. Whoever finds
that nobody has beaten it for more than half a lease knows that the store was away (or that its clock was set): for one lease, logins that
were alive at the last beat count as alive.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Final

from fxrelay.cluster.content import MAX_MS

MAX_MARK_BYTES: Final = 4_096


@dataclass(frozen=True, slots=True)
class Mark:
    """`lost_ms`: when this epoch was first seen. `doubt_from_ms`, `doubt_ms`: the last beat before a gap, and when the gap was noticed."""

    epoch: str
    lost_ms: int
    beat_ms: int
    doubt_from_ms: int = 0
    doubt_ms: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a relay saw at `seen_ms` of the store's clock; good for a third of a lease."""

    mark: Mark
    seen_ms: int
    lease_ms: int

    def is_fresh(self, now_ms: int, epoch: str) -> bool:
        """Whether it is recent enough that nothing can have happened since."""
        return epoch == self.mark.epoch and abs(now_ms - self.seen_ms) <= self.lease_ms // 3

    def settles_in_ms(self, now_ms: int) -> int:
        """Milliseconds until something may be granted; 0: now."""
        return max(0, min(self.mark.lost_ms + self.lease_ms - now_ms, self.lease_ms))

    def horizon_ms(self, now_ms: int) -> int:
        """Logins that ended before this are dead."""
        mark = self.mark
        in_doubt = mark.doubt_ms and 0 <= now_ms - mark.doubt_ms < self.lease_ms
        return min(mark.doubt_from_ms, now_ms) if in_doubt else now_ms


def beat(mark: Mark | None, epoch: str, now_ms: int, lease_ms: int) -> Mark:
    """The mark after this relay has looked at it. Unchanged if somebody beat it a moment ago."""
    if mark is None or mark.epoch != epoch:
        return Mark(epoch, now_ms, now_ms)
    since_ms = now_ms - mark.beat_ms
    if 0 <= since_ms < lease_ms // 12:
        return mark
    if 0 <= since_ms <= lease_ms // 2:
        return replace(mark, beat_ms=now_ms)
    was_in_doubt = mark.doubt_ms and 0 <= mark.beat_ms - mark.doubt_ms < lease_ms
    doubt_from_ms = min(mark.doubt_from_ms, mark.beat_ms) if was_in_doubt else mark.beat_ms
    # A clock that was set back beyond the moment of loss: the time to wait begins again.
    return replace(mark, beat_ms=now_ms, doubt_from_ms=doubt_from_ms, doubt_ms=now_ms, lost_ms=min(mark.lost_ms, now_ms))


def encode_mark(mark: Mark) -> str:
    """As the store keeps it."""
    return json.dumps(
        {
            "v": 1,
            "epoch": mark.epoch,
            "lostMs": mark.lost_ms,
            "beatMs": mark.beat_ms,
            "doubtFromMs": mark.doubt_from_ms,
            "doubtMs": mark.doubt_ms,
        }
    )


def decode_mark(text: str) -> Mark | None:
    """The mark in a stored text; None if it is not one, which counts as a store that has forgotten."""
    if len(text) > MAX_MARK_BYTES:
        return None
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("v") != 1 or not isinstance(found.get("epoch"), str):
        return None
    times: list[Any] = [found.get(key) for key in ("lostMs", "beatMs", "doubtFromMs", "doubtMs")]
    if not all(type(value) is int and 0 <= value <= MAX_MS for value in times):
        return None
    return Mark(found["epoch"], *times)
