"""Pure: the line that a busy gateway sends in place of TLS, to tell a peer when to come again (PROTOCOL.md, 1)."""

import re
from dataclasses import dataclass
from typing import Final

BUSY_BYTES: Final = 32
"""The longest such line."""
_LINE: Final = re.compile(rb"fx-busy (\d{1,6}) (\d{1,6})\n")
_MOST_MS: Final = 999_999


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """When to come again: after `retry_after_s`, and a random part of `spread_s` more. Nobody has signed it: believe it within bounds."""

    retry_after_s: float
    spread_s: float


def encode_busy(retry_after: RetryAfter) -> bytes:
    """The line: `fx-busy`, both times in milliseconds, LF."""
    return b"fx-busy %d %d\n" % tuple(min(max(round(s * 1000), 0), _MOST_MS) for s in (retry_after.retry_after_s, retry_after.spread_s))


def parse_busy(data: bytes) -> RetryAfter | None:
    """The time to come again with which `data` begins; None if it is anything else, TLS for example."""
    found = _LINE.match(data)
    return RetryAfter(int(found[1]) / 1000, int(found[2]) / 1000) if found else None
