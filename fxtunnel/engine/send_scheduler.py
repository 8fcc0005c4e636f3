"""Pure: the order in which streams send on a link: those that have little go before those that have much."""

from collections import deque
from contextlib import suppress
from typing import Final

from fxtunnel.engine.ports import StreamSender
from fxtunnel.protocol.frames import HEADER_BYTES

TURN_BYTES: Final = 262_144
"""What all senders together send in one turn of the loop, about."""
BULK_TURN_BYTES: Final = TURN_BYTES - HEADER_BYTES
"""What one that has much sends at once: read by one call, handed to TLS by one, and in one piece at the other end."""
CROWD: Final = 16
CROWDED_TURN_BYTES: Final = 65_536
"""What each sends at once while more than CROWD have much. Rounds are longer then, and what a socket waits with is the kernel's: with
256 KiB it grew the receive buffers of 99 services by 1 MiB each."""
SPARSE_BYTES: Final = 16_384
"""Who sends less than this in a turn, lately (`lately`), has little: keystrokes, requests, answers, the start of everything."""
SPARSE_TURN_BYTES: Final = 65_536
SPARSE_SHARE_BYTES: Final = TURN_BYTES // 4
"""So much of a turn belongs to those who have little, so that however many they are, the others go on."""

BESIDE_BYTES: Final = 196_608
"""Unacknowledged bytes of bulk beside a sender that has little, which waits behind them. The peer is asked to acknowledge each third."""
BESIDE_BYTES_PER_S: Final = 250_000_000
"""The rate that bulk keeps all the same: on a longer path, the bytes in flight at this rate are not queueing delay."""
BESIDE_TURN_BYTES: Final = 65_536
"""What each that has much sends at once beside somebody who has little."""
ALONE_BYTES: Final = 67_108_864
"""After this many bytes without a sender that has little, bulk counts as being alone."""


def lately(turn_bytes: int, count: int) -> int:
    """`StreamSender.turn_bytes` after a turn of `count` bytes: the most of the last turns, where one before counts half as much each.

    A short read in the middle of a download is no keystroke. After four of them in a row what follows is taken for one.
    """
    return max(count, turn_bytes >> 1)


def beside_bytes(ring_bytes: int, min_rtt_s: float) -> int:
    """What may be unacknowledged beside somebody who has little: at most half of the replay memory, on a path as long as that."""
    return min(ring_bytes >> 1, max(BESIDE_BYTES, int(min_rtt_s * BESIDE_BYTES_PER_S)))


class SendScheduler:
    """The senders that wait, in two queues, as new and old flows do in FQ-CoDel (RFC 8290, section 4.2).

    A client that types beside sixteen downloads waits for what is on the link already, not for a round of sixteen turns. So turns may be
    large, and bulk is cheap. Neither queue starves the other: the first has a quarter of each turn, and all that the second leaves.
    What is on the link already is kept short as well, but only while somebody is there who would wait for it.
    """

    __slots__ = ("_bulk", "_is_first", "_sparse", "_sparse_at", "waiting")

    def __init__(self) -> None:
        self._bulk: deque[StreamSender] = deque()
        self._sparse: deque[StreamSender] = deque()
        self._sparse_at = -ALONE_BYTES  # where in the sequence somebody last had little
        self._is_first = False  # whether who has the turn now went before the others
        self.waiting = 0
        """How many senders wait."""

    def want(self, sender: StreamSender) -> None:
        """It has bytes. It keeps itself from asking twice."""
        (self._sparse if sender.turn_bytes < SPARSE_BYTES else self._bulk).append(sender)
        self.waiting += 1

    def cancel(self, sender: StreamSender) -> None:
        """It wants its turn no more."""
        for queue in (self._sparse, self._bulk):
            with suppress(ValueError):
                queue.remove(sender)
                self.waiting -= 1

    def clear(self) -> None:
        """Nobody gets a turn any more."""
        self._sparse.clear()
        self._bulk.clear()
        self.waiting = 0

    def took(self, sender: StreamSender, head: int) -> None:
        """It had its turn, which ends at `head` of the sequence. What a stream that begins brings says whether it has little."""
        if self._is_first and sender.turn_bytes < SPARSE_BYTES:
            self._sparse_at = head

    def is_beside(self, head: int) -> bool:
        """Whether somebody who has little was there lately, at `head` of the sequence."""
        return head - self._sparse_at < ALONE_BYTES

    def next(self, filled_bytes: int, head: int, may_bytes: int) -> tuple[StreamSender, int] | None:
        """Who is next in a turn that has `filled_bytes` already, and how much it may write at `head` of the sequence.

        Call `took` after the turn. While somebody who has little was there lately, those who have much may send `may_bytes` together.
        None: they have done so, or nobody waits.
        """
        if self._sparse and (filled_bytes < SPARSE_SHARE_BYTES or not self._bulk):
            self._is_first = True
            self.waiting -= 1
            return self._sparse.popleft(), SPARSE_TURN_BYTES
        most = BULK_TURN_BYTES if len(self._bulk) <= CROWD else CROWDED_TURN_BYTES
        if self.is_beside(head):
            most = min(BESIDE_TURN_BYTES, may_bytes)
        if not self._bulk or most < SPARSE_BYTES:
            return None
        self._is_first = False
        self.waiting -= 1
        return self._bulk.popleft(), most
