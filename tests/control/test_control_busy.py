"""The line before TLS: what is written is read again, and nothing else is taken for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.control.busy import BUSY_BYTES, RetryAfter, encode_busy, parse_busy

SECONDS = st.integers(0, 999_999).map(lambda ms: ms / 1000)


@given(SECONDS, SECONDS)
def test_what_is_said_is_heard(retry_after_s: float, spread_s: float) -> None:
    line = encode_busy(RetryAfter(retry_after_s, spread_s))
    assert len(line) <= BUSY_BYTES
    assert parse_busy(line) == RetryAfter(retry_after_s, spread_s)


def test_times_out_of_range_are_cut() -> None:
    assert parse_busy(encode_busy(RetryAfter(-1.0, 1e9))) == RetryAfter(0.0, 999.999)


@given(st.binary(max_size=64))
def test_other_bytes_are_no_appointment(data: bytes) -> None:
    assert parse_busy(data) is None


@pytest.mark.parametrize(
    "data",
    [b"fx-busy 1 2", b"fx-busy -1 2\n", b"fx-busy 1.5 2\n", b"fx-busy 1234567 2\n", b"fx-busy 1\n", b" fx-busy 1 2\n", b"\x16\x03\x03"],
)
def test_nearly_right_is_wrong(data: bytes) -> None:
    assert parse_busy(data) is None
