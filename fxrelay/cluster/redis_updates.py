"""Task: updates of documents in a Redis, many in one script call, each a step by itself. Blocking: for worker threads.

`update` is optimistic: what was read goes back with what shall be written, and counts only if nothing has changed. So the rule itself is
in Python only. The run_id is compared too, since a server that was started again may have forgotten what was read; and the clock, since
one that was stopped does later what it was asked before, when whoever asked has given up.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fxrelay.cluster.content import decode_document, encode_collection, encode_key, encode_text
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Both, Present, Update
from fxrelay.cluster.redis_batches import Batches
from fxrelay.cluster.redis_client import RedisClient
from fxtunnel.errors import StoreError

STAMP_BYTES: Final = 17
STAMPED: Final = re.compile(rb"(\d{1,16}):(.*)", re.DOTALL)
MAX_TRIES: Final = 64
"""Of one `update` among others that are quicker."""
MAX_AT_ONCE: Final = 64
"""Updates in one call of the script."""
MAX_GUESSES: Final = 4_096
MAX_GUESS_BYTES: Final = 2_048
_ONLY_LOOK: Final = b"-"
"""In the place of the run_id: no server has this one."""
# KEYS: versions, epoch; then the hashes of each update's two documents. ARGV: the most bytes; then of each update: the names of document,
# version and second document; run_id, epoch, version, document and second document as they were read; both as they shall be; the clock
# as it was read.
_SCRIPT: Final = """
local time = redis.call('TIME')
local ms = string.format('%d%03d', time[1], math.floor(time[2] / 1000))
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or ''
local epoch = redis.call('GET', KEYS[2]) or ''
local most = tonumber(ARGV[1])
local function value(hash, name)
  if redis.call('HSTRLEN', hash, name) > most then return '-' end
  return redis.call('HGET', hash, name) or ''
end
local answers = {}
for i = 1, (#ARGV - 1) / 11 do
  local hash, second, a = KEYS[2 * i + 1], KEYS[2 * i + 2], 11 * i - 10
  local name, counter, beside = ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]
  local version = redis.call('HGET', KEYS[1], counter) or '0'
  local found, also = value(hash, name), ''
  if beside ~= '' then also = value(second, beside) end
  local late = tonumber(ms) - tonumber(ARGV[a + 11])
  if run ~= ARGV[a + 4] or epoch ~= ARGV[a + 5] or version ~= ARGV[a + 6] or found ~= ARGV[a + 7] or also ~= ARGV[a + 8]
    or late < 0 or late > 2000 then
    answers[i] = {ms, run, epoch, version, found, also}
  else
    redis.call('HSET', hash, name, ARGV[a + 9])
    redis.call('HINCRBY', KEYS[1], counter, 1)
    if ARGV[a + 10] == '' and also ~= '' then
      redis.call('HDEL', second, beside)
    elseif ARGV[a + 10] ~= also then
      redis.call('HSET', second, beside, ARGV[a + 10])
    end
    answers[i] = 1
  end
end
return answers
"""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an update has read, and the server's clock at monotonic second `at`."""

    clock_ms: int
    at: float
    run: bytes
    stored: bytes
    version: bytes
    value: bytes
    beside: bytes


class _Step:
    """An update under way. `result` when it is done; until then `ask` is what it sends next."""

    __slots__ = ("ask", "beside", "hashes", "is_guess", "result", "seen", "update", "where", "wrote")

    def __init__(self, update: Update, client: RedisClient) -> None:
        self.update = update
        self.where = (update.collection, encode_key(update.key))
        self.beside = (update.beside[0], encode_key(update.beside[1])) if update.beside is not None else None
        first = client.key("c", encode_collection(update.collection))
        self.hashes = (first, client.key("c", encode_collection(self.beside[0])) if self.beside is not None else first)
        self.seen: _Seen | None = None
        self.is_guess = False
        self.ask: list[bytes | int] = []
        self.wrote: tuple[Present, _Seen] | None = None
        self.result: Present | Exception | None = None

    @property
    def names(self) -> list[bytes | int]:
        collection, name = self.where
        return [name, collection.encode() + b":" + name, self.beside[1] if self.beside is not None else b""]


class Updates:
    """The updates of one store. `epoch_of`: the epoch of a server with this run_id and stored id; None if it has to be looked at again."""

    def __init__(self, client: RedisClient, batches: Batches, epoch_of: Callable[[bytes, bytes], str | None]) -> None:
        self._client = client
        self._batches = batches
        self._epoch_of = epoch_of
        self._last: dict[tuple[str, bytes], _Seen] = {}

    def run(self, updates: Sequence[Update]) -> list[Present | Exception]:
        """See `Store.update_all`."""
        results: list[Present | Exception] = []
        for start in range(0, len(updates), MAX_AT_ONCE):
            results += self._run(updates[start : start + MAX_AT_ONCE])
        return results

    def _run(self, updates: Sequence[Update]) -> list[Present | Exception]:
        steps: list[_Step | Exception] = []
        for update in updates:
            try:
                step = _Step(update, self._client)
                step.seen = self._guess(step)
                step.is_guess = step.seen is not None
                steps.append(step)
            except StoreError as exc:
                steps.append(exc)
        under_way = [step for step in steps if isinstance(step, _Step)]
        for _ in range(MAX_TRIES):
            for step in under_way:
                self._decide(step)
            under_way = [step for step in under_way if step.result is None]
            if not under_way:
                break
            self._exchange(under_way)
            under_way = [step for step in under_way if step.result is None]
        for step in under_way:
            collection, key = step.where[0], step.update.key
            step.result = StoreError(f"{self._client.name}: {collection} {key[:80]!r} was changed by others {MAX_TRIES} times at once")
        return [_result(step) for step in steps]

    def _decide(self, step: _Step) -> None:
        """Ask the change what it makes of what was seen: then the update is done, or wants to write; or it has to look again."""
        seen, step.wrote = step.seen, None
        step.ask = [*step.names, _ONLY_LOOK, b"", b"", b"", b"", b"", b"", 0]
        try:
            epoch = self._epoch_of(seen.run, seen.stored) if seen is not None else None
            if seen is None or epoch is None:
                return
            number = self._clock(seen.version)
            text, beside = self._text_of(step.where, seen.value), _text_beside(step.beside, seen.beside)
            present = Present(text, number + 1, seen.clock_ms, epoch, beside)
            change = step.update.change(present)
            if change is None:
                step.result = replace(present, number=number) if not step.is_guess else None
                return
            after = replace(present, text=change.text, beside=change.beside) if isinstance(change, Both) else replace(present, text=change)
            body = b"%d:%b" % (present.now_ms, encode_text(after.text or ""))
            second = seen.beside
            if step.beside is not None and after.beside != beside:
                second = b"%d:%b" % (present.now_ms, encode_text(after.beside)) if after.beside is not None else b""
        except Exception as exc:
            step.result = exc if not step.is_guess else None
            return
        step.ask = [
            *step.names, seen.run, seen.stored, seen.version, seen.value, seen.beside, body, second, seen.clock_ms
        ]  # fmt: skip
        step.wrote = after, replace(seen, version=b"%d" % (number + 1), value=body, beside=second)

    def _exchange(self, steps: Sequence[_Step]) -> None:
        keys = [self._client.key("v"), self._client.key("epoch")]
        values: list[bytes | int] = [MAX_DOCUMENT_BYTES + STAMP_BYTES]
        for step in steps:
            keys += step.hashes
            values += step.ask
        try:
            answers = self._batches.eval(_SCRIPT, keys, values)
            if not isinstance(answers, list) or len(answers) != len(steps):
                raise self._not_ours("an answer of another kind than was asked for")
        except StoreError as exc:
            for step in steps:
                step.result = StoreError(str(exc))
            return
        for step, answer in zip(steps, answers, strict=True):
            step.is_guess = False
            try:
                if answer == 1 and step.wrote is not None:
                    step.result, seen = step.wrote
                    self._remember(step, seen)
                else:
                    step.seen = self._seen(answer)
            except StoreError as exc:
                step.result = exc

    def _seen(self, answer: object) -> _Seen:
        if not isinstance(answer, list) or len(answer) != 6 or not all(isinstance(text, bytes) for text in answer):
            raise self._not_ours("an answer of another kind than was asked for")
        clock, run, stored, version, value, beside = answer
        return _Seen(self._clock(clock), time.monotonic(), run, stored, version, value, beside)

    def _guess(self, step: _Step) -> _Seen | None:
        """What is there if nobody else has written since we did: it saves one of two round trips where that is so. The clock is a little
        behind the server's.
        """
        known = self._last.get(step.where)
        if known is None:
            return None
        beside = self._last.get(step.beside) if step.beside is not None else None
        now = time.monotonic()
        clock_ms = known.clock_ms + max(0, int((now - known.at) * 1000) - 2)
        return replace(known, clock_ms=clock_ms, at=now, beside=beside.value if beside is not None else b"")

    def _remember(self, step: _Step, seen: _Seen) -> None:
        if len(self._last) >= MAX_GUESSES:
            self._last.clear()
        if len(seen.value) <= MAX_GUESS_BYTES:
            self._last[step.where] = seen
        if step.beside is None:
            return
        if 0 < len(seen.beside) <= MAX_GUESS_BYTES:
            self._last[step.beside] = replace(seen, value=seen.beside)
        else:
            self._last.pop(step.beside, None)

    def _text_of(self, where: tuple[str, bytes], value: bytes) -> str | None:
        if not value:
            return None
        text = _stamped(where[1], value)
        if text is None:
            raise self._not_ours(f"something that no member has written as {where[1][:80]!r}")
        return text

    def _clock(self, text: bytes) -> int:
        if not text.isdigit() or len(text) > STAMP_BYTES - 1:
            raise self._not_ours("a clock that is no number")
        return int(text)

    def _not_ours(self, what: str) -> StoreError:
        return StoreError(f"{self._client.name}: holds or says something that is not ours: {what}")


def _stamped(key: bytes, value: bytes) -> str | None:
    found = STAMPED.fullmatch(value)
    document = decode_document(key, found[2], int(found[1])) if found is not None else None
    return document.text if document is not None else None


def _text_beside(where: tuple[str, bytes] | None, value: bytes) -> str | None:
    return _stamped(where[1], value) if where is not None and value else None


def _result(step: "_Step | Exception") -> Present | Exception:
    if isinstance(step, Exception):
        return step
    assert step.result is not None
    return step.result
