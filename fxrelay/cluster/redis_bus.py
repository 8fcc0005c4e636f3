"""Task: how the members of a cluster tell each other of changes: Redis publish/subscribe. Blocking: for worker threads."""

import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from fxrelay.cluster.content import MAX_BATCH, MAX_BATCH_BYTES, decode_text, encode_collection, encode_text
from fxrelay.cluster.ports import Message
from fxrelay.cluster.redis_client import READ_S, RedisClient
from fxrelay.cluster.subscribers import Subscribers
from fxtunnel.errors import StoreError, TransporterError

T = TypeVar("T")

SLICE_S: Final = 0.5
"""A waiting call looks this often whether it was closed."""
SILENCE_S: Final = 5.0
"""After so long without a message the server is asked for a sign of life."""


class RedisTransporter:
    """`Transporter` through a Redis."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._subscribers = Subscribers[RedisSubscription](client.name)

    def publish(self, topic: str, *texts: str) -> None:
        """Tell everyone who listens. Raises TransporterError."""
        try:
            channel, bodies = self._client.key(encode_collection(topic)), [encode_text(text) for text in texts]
            self._client.ask(lambda redis: _publish(redis, channel, bodies))
        except StoreError as exc:
            raise TransporterError(str(exc)) from exc

    def subscribe(self, topics: tuple[str, ...]) -> "RedisSubscription":
        """Listen: from its return on, what is published is heard. Raises TransporterError."""
        try:
            channels = {self._client.key(encode_collection(topic)): topic for topic in topics}
            connection = self._client.connection(next(iter(channels)))
        except StoreError as exc:
            raise TransporterError(str(exc)) from exc
        return self._subscribers.start(RedisSubscription(self._client, connection, channels, self._subscribers.forget))

    def close(self) -> None:
        """End all connections; subscriptions end."""
        self._subscribers.close()
        self._client.close()


def _publish(redis: Any, channel: str, bodies: list[bytes]) -> None:
    if len(bodies) == 1:
        redis.publish(channel, bodies[0])
        return
    pipeline = redis.pipeline(transaction=False)
    for body in bodies:
        pipeline.publish(channel, body)
    pipeline.execute()


class RedisSubscription:
    """`Subscription` on a connection of its own. Not redis-py's PubSub: that one connects again in silence, and messages are lost."""

    def __init__(
        self, client: RedisClient, connection: Any, channels: dict[str, str], forget: Callable[["RedisSubscription"], None]
    ) -> None:
        self._client = client
        self._connection = connection
        self._channels = {channel.encode(): topic for channel, topic in channels.items()}
        self._forget = forget
        self._lock = threading.Lock()
        self._closed = False
        self._heard_at = time.monotonic()
        self._pinged_at: float | None = None

    def start(self) -> None:
        """Subscribe, and wait until the server has confirmed it. Raises TransporterError."""

        def subscribe() -> None:
            self._connection.send_command("SUBSCRIBE", *self._channels)
            missing = set(self._channels)
            deadline = time.monotonic() + READ_S
            while missing:
                answer = self._connection.read_response()
                if isinstance(answer, list) and len(answer) == 3 and answer[0] == b"subscribe":
                    missing.discard(answer[1])
                if time.monotonic() > deadline:
                    raise TransporterError(f"{self._client.name}: does not confirm the subscription within {READ_S:g} s")

        self._alone(subscribe)

    def next_batch(self, timeout_s: float) -> list[Message]:
        """What has come. Raises TransporterError."""
        return self._alone(lambda: self._next_batch(time.monotonic() + timeout_s))

    def close(self) -> None:
        """Stop listening. Never blocks: a call that waits does the closing within SLICE_S."""
        self._closed = True
        self._let_go()
        self._forget(self)

    def _next_batch(self, deadline: float) -> list[Message]:
        batch: list[Message] = []
        size = 0
        while len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            self._check_open()
            now = time.monotonic()
            # Once there is something, only what has come already.
            wait_s = 0.0 if batch else max(0.0, min(deadline - now, SLICE_S))
            if not self._connection.can_read(timeout=wait_s):
                self._check_alive(time.monotonic())
                if batch or time.monotonic() >= deadline:
                    break
                continue
            answer = self._connection.read_response()
            self._heard_at, self._pinged_at = time.monotonic(), None
            message = self._message(answer)
            if message is not None:
                batch.append(message)
                size += len(message.text)
            elif time.monotonic() >= deadline and not batch:
                break
        return batch

    def _message(self, answer: object) -> Message | None:
        if not isinstance(answer, list) or len(answer) != 3 or answer[0] != b"message" or not isinstance(answer[1], bytes):
            return None
        topic, text = self._channels.get(answer[1]), decode_text(answer[2])
        return Message(topic, text) if topic is not None and text is not None else None

    def _check_alive(self, now: float) -> None:
        """A server that is gone without a word looks like one that has nothing to say."""
        if self._pinged_at is not None:
            if now - self._pinged_at > READ_S:
                raise TransporterError(f"{self._client.name}: does not answer within {READ_S:g} s")
        elif now - self._heard_at > SILENCE_S:
            self._connection.send_command("PING")
            self._pinged_at = now

    def _alone(self, call: Callable[[], T]) -> T:
        try:
            with self._lock:
                self._check_open()
                return call()
        except TransporterError:
            self._closed = True
            raise
        # As in RedisClient.ask: redis-py's parser may raise nearly anything.
        except Exception as exc:
            was_closed, self._closed = self._closed, True
            raise TransporterError(f"{self._client.name}: was closed" if was_closed else str(self._client.problem(exc))) from exc
        finally:
            if self._closed:
                self._let_go()

    def _let_go(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._connection.disconnect()
            finally:
                self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise TransporterError(f"{self._client.name}: was closed")
