"""Pure: which connections have waited too long, and on which nothing has moved for too long."""

import sys
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

T = TypeVar("T")


class Moving(Protocol):
    """What bytes move through. Two of its fields are for `idle`."""

    last_bytes: int
    moved_at: float

    @property
    def moved_bytes(self) -> int:
        """So far, both ways."""


M = TypeVar("M", bound=Moving)


def overdue(waiting: Mapping[T, float], oldest: float, limit: int = sys.maxsize) -> list[T]:
    """The entries from before `oldest`, at most `limit` of them. The mapping must be in order of time."""
    found: list[T] = []
    for entry, since in waiting.items():
        if since > oldest or len(found) == limit:
            break
        found.append(entry)
    return found


def idle(those: Iterable[M], now: float, idle_s: float) -> list[M]:
    """Those on which nothing has moved for longer than `idle_s`. Compares with the previous call: call every few seconds."""
    found: list[M] = []
    for one in those:
        moved = one.moved_bytes
        if moved != one.last_bytes:
            one.last_bytes, one.moved_at = moved, now
        elif now - one.moved_at > idle_s:
            found.append(one)
    return found
