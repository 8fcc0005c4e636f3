"""Task: the store of a cluster: a Redis that all members reach. Blocking: for worker threads.

    {NAMESPACE}:c:COLLECTION   hash of key -> "MS:TEXT", MS being the server's clock when it was written
    {NAMESPACE}:n              hash of counters
    {NAMESPACE}:v              hash of COLLECTION:KEY -> how often `update` has written it
    {NAMESPACE}:epoch          random text, kept where Redis loses nothing

An ACL for it: `~{NAMESPACE}:* &{NAMESPACE}:* +@hash +@string +@pubsub +@connection +eval +time +info +config|get`.
"""

import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from fxrelay.cluster.content import MAX_KEY_BYTES, decode_document, encode_amount, encode_collection, encode_key, encode_text
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Change, Document, Present
from fxrelay.cluster.redis_batches import Batches
from fxrelay.cluster.redis_client import RedisClient
from fxtunnel.errors import StoreError

PART: Final = 64
"""About as many documents come in one answer; of the longest ones these are 16 MiB."""
MAX_READ: Final = 1 << 20
"""Documents of one collection; what goes on after that is no collection of ours."""
_STAMP_BYTES: Final = 17
_STAMPED: Final = re.compile(rb"(\d{1,16}):(.*)", re.DOTALL)
_RUN_ID: Final = re.compile(rb"^run_id:([0-9a-f]{40})\r?$", re.MULTILINE)
_EPOCH: Final = re.compile(rb"[0-9a-f]{32}")

_CLOCK: Final = """
local time = redis.call('TIME')
local ms = string.format('%d%03d', time[1], math.floor(time[2] / 1000))
"""
_NOW: Final = f"{_CLOCK} return ms"
_PUT: Final = f"{_CLOCK} redis.call('HSET', KEYS[1], ARGV[1], ms .. ':' .. ARGV[2]) return ms"
_DELETE_SAME: Final = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
"""
_GET: Final = """
if redis.call('HSTRLEN', KEYS[1], ARGV[1]) > tonumber(ARGV[2]) then return 1 end
return redis.call('HGET', KEYS[1], ARGV[1])
"""
# What is too long is left out on the server: it must not fill the memory of those who read.
_READ: Final = """
local found = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local kept, skipped = {}, 0
for i = 1, #found[2], 2 do
  if #found[2][i] <= tonumber(ARGV[3]) and #found[2][i + 1] <= tonumber(ARGV[4]) then
    kept[#kept + 1] = found[2][i]
    kept[#kept + 1] = found[2][i + 1]
  else
    skipped = skipped + 1
  end
end
return {found[1], skipped, kept}
"""
# `update` is optimistic: what was read goes back with what shall be written, and counts only if nothing has changed. So the rule itself is
# in Python only. The run_id is compared too, since a server that was started again may have forgotten what was read; and the clock, since
# one that was stopped does later what it was asked before, when whoever asked has given up.
_LOOK: Final = f"""
{_CLOCK}
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or ''
local seen = {{ms, run, redis.call('GET', KEYS[3]) or '', redis.call('HGET', KEYS[2], ARGV[2]) or '0', ''}}
if redis.call('HSTRLEN', KEYS[1], ARGV[1]) > tonumber(ARGV[3]) then seen[5] = '-' return seen end
seen[5] = redis.call('HGET', KEYS[1], ARGV[1]) or ''
"""
_SEE: Final = f"{_LOOK} return seen"
_SWAP: Final = f"""
{_LOOK}
if run ~= ARGV[4] or seen[3] ~= ARGV[5] or seen[4] ~= ARGV[6] or seen[5] ~= ARGV[7] then return seen end
local late = tonumber(ms) - tonumber(ARGV[9])
if late < 0 or late > 2000 then return seen end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[8])
redis.call('HINCRBY', KEYS[2], ARGV[2], 1)
return 1
"""
MAX_TRIES: Final = 64
"""Of one `update` among others that are quicker."""
MAX_GUESSES: Final = 4_096
MAX_GUESS_BYTES: Final = 2_048
_INFO: Final = "return {redis.call('INFO', 'server'), redis.call('INFO', 'persistence'), redis.call('INFO', 'replication')}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What `update` has read, and the server's clock at monotonic second `at`."""

    clock_ms: int
    at: float
    run: bytes
    stored: bytes
    version: bytes
    value: bytes


class RedisStore:
    """`Store` in a Redis 5 or later. `skipped`: documents read that no member of ours would have written."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._batches = Batches(client)
        self.skipped = 0
        self._last: dict[tuple[str, bytes], _Seen] = {}
        self._known_epoch: tuple[tuple[bytes, bytes], str] | None = None

    def epoch(self) -> str:
        """The run_id of the process that answers; a stored id where that process writes everything to disk before it answers (AOF, fsync
        always) and has no replica that could take its place with less. Raises StoreError.
        """
        server, persistence, replication = self._texts(self._script(_INFO, self._client.key("epoch")), 3)
        found = _RUN_ID.search(server)
        if found is None:
            raise self._not_ours("INFO without a run_id")
        forgets = b"aof_enabled:1" not in persistence or b"connected_slaves:0" not in replication or not self._syncs_always()
        stored = self._stored_epoch()  # even where nothing outlives the process: it is gone after FLUSHALL, which the run_id outlives
        epoch = f"run-{found[1].decode()}-{stored}" if forgets else f"kept-{stored}"
        self._known_epoch = ((found[1], stored.encode()), epoch)
        return epoch

    def now_ms(self) -> int:
        """The server's clock. Raises StoreError."""
        return self._clock(self._script(_NOW, self._client.key("n")))

    def put(self, collection: str, key: str, text: str) -> int:
        """Write a document with the server's time, in one step. Raises StoreError: it may or may not be written."""
        return self._clock(self._script(_PUT, self._collection(collection), encode_key(key), encode_text(text)))

    def get(self, collection: str, key: str) -> Document | None:
        """One document; None as well for what is too long or was not written by `put`. Raises StoreError."""
        name = encode_key(key)
        found = self._script(_GET, self._collection(collection), name, MAX_DOCUMENT_BYTES + _STAMP_BYTES)
        return self._document(name, found) if found is not None else None

    def delete(self, collection: str, key: str) -> None:
        """Remove a document. Raises StoreError."""
        where, name = self._collection(collection), encode_key(key)
        self._client.ask(lambda redis: redis.hdel(where, name))

    def delete_if_same(self, collection: str, document: Document) -> bool:
        """Remove what was read, unless it was written again. Raises StoreError: it may or may not be removed."""
        where, name, text = self._collection(collection), encode_key(document.key), encode_text(document.text)
        return bool(self._script(_DELETE_SAME, where, name, b"%d:%b" % (document.updated_ms, text)) == 1)

    def documents(self, collection: str) -> Iterator[Document]:
        """All documents, each once. Raises StoreError, at any step."""
        return self._documents(self._collection(collection))

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter. Raises StoreError: it may or may not be added."""
        name, change = encode_key(counter), encode_amount(amount)
        value = self._client.ask(lambda redis: redis.hincrby(self._client.key("n"), name, change))
        if type(value) is not int:
            raise self._not_ours("a counter that is no number")
        return value

    def update(self, collection: str, key: str, change: Change) -> Present:
        """Look, decide, and write if nothing has changed meanwhile; else again. Raises StoreError: it may or may not be written."""
        name = encode_key(key)
        keys = [self._collection(collection), self._client.key("v"), self._client.key("epoch")]
        what: list[bytes | int] = [name, collection.encode() + b":" + name, MAX_DOCUMENT_BYTES + _STAMP_BYTES]
        guess = self._guess((collection, name))
        seen = guess or self._see(keys, what)
        for _ in range(MAX_TRIES):
            is_guess = seen is guess
            epoch = self._epoch_of(seen.run, seen.stored)
            if epoch is None:
                seen = self._see(keys, what)
                continue
            number = self._clock(seen.version)
            present = Present(self._text_of(name, seen.value), number + 1, seen.clock_ms, epoch)
            try:
                text = change(present)
            except Exception:
                if not is_guess:
                    raise
                text = None
            if text is None and is_guess:
                seen = self._see(keys, what)
                continue
            if text is None:
                return replace(present, number=number)
            body = b"%d:%b" % (present.now_ms, encode_text(text))
            answer = self._eval(_SWAP, keys, [*what, seen.run, seen.stored, seen.version, seen.value, body, seen.clock_ms])
            if answer == 1:
                self._remember((collection, name), replace(seen, version=b"%d" % (number + 1), value=body))
                return replace(present, text=text)
            seen = self._seen(answer)
        raise StoreError(f"{self._client.name}: {collection} {key[:80]!r} was changed by others {MAX_TRIES} times at once")

    def close(self) -> None:
        """End all connections."""
        self._client.close()

    def _documents(self, where: str) -> Iterator[Document]:
        # HSCAN may show an entry twice while the table grows or shrinks (redis.io/commands/scan, "Scan guarantees").
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            part = self._script(_READ, where, cursor, PART, MAX_KEY_BYTES, MAX_DOCUMENT_BYTES + _STAMP_BYTES)
            if not (isinstance(part, list) and len(part) == 3 and isinstance(part[0], bytes) and isinstance(part[2], list)):
                raise self._not_ours("a strange answer to HSCAN")
            cursor = part[0]
            self.skipped += part[1] if type(part[1]) is int else 0
            for key, value in zip(part[2][::2], part[2][1::2], strict=False):
                if isinstance(key, bytes) and key not in seen:
                    seen.add(key)
                    document = self._document(key, value)
                    if document is not None:
                        yield document
            if cursor == b"0":
                return
            if len(seen) > MAX_READ:
                raise self._not_ours(f"more than {MAX_READ} documents in {where}")

    def _document(self, key: bytes, value: object) -> Document | None:
        stamped = _STAMPED.fullmatch(value) if isinstance(value, bytes) else None
        document = decode_document(key, stamped[2], int(stamped[1])) if stamped is not None else None
        self.skipped += document is None
        return document

    def _collection(self, name: str) -> str:
        return self._client.key("c", encode_collection(name))

    def _script(self, script: str, key: str, *values: bytes | int) -> Any:
        return self._client.ask(lambda redis: redis.eval(script, 1, key, *values))

    def _eval(self, script: str, keys: list[str], values: list[bytes | int]) -> Any:
        return self._batches.eval(script, keys, values)

    def _see(self, keys: list[str], what: list[bytes | int]) -> "_Seen":
        return self._seen(self._eval(_SEE, keys, what))

    def _seen(self, answer: object) -> "_Seen":
        clock, run, stored, version, value = self._texts(answer, 5)
        return _Seen(self._clock(clock), time.monotonic(), run, stored, version, value)

    def _guess(self, what: tuple[str, bytes]) -> "_Seen | None":
        """What is there if nobody else has written since we did: it saves one of two round trips where that is so. The clock is a little
        behind the server's.
        """
        known = self._last.get(what)
        if known is None:
            return None
        now = time.monotonic()
        return replace(known, clock_ms=known.clock_ms + max(0, int((now - known.at) * 1000) - 2), at=now)

    def _remember(self, what: tuple[str, bytes], seen: "_Seen") -> None:
        if len(self._last) >= MAX_GUESSES:
            self._last.clear()
        if len(seen.value) <= MAX_GUESS_BYTES:
            self._last[what] = seen

    def _epoch_of(self, run: bytes, stored: bytes) -> str | None:
        """The epoch of the process that was just seen; None if it has to be looked at again."""
        known = self._known_epoch
        if known is not None and known[0] == (run, stored):
            return known[1]
        self.epoch()
        return None

    def _text_of(self, key: bytes, value: bytes) -> str | None:
        if not value:
            return None
        document = self._document(key, value)
        if document is None:
            raise self._not_ours(f"something that no member has written as {key[:80]!r}")
        return document.text

    def _clock(self, answer: object) -> int:
        (text,) = self._texts([answer], 1)
        if not text.isdigit() or len(text) > _STAMP_BYTES - 1:
            raise self._not_ours("a clock that is no number")
        return int(text)

    def _syncs_always(self) -> bool:
        try:
            found = self._client.ask(lambda redis: redis.config_get("appendfsync"))
        except StoreError:
            return False  # this user may not ask: then take it that something may be lost
        return isinstance(found, dict) and found.get("appendfsync") in ("always", b"always") and self._client.is_one_server

    def _stored_epoch(self) -> str:
        key = self._client.key("epoch")
        self._client.ask(lambda redis: redis.set(key, secrets.token_hex(16), nx=True))
        (found,) = self._texts([self._client.ask(lambda redis: redis.get(key))], 1)
        if not _EPOCH.fullmatch(found):
            raise self._not_ours(f"something that is no epoch in {key}")
        return found.decode()

    def _texts(self, answer: object, count: int) -> list[bytes]:
        if not isinstance(answer, list) or len(answer) != count or not all(isinstance(text, bytes) for text in answer):
            raise self._not_ours("an answer of another kind than was asked for")
        return answer

    def _not_ours(self, what: str) -> StoreError:
        return StoreError(f"{self._client.name}: holds or says something that is not ours: {what}")
