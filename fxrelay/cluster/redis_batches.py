"""Task: scripts of threads that wait at the same time go to Redis in one write and come back in one read. Blocking: for worker threads.

One of the threads sends for all that wait; what comes meanwhile goes with the next write. Redis then syncs its file once for all of them,
and nobody looks for a connection of his own. Each script is a step by itself, as if it had been sent alone.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import redis as redis_py

from fxrelay.cluster.redis_client import CONNECT_S, READ_S, RedisClient
from fxtunnel.errors import StoreError

MAX_SCRIPTS: Final = 64
"""In one write."""
TURN_S: Final = CONNECT_S + 2 * READ_S
"""How long a call waits for the thread that sends for it; that one has deadlines of its own."""
SLOW_S: Final = 1.0
"""Who waits behind a write that has failed after so long fails with it: each trying again in turn would wait for the sum of all."""


class _Call:
    """A script on its way. `turn` is free when it has its answer, or is to send for all that wait (`leads`)."""

    __slots__ = ("answer", "leads", "packed", "turn")

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.answer: Any = None
        self.leads = False
        self.turn = threading.Lock()
        self.turn.acquire()


class Batches:
    """The scripts of one store."""

    def __init__(self, client: RedisClient) -> None:
        self.sent = 0
        """Writes so far."""
        self.is_led = False
        """Whether a thread is sending."""
        self._client = client
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []

    @property
    def waiting(self) -> int:
        """Scripts that go with the next writes."""
        return len(self._waiting)

    def eval(self, script: str, keys: Sequence[str], values: Sequence[bytes | int]) -> Any:
        """What the script returns. Any number of threads may call.

        Raises:
            StoreError: it may or may not be done.
        """
        if not self._client.has_one_line:
            return self._client.ask(lambda redis: redis.eval(script, len(keys), *keys, *values))
        call = _Call(_pack(script, keys, values))
        with self._lock:
            self._waiting.append(call)
            call.leads, self.is_led = not self.is_led, True
        if not call.leads and not call.turn.acquire(timeout=TURN_S):
            self._give_up(call)
        if call.leads:
            self._lead()
        if isinstance(call.answer, Exception):
            raise self._error(call.answer) from call.answer
        return call.answer

    def _give_up(self, call: _Call) -> None:
        with self._lock:
            if not call.leads:
                call.answer = StoreError(f"{self._client.name}: no answer within {TURN_S:g} s")
                if call in self._waiting:
                    self._waiting.remove(call)

    def _lead(self) -> None:
        """Send what waits, and hand on the lead."""
        with self._lock:
            batch, self._waiting = self._waiting[:MAX_SCRIPTS], self._waiting[MAX_SCRIPTS:]
            self.sent += 1
        began = time.monotonic()
        answers: list[Any] = []
        try:
            answers = self._client.ask(lambda redis: _exchange(redis, [call.packed for call in batch]))
        except StoreError as exc:
            answers = [exc] * len(batch)
        finally:
            with self._lock:
                if answers and isinstance(answers[0], StoreError) and time.monotonic() - began > SLOW_S:
                    batch, self._waiting = batch + self._waiting, []
                    answers = [answers[0]] * len(batch)
                following = self._waiting[0] if self._waiting else None
                self.is_led = following is not None
                if following is not None:
                    following.leads = True
            if following is not None:
                following.turn.release()
            missing = StoreError(f"{self._client.name}: the call was broken off")
            for number, call in enumerate(batch):
                call.answer = answers[number] if number < len(answers) else missing
                call.turn.release()

    def _error(self, answer: Exception) -> StoreError:
        return StoreError(str(answer)) if isinstance(answer, StoreError) else self._client.problem(answer)


def _exchange(redis: Any, packed: list[bytes]) -> list[Any]:
    """The answers, in order; what Redis refuses is an exception among them."""
    pool = redis.connection_pool
    connection = pool.get_connection()
    try:
        connection.send_packed_command([b"".join(packed)])
        return [_answer(connection) for _ in packed]
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis_py.exceptions.ResponseError as exc:
        return exc


def _pack(script: str, keys: Sequence[str], values: Sequence[bytes | int]) -> bytes:
    parts = [b"EVAL", script.encode(), b"%d" % len(keys), *(key.encode() for key in keys)]
    parts += [value if isinstance(value, bytes) else b"%d" % value for value in values]
    return b"*%d\r\n%b" % (len(parts), b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]))
