"""Task: the store of a cluster: a Redis that all members reach. Blocking: for worker threads.

    {NAMESPACE}:c:COLLECTION   hash of key -> "MS:TEXT", MS being the server's clock when it was written
    {NAMESPACE}:n              hash of counters
    {NAMESPACE}:v              hash of COLLECTION:KEY -> how often `update` has written it
    {NAMESPACE}:epoch          random text, kept where Redis loses nothing

An ACL for it: `~{NAMESPACE}:* &{NAMESPACE}:* +@hash +@string +@pubsub +@connection -@dangerous +eval +time +info`.
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Final

from redis.exceptions import ResponseError

from fxrelay.cluster.content import MAX_KEY_BYTES, decode_document, encode_amount, encode_collection, encode_key, encode_text
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Change, Document, Present, Update
from fxrelay.cluster.redis_batches import Batches
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_updates import STAMP_BYTES, STAMPED, Updates
from fxtunnel.errors import StoreError

PART: Final = 64
"""About as many documents come in one answer; of the longest ones these are 16 MiB."""
MAX_READ: Final = 1 << 20
"""Documents of one collection; what goes on after that is no collection of ours."""
_RUN_ID: Final = re.compile(rb"^run_id:([0-9a-f]{40})\r?$", re.MULTILINE)
_SYNCS: Final = ("always", "everysec", "no")
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
_INFO: Final = "return {redis.call('INFO', 'server'), redis.call('INFO', 'persistence'), redis.call('INFO', 'replication')}"


class RedisStore:
    """`Store` in a Redis 5 or later. `skipped`: documents read that no member of ours would have written."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self.skipped = 0
        self.doubt = ""
        self._updates = Updates(client, Batches(client), self._epoch_of)
        self._known_epoch: tuple[tuple[bytes, bytes], str] | None = None

    def epoch(self) -> str:
        """The run_id of the process that answers; a stored id where that process writes everything to disk before it answers (AOF, fsync
        always) and has no replica that could take its place with less. Raises StoreError.
        """
        server, persistence, replication = self._texts(self._script(_INFO, self._client.key("epoch")), 3)
        found = _RUN_ID.search(server)
        if found is None:
            raise self._not_ours("INFO without a run_id")
        has_log = b"aof_enabled:1" in persistence
        sync = self._sync() if has_log and self._client.is_one_server else ""
        forgets = not has_log or b"connected_slaves:0" not in replication or sync != "always"
        self.doubt = self._doubt(sync, has_log=has_log)
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
        found = self._script(_GET, self._collection(collection), name, MAX_DOCUMENT_BYTES + STAMP_BYTES)
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
        (result,) = self.update_all([Update(collection, key, change)])
        if isinstance(result, Exception):
            raise result
        return result

    def update_all(self, updates: Sequence[Update]) -> list[Present | Exception]:
        """See `Store`: many in one call of a script, and so in one write of Redis to its disk."""
        return self._updates.run(updates)

    def close(self) -> None:
        """End all connections."""
        self._client.close()

    def _documents(self, where: str) -> Iterator[Document]:
        # HSCAN may show an entry twice while the table grows or shrinks (redis.io/commands/scan, "Scan guarantees").
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            part = self._script(_READ, where, cursor, PART, MAX_KEY_BYTES, MAX_DOCUMENT_BYTES + STAMP_BYTES)
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
        stamped = STAMPED.fullmatch(value) if isinstance(value, bytes) else None
        document = decode_document(key, stamped[2], int(stamped[1])) if stamped is not None else None
        self.skipped += document is None
        return document

    def _collection(self, name: str) -> str:
        return self._client.key("c", encode_collection(name))

    def _script(self, script: str, key: str, *values: bytes | int) -> Any:
        return self._client.ask(lambda redis: redis.eval(script, 1, key, *values))

    def _epoch_of(self, run: bytes, stored: bytes) -> str | None:
        """The epoch of the process that was just seen; None if it has to be looked at again."""
        known = self._known_epoch
        if known is not None and known[0] == (run, stored):
            return known[1]
        self.epoch()
        return None

    def _clock(self, answer: object) -> int:
        (text,) = self._texts([answer], 1)
        if not text.isdigit() or len(text) > STAMP_BYTES - 1:
            raise self._not_ours("a clock that is no number")
        return int(text)

    def _sync(self) -> str:
        """When it writes its log to disk, as broker.json says, or itself; empty if nobody does."""
        if self._client.appendfsync:
            return self._client.appendfsync
        try:
            found = self._client.ask(lambda redis: redis.config_get("appendfsync"))
        except StoreError as exc:
            if not isinstance(exc.__cause__, ResponseError):
                raise  # no answer at all says nothing about the log: it must not look like a server that has forgotten
            return ""  # whoever may read this may read Redis's passwords too, so few may: then take it that something may be lost
        sync = found.get("appendfsync") if isinstance(found, dict) else None
        return next((known for known in _SYNCS if sync in (known, known.encode())), "")

    def _doubt(self, sync: str, *, has_log: bool) -> str:
        said = self._client.appendfsync
        if not has_log:
            though = f', though broker.json says "appendfsync": "{said}"' if said else ""
            return f"{self._client.name} keeps no append-only file{though}: when it restarts, it has forgotten who has which server"
        if not self._client.is_one_server or sync == "always":
            return ""
        if not sync:
            return (
                f"{self._client.name} may not be asked whether it writes to disk before it answers; where its appendfsync is always, "
                "say so in broker.json: until then each of its restarts counts as a loss of memory"
            )
        return f"{self._client.name} has appendfsync {sync}: when it restarts, it may have forgotten who was given a server last"

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
