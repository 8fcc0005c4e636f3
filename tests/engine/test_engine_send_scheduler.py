"""Who sends next on a link: those who have little before those who have much, and neither starves the other."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.engine.send_scheduler import (
    ALONE_BYTES,
    BESIDE_BYTES,
    BESIDE_TURN_BYTES,
    BULK_TURN_BYTES,
    CROWD,
    CROWDED_TURN_BYTES,
    SPARSE_BYTES,
    SPARSE_SHARE_BYTES,
    SPARSE_TURN_BYTES,
    TURN_BYTES,
    SendScheduler,
    beside_bytes,
    lately,
)

FREE = 1 << 30


@dataclass(eq=False)
class Taker:
    """Sends what it is allowed to, up to `each_bytes` at once."""

    each_bytes: int
    turn_bytes: int = 0
    sent_bytes: int = 0

    def read_turn(self, limit_bytes: int) -> int:
        count = min(limit_bytes, self.each_bytes)
        self.turn_bytes = lately(self.turn_bytes, count)
        self.sent_bytes += count
        return count


def one_turn(scheduler: SendScheduler, may_bytes: int = FREE, head: int = 0) -> int:
    """A turn as a session has it: who has sent wants the next one at once."""
    filled, again = 0, []
    while filled < TURN_BYTES and (chosen := scheduler.next(filled, head + filled, may_bytes - filled)) is not None:
        sender, most = chosen
        filled += sender.read_turn(most)
        scheduler.took(sender, head + filled)
        again.append(sender)
    for sender in again:
        scheduler.want(sender)
    return filled


def test_who_has_little_goes_before_who_has_much() -> None:
    scheduler, downloads, typist = SendScheduler(), [Taker(FREE) for _ in range(16)], Taker(64)
    for download in downloads:
        scheduler.want(download)
    for _ in range(16):
        one_turn(scheduler)  # by now it is known who they are
    scheduler.want(typist)
    one_turn(scheduler)
    assert typist.sent_bytes == 64


def test_bulk_is_sent_in_large_pieces_round_robin() -> None:
    scheduler, downloads = SendScheduler(), [Taker(FREE) for _ in range(4)]
    for download in downloads:
        scheduler.want(download)
    one_turn(scheduler)
    assert [download.turn_bytes for download in downloads] == [SPARSE_TURN_BYTES] * 4
    for _ in range(8):
        one_turn(scheduler, head=2 * ALONE_BYTES)
    assert [download.sent_bytes for download in downloads] == [SPARSE_TURN_BYTES + 4 * BULK_TURN_BYTES] * 4


@given(st.integers(1, 400), st.integers(1, SPARSE_BYTES - 1), st.integers(1, 20))
def test_neither_starves_the_other(typists: int, each_bytes: int, downloads: int) -> None:
    scheduler = SendScheduler()
    little, much = [Taker(each_bytes) for _ in range(typists)], [Taker(FREE, SPARSE_BYTES) for _ in range(downloads)]
    for sender in [*little, *much]:
        scheduler.want(sender)
    rounds = 2 * downloads + typists * SPARSE_BYTES // SPARSE_SHARE_BYTES + 2
    for _ in range(rounds):
        one_turn(scheduler)
    assert all(sender.sent_bytes >= BESIDE_TURN_BYTES for sender in much)
    assert all(sender.sent_bytes >= each_bytes for sender in little)
    assert scheduler.waiting == typists + downloads


def test_beside_somebody_who_types_bulk_keeps_the_link_short_and_alone_it_does_not() -> None:
    scheduler, download, typist = SendScheduler(), Taker(FREE, SPARSE_BYTES), Taker(64)
    scheduler.want(download)
    assert scheduler.next(0, 0, 0) == (download, BULK_TURN_BYTES), "nobody is there who would wait"
    assert not scheduler.is_beside(0)
    scheduler.want(download)
    scheduler.want(typist)
    assert scheduler.next(0, 0, 0) == (typist, SPARSE_TURN_BYTES)
    scheduler.took(typist, 7)
    assert scheduler.is_beside(7 + ALONE_BYTES - 1)
    assert scheduler.next(64, 71, SPARSE_BYTES - 1) is None
    assert scheduler.waiting == 1
    assert scheduler.next(64, 71, 50_000) == (download, 50_000)
    scheduler.want(download)
    assert scheduler.next(64, 7 + ALONE_BYTES - 1, FREE) == (download, BESIDE_TURN_BYTES)
    scheduler.want(download)
    assert not scheduler.is_beside(7 + ALONE_BYTES)
    assert scheduler.next(64, 7 + ALONE_BYTES, 0) == (download, BULK_TURN_BYTES), "the typist has left long ago"


@pytest.mark.parametrize(("first_bytes", "has_little"), [(FREE, False), (SPARSE_BYTES, False), (SPARSE_BYTES - 1, True), (64, True)])
def test_a_stream_that_begins_is_known_by_what_its_first_turn_brings(first_bytes: int, has_little: bool) -> None:
    scheduler, beginner = SendScheduler(), Taker(first_bytes)
    scheduler.want(beginner)
    one_turn(scheduler)
    assert scheduler.is_beside(0) is has_little


@pytest.mark.parametrize(
    ("ring_bytes", "min_rtt_s", "expected"),
    [
        (1 << 20, 0.0, BESIDE_BYTES),
        (1 << 20, 0.0004, BESIDE_BYTES),
        (1 << 20, 0.001, 250_000),
        (1 << 20, 0.05, 1 << 19),
        (1 << 24, 0.05, 1 << 23),
    ],
)
def test_a_long_path_holds_more(ring_bytes: int, min_rtt_s: float, expected: int) -> None:
    assert beside_bytes(ring_bytes, min_rtt_s) == expected


@pytest.mark.parametrize(("short_reads", "is_known"), [(1, False), (4, False), (5, True)])
def test_a_short_read_in_a_download_is_nobody_who_types(short_reads: int, is_known: bool) -> None:
    scheduler, download, other = SendScheduler(), Taker(FREE, turn_bytes=BULK_TURN_BYTES), Taker(FREE, turn_bytes=SPARSE_BYTES)
    download.each_bytes = 100
    for _ in range(short_reads):
        scheduler.want(download)
        one_turn(scheduler)
        scheduler.clear()
    scheduler.want(other)
    assert (scheduler.next(0, 0, 0) is None) is is_known


def test_who_is_cancelled_or_cleared_gets_no_turn() -> None:
    scheduler, download, typist = SendScheduler(), Taker(FREE, SPARSE_BYTES), Taker(64)
    scheduler.want(download)
    scheduler.want(typist)
    scheduler.cancel(download)
    scheduler.cancel(download)
    assert scheduler.waiting == 1
    assert scheduler.next(0, 0, FREE) == (typist, SPARSE_TURN_BYTES)
    assert scheduler.next(0, 0, FREE) is None
    scheduler.want(download)
    scheduler.clear()
    assert scheduler.next(0, 0, FREE) is None
    assert scheduler.waiting == 0


def test_in_a_crowd_each_sends_less_at_once() -> None:
    scheduler = SendScheduler()
    senders = [Taker(FREE, turn_bytes=SPARSE_BYTES) for _ in range(CROWD + 1)]
    for sender in senders:
        scheduler.want(sender)
    assert scheduler.next(0, 0, FREE) == (senders[0], CROWDED_TURN_BYTES)
    assert scheduler.next(0, 0, FREE) == (senders[1], BULK_TURN_BYTES)
