"""Pure: which tickets were used, until they are too old to be used again: in this relay's memory, and as documents of a store.

In a store they lie in BUCKETS documents, by the beginning of their ids. Each update leaves out what has expired, so nothing has to be
cleaned up and nothing grows beyond MAX_IN_BUCKET.
"""

import heapq
import json
import re
from typing import Final

MAX_HERE: Final = 65_536
BUCKET_CHARS: Final = 2
"""Of an id, in hexadecimal: 256 buckets."""
MAX_IN_BUCKET: Final = 512
"""With 256 of them 131,072 tickets, or 1,000 a second of two minutes; a full document is 25 KiB, changed in a millisecond or two."""
_ID: Final = re.compile(r"[0-9a-f]{32}")


class SpentHere:
    """This relay's own memory. When it is full it refuses: only those who may make tickets get this far."""

    def __init__(self, limit: int = MAX_HERE) -> None:
        self._limit = limit
        self._spent: set[str] = set()
        self._by_expiry: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._spent)

    def spend(self, use_id: str, expires_unix: float, now_unix: float) -> bool:
        """Whether the ticket had not been used; now it has. False as well when there is no room to remember it."""
        while self._by_expiry and self._by_expiry[0][0] < now_unix:
            self._spent.discard(heapq.heappop(self._by_expiry)[1])
        if use_id in self._spent or len(self._spent) >= self._limit:
            return False
        self._spent.add(use_id)
        heapq.heappush(self._by_expiry, (expires_unix, use_id))
        return True

    def give_back(self, use_id: str) -> None:
        """Its stream came to nothing: the ticket is as it was."""
        if use_id in self._spent:
            self._spent.discard(use_id)
            self._by_expiry = [entry for entry in self._by_expiry if entry[1] != use_id]
            heapq.heapify(self._by_expiry)


def bucket_of(use_id: str) -> str:
    """The key of the document in which a ticket is noted."""
    return use_id[:BUCKET_CHARS]


def spend_in(text: str | None, use_id: str, expires_ms: int, now_ms: int) -> str | None:
    """The document with that ticket; None if it is there already, or there is no room."""
    spent = read_bucket(text, now_ms)
    if use_id in spent or len(spent) >= MAX_IN_BUCKET:
        return None
    return json.dumps(spent | {use_id: expires_ms}, separators=(",", ":"))


def give_back_in(text: str | None, use_id: str, now_ms: int) -> str | None:
    """The document without that ticket; None if it was not there."""
    spent = read_bucket(text, now_ms)
    if spent.pop(use_id, None) is None:
        return None
    return json.dumps(spent, separators=(",", ":"))


def read_bucket(text: str | None, now_ms: int) -> dict[str, int]:
    """Ids and expiries that still count, of a document that anybody may have written who can reach the store."""
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    kept = [(use_id, ms) for use_id, ms in found.items() if type(ms) is int and ms >= now_ms and _ID.fullmatch(use_id)]
    return dict(kept[: MAX_IN_BUCKET + 1])
