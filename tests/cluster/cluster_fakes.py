"""A store, a transporter and threads in memory, and server objects to fill them with."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import trio

from fxrelay.cluster.follow import Follower
from fxrelay.cluster.ports import Document, Message
from fxrelay.cluster.publish import Publisher, PublisherConfig
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView, NullListener
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.model import InstanceId, RelayId

T = TypeVar("T")


def server_text(server_id: str = "a", **fields: Any) -> str:
    agent = {"instanceId": fields.pop("instance", "i1"), "startedAt": fields.pop("started", 1_000), **fields.pop("agent", {})}
    return json.dumps({"serverId": server_id, "seq": 1, "measuredAt": 2_000, "agent": agent} | fields)


class Told(NullListener):
    """Implements `Listener` with what is made after the view."""

    follower: Follower | None = None
    publisher: Publisher | None = None

    def ask_store(self) -> None:
        if self.follower is not None:
            self.follower.ask_store()

    def hear_end(self, server_id: RelayId, placed_ms: int) -> None:
        if self.publisher is not None:
            self.publisher.hear_end(server_id, placed_ms)

    def may_have_missed(self) -> None:
        if self.publisher is not None:
            self.publisher.session_ended()


class NoThreads(Threads):
    """Calls where they are made: threads do not jump with the clock. A call of `slow` seconds is a sleep of the fake clock."""

    def __init__(self) -> None:
        self.slow_s = 0.0

    async def run(self, call: Callable[[], T]) -> T:
        await trio.sleep(self.slow_s)
        result = call()
        if isinstance(result, Pending):
            return await result.wait()
        return result


class Pending:
    """What a fake subscription returns instead of waiting in a thread."""

    def __init__(self, subscription: "FakeSubscription", timeout_s: float) -> None:
        self._subscription = subscription
        self._timeout_s = timeout_s

    async def wait(self) -> list[Message]:
        with trio.move_on_after(self._timeout_s):
            await self._subscription.news.wait()
        return self._subscription.taken()


class FakeStore:
    """Documents in a dictionary; `error` makes every call fail, `on_read` is called before documents are handed out."""

    def __init__(self) -> None:
        self.collections: dict[str, dict[str, Document]] = {}
        self.error = ""
        self.doubt = ""
        self.reads = 0
        self.ahead_ms = 0
        self.on_read: Callable[[str], None] = lambda collection: None

    def _check(self) -> None:
        if self.error:
            raise StoreError(self.error)

    def epoch(self) -> str:
        return "1"

    def now_ms(self) -> int:
        self._check()
        return int(trio.current_time() * 1000) + self.ahead_ms

    def put(self, collection: str, key: str, text: str) -> int:
        self._check()
        self.collections.setdefault(collection, {})[key] = Document(key, text, self.now_ms())
        return self.now_ms()

    def get(self, collection: str, key: str) -> Document | None:
        return self.collections.get(collection, {}).get(key)

    def delete(self, collection: str, key: str) -> None:
        self.collections.get(collection, {}).pop(key, None)

    def documents(self, collection: str) -> Iterator[Document]:
        self._check()
        self.reads += collection == "servers"
        found = list(self.collections.get(collection, {}).values())
        self.on_read(collection)
        return iter(found)

    def add(self, counter: str, amount: int) -> int:
        raise NotImplementedError

    def close(self) -> None:
        pass


class FakeSubscription:
    def __init__(self) -> None:
        self.queue: list[Message] = []
        self.news = trio.Event()
        self.error = ""
        self.is_closed = False

    def next_batch(self, timeout_s: float) -> Any:
        return Pending(self, timeout_s)

    def taken(self) -> list[Message]:
        if self.error:
            raise TransporterError(self.error)
        taken, self.queue = self.queue, []
        self.news = trio.Event()
        return taken

    def close(self) -> None:
        self.is_closed = True


class FakeTransporter:
    def __init__(self) -> None:
        self.subscriptions: list[FakeSubscription] = []
        self.error = ""
        self.said: list[tuple[str, str]] = []
        self.at: list[float] = []

    def publish(self, topic: str, *texts: str) -> None:
        if self.error:
            raise TransporterError(self.error)
        for text in texts:
            self.said.append((topic, text))
            self.at.append(trio.current_time())
            for subscription in self.subscriptions:
                subscription.queue.append(Message(topic, text))
                subscription.news.set()

    def subscribe(self, topics: tuple[str, ...]) -> FakeSubscription:
        if self.error:
            raise TransporterError(self.error)
        self.subscriptions.append(FakeSubscription())
        return self.subscriptions[-1]

    def close(self) -> None:
        pass

    def break_off(self, error: str) -> None:
        """Every subscription ends, and no new one is to be had."""
        self.error = error
        for subscription in self.subscriptions:
            subscription.error = error
            subscription.news.set()


def make_publisher(
    store: FakeStore, transporter: FakeTransporter, view: ClusterView, threads: Threads, measure: Any, publish_s: float = 10.0
) -> Publisher:
    config = PublisherConfig(RelayId("me"), InstanceId("i-me"), "1.0", publish_s)
    return Publisher(config, store, transporter, view, threads, (measure, lambda: {"tunnels": [{"gatewayId": "gw"}]}))
