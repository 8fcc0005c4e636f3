"""Who sends next on a link: those who have little before those who have much, and neither starves the other."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.engine.turns import (
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
    Turns,
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


def one_turn(turns: Turns, may_bytes: int = FREE, head: int = 0) -> int:
    """A turn as a session has it: who has sent wants the next one at once."""
    filled, again = 0, []
    while filled < TURN_BYTES and (chosen := turns.next(filled, head + filled, may_bytes - filled)) is not None:
        taker, most = chosen
        filled += taker.read_turn(most)
        turns.took(taker, head + filled)
        again.append(taker)
    for taker in again:
        turns.want(taker)
    return filled


def test_who_has_little_goes_before_who_has_much() -> None:
    turns, downloads, typist = Turns(), [Taker(FREE) for _ in range(16)], Taker(64)
    for download in downloads:
        turns.want(download)
    for _ in range(16):
        one_turn(turns)  # by now it is known who they are
    turns.want(typist)
    one_turn(turns)
    assert typist.sent_bytes == 64


def test_bulk_is_sent_in_large_pieces_round_robin() -> None:
    turns, downloads = Turns(), [Taker(FREE) for _ in range(4)]
    for download in downloads:
        turns.want(download)
    one_turn(turns)
    assert [download.turn_bytes for download in downloads] == [SPARSE_TURN_BYTES] * 4
    for _ in range(8):
        one_turn(turns, head=2 * ALONE_BYTES)
    assert [download.sent_bytes for download in downloads] == [SPARSE_TURN_BYTES + 4 * BULK_TURN_BYTES] * 4


@given(st.integers(1, 400), st.integers(1, SPARSE_BYTES - 1), st.integers(1, 20))
def test_neither_starves_the_other(typists: int, each_bytes: int, downloads: int) -> None:
    turns = Turns()
    little, much = [Taker(each_bytes) for _ in range(typists)], [Taker(FREE, SPARSE_BYTES) for _ in range(downloads)]
    for taker in [*little, *much]:
        turns.want(taker)
    rounds = 2 * downloads + typists * SPARSE_BYTES // SPARSE_SHARE_BYTES + 2
    for _ in range(rounds):
        one_turn(turns)
    assert all(taker.sent_bytes >= BESIDE_TURN_BYTES for taker in much)
    assert all(taker.sent_bytes >= each_bytes for taker in little)
    assert turns.waiting == typists + downloads


def test_beside_somebody_who_types_bulk_keeps_the_link_short_and_alone_it_does_not() -> None:
    turns, download, typist = Turns(), Taker(FREE, SPARSE_BYTES), Taker(64)
    turns.want(download)
    assert turns.next(0, 0, 0) == (download, BULK_TURN_BYTES), "nobody is there who would wait"
    assert not turns.is_beside(0)
    turns.want(download)
    turns.want(typist)
    assert turns.next(0, 0, 0) == (typist, SPARSE_TURN_BYTES)
    turns.took(typist, 7)
    assert turns.is_beside(7 + ALONE_BYTES - 1)
    assert turns.next(64, 71, SPARSE_BYTES - 1) is None
    assert turns.waiting == 1
    assert turns.next(64, 71, 50_000) == (download, 50_000)
    turns.want(download)
    assert turns.next(64, 7 + ALONE_BYTES - 1, FREE) == (download, BESIDE_TURN_BYTES)
    turns.want(download)
    assert not turns.is_beside(7 + ALONE_BYTES)
    assert turns.next(64, 7 + ALONE_BYTES, 0) == (download, BULK_TURN_BYTES), "the typist has left long ago"


@pytest.mark.parametrize(("first_bytes", "has_little"), [(FREE, False), (SPARSE_BYTES, False), (SPARSE_BYTES - 1, True), (64, True)])
def test_a_stream_that_begins_is_known_by_what_its_first_turn_brings(first_bytes: int, has_little: bool) -> None:
    turns, beginner = Turns(), Taker(first_bytes)
    turns.want(beginner)
    one_turn(turns)
    assert turns.is_beside(0) is has_little


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
    turns, download, other = Turns(), Taker(FREE, turn_bytes=BULK_TURN_BYTES), Taker(FREE, turn_bytes=SPARSE_BYTES)
    download.each_bytes = 100
    for _ in range(short_reads):
        turns.want(download)
        one_turn(turns)
        turns.clear()
    turns.want(other)
    assert (turns.next(0, 0, 0) is None) is is_known


def test_who_is_cancelled_or_cleared_gets_no_turn() -> None:
    turns, download, typist = Turns(), Taker(FREE, SPARSE_BYTES), Taker(64)
    turns.want(download)
    turns.want(typist)
    turns.cancel(download)
    turns.cancel(download)
    assert turns.waiting == 1
    assert turns.next(0, 0, FREE) == (typist, SPARSE_TURN_BYTES)
    assert turns.next(0, 0, FREE) is None
    turns.want(download)
    turns.clear()
    assert turns.next(0, 0, FREE) is None
    assert turns.waiting == 0


def test_in_a_crowd_each_sends_less_at_once() -> None:
    turns = Turns()
    takers = [Taker(FREE, turn_bytes=SPARSE_BYTES) for _ in range(CROWD + 1)]
    for taker in takers:
        turns.want(taker)
    assert turns.next(0, 0, FREE) == (takers[0], CROWDED_TURN_BYTES)
    assert turns.next(0, 0, FREE) == (takers[1], BULK_TURN_BYTES)
