"""Bytes that wait leave in the order they came in, whatever pieces they came in."""

from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.protocol.byte_queue import PIECE_BYTES, ByteQueue

STEPS = st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 60)), max_size=40)


@given(STEPS, st.integers(1, 3_000))
def test_what_goes_in_comes_out(steps: list[tuple[bytes, int]], times: int) -> None:
    queue, came, went = ByteQueue(), bytearray(), bytearray()
    for data, take in steps:
        queue.append(memoryview(data * times))
        came += data * times
        if queue:
            first = bytes(queue.first)
            count = min(len(first), take * times)
            went += first[:count]
            queue.left(count)
        assert len(queue) == len(came) - len(went)
        assert bool(queue) == (went != came)
        assert went + queue.joined() == came


def test_the_front_never_becomes_shorter_by_what_arrives() -> None:
    # SSL_write(3): a write that was put off has to be repeated with the same bytes in front, and no fewer of them.
    queue = ByteQueue(b"a" * 100)
    for size in (1, PIECE_BYTES, 5, 3 * PIECE_BYTES):
        before = bytes(queue.first)
        queue.append(b"b" * size)
        assert bytes(queue.first[: len(before)]) == before


def test_bytes_that_come_one_by_one_share_pieces() -> None:
    queue = ByteQueue()
    for _ in range(3 * PIECE_BYTES):
        queue.append(b"x")
    assert len(queue._pieces) == 3


def test_what_waits_is_not_copied_again() -> None:
    queue = ByteQueue(b"a" * (PIECE_BYTES - 10))
    queue.append(b"b" * 10)
    assert [len(piece) for piece in queue._pieces] == [PIECE_BYTES]
    queue.append(b"c")
    queue.append(b"d" * PIECE_BYTES)
    assert [len(piece) for piece in queue._pieces] == [PIECE_BYTES, 1, PIECE_BYTES]


def test_what_leaves_leaves_from_the_front() -> None:
    queue = ByteQueue(b"a" * PIECE_BYTES)
    queue.append(b"bc")
    queue.left(PIECE_BYTES - 1)
    assert queue.joined() == b"abc"
    queue.left(1)
    assert queue.first == b"bc"
    queue.left(1)
    assert queue.first == queue.joined() == b"c"
