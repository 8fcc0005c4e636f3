"""Bytes that wait leave in the order they came in, whatever pieces they came in."""

from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.protocol.pieces import PIECE_BYTES, Pieces

STEPS = st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 60)), max_size=40)


@given(STEPS, st.integers(1, 3_000))
def test_what_goes_in_comes_out(steps: list[tuple[bytes, int]], times: int) -> None:
    pieces, came, went = Pieces(), bytearray(), bytearray()
    for data, take in steps:
        pieces.append(memoryview(data * times))
        came += data * times
        if pieces:
            first = bytes(pieces.first)
            count = min(len(first), take * times)
            went += first[:count]
            pieces.left(count)
        assert len(pieces) == len(came) - len(went)
        assert bool(pieces) == (went != came)
        assert went + pieces.joined() == came


def test_the_front_never_becomes_shorter_by_what_arrives() -> None:
    # SSL_write(3): a write that was put off has to be repeated with the same bytes in front, and no fewer of them.
    pieces = Pieces(b"a" * 100)
    for size in (1, PIECE_BYTES, 5, 3 * PIECE_BYTES):
        before = bytes(pieces.first)
        pieces.append(b"b" * size)
        assert bytes(pieces.first[: len(before)]) == before


def test_bytes_that_come_one_by_one_share_pieces() -> None:
    pieces = Pieces()
    for _ in range(3 * PIECE_BYTES):
        pieces.append(b"x")
    assert len(pieces._pieces) == 3


def test_what_waits_is_not_copied_again() -> None:
    pieces = Pieces(b"a" * (PIECE_BYTES - 10))
    pieces.append(b"b" * 10)
    assert [len(piece) for piece in pieces._pieces] == [PIECE_BYTES]
    pieces.append(b"c")
    pieces.append(b"d" * PIECE_BYTES)
    assert [len(piece) for piece in pieces._pieces] == [PIECE_BYTES, 1, PIECE_BYTES]


def test_what_leaves_leaves_from_the_front() -> None:
    pieces = Pieces(b"a" * PIECE_BYTES)
    pieces.append(b"bc")
    pieces.left(PIECE_BYTES - 1)
    assert pieces.joined() == b"abc"
    pieces.left(1)
    assert pieces.first == b"bc"
    pieces.left(1)
    assert pieces.first == pieces.joined() == b"c"
