"""Task: keeps a ClusterView up to date: live messages as they come, and the whole store now and then for what was missed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import trio

from fxrelay.cluster.ports import CONTROLS, SERVERS, TOPICS, Document, Store, Subscription, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.kit.backoff import FullJitter
from fxtunnel.kit.process import keep_going

SLICE: Final = 16
"""Server objects taken in between two looks at the data plane: about half a millisecond."""
FETCH: Final = 256
"""Documents fetched by one call to a worker thread."""
BATCH_WAIT_S: Final = 1.0
GATHER_S: Final = 0.05
"""Pause between two batches: under load one thread call brings many messages."""
CONTROL_READS: Final = 3


@dataclass(frozen=True, slots=True)
class FollowConfig:
    """Seconds between two readings of the whole store, and the bounds of the wait after a failure."""

    resync_s: float = 60.0
    min_backoff_s: float = 0.25
    max_backoff_s: float = 3.0


class Follower:
    """Follows the cluster. `run` it once."""

    def __init__(self, store: Store, transporter: Transporter, view: ClusterView, threads: Threads, config: FollowConfig) -> None:
        self._store = store
        self._transporter = transporter
        self._view = view
        self._threads = threads
        self._config = config
        self._rng = random.Random()  # noqa: S311 - waits, not secrets
        self._again = trio.Event()
        self._tried = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled. Started when the store has been read once, or could not be."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, "reading the store", self._keep_reading)
            await self._tried.wait()
            nursery.start_soon(keep_going, "listening for live updates", self._keep_listening)
            task_status.started()

    async def _keep_reading(self) -> None:
        backoff = FullJitter(self._config.min_backoff_s, self._config.max_backoff_s, rng=self._rng)
        while True:
            again = self._again = trio.Event()
            try:
                await self._read()
                wait_s = self._config.resync_s
                backoff.reset()
            except StoreError as exc:
                self._view.store_failed(str(exc))
                wait_s = backoff.next_s()
            finally:
                self._tried.set()
            with trio.move_on_after(wait_s):
                await again.wait()

    async def _read(self) -> None:
        view, threads = self._view, self._threads
        view.store_said(await threads.run(self._store.now_ms))
        for _ in range(CONTROL_READS):
            heard = view.controls_heard
            controls = await threads.run(lambda: list(self._store.documents(CONTROLS)))
            if view.controls_heard == heard:
                view.read_controls(controls)
                break  # otherwise something was switched meanwhile, and what was read may be older than that
        seen: set[str] = set()
        servers = await threads.run(lambda: self._store.documents(SERVERS))
        while part := await threads.run(lambda: _take(servers)):
            for start in range(0, len(part), SLICE):
                view.read_servers(part[start : start + SLICE])
                await trio.lowlevel.checkpoint()
            seen.update(document.key for document in part)
        view.read_everything(frozenset(seen))

    async def _keep_listening(self) -> None:
        backoff = FullJitter(self._config.min_backoff_s, self._config.max_backoff_s, rng=self._rng)
        while True:
            subscription = None
            try:
                subscription = await self._threads.run(lambda: self._transporter.subscribe(TOPICS))
                self._view.live_updates(True)
                self._again.set()  # what was said between the last reading and now was not heard
                await self._listen(subscription, backoff)
            except TransporterError as exc:
                self._view.live_updates(False, str(exc))
            except Exception:
                self._view.live_updates(False, "internal error")
                raise
            finally:
                if subscription is not None:
                    subscription.close()
            await trio.sleep(backoff.next_s())

    async def _listen(self, subscription: Subscription, backoff: FullJitter) -> None:
        while True:
            batch = await self._threads.run(lambda: subscription.next_batch(BATCH_WAIT_S))
            backoff.reset()  # not before: every new subscription makes all of the store be read
            for start in range(0, len(batch), SLICE):
                for message in batch[start : start + SLICE]:
                    self._view.hear(message)
                await trio.lowlevel.checkpoint()
            if batch:
                await trio.sleep(GATHER_S)


def _take(documents: Iterator[Document]) -> list[Document]:
    part = []
    for document in documents:
        part.append(document)
        if len(part) == FETCH:
            break
    return part
