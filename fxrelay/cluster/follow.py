"""Task: keeps a ClusterView up to date: with live messages as they come, and by reading the whole store now and then."""

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
ASK_PAUSE_S: Final = 0.2
"""Pause between two attempts to ask a store that somebody could not use."""


@dataclass(frozen=True, slots=True)
class FollowConfig:
    """Seconds between two readings of the whole store, and the bounds of the wait after a failure.

    `unheard_resync_s` is the same while live updates are down, and well below the age at which nodes become stale. Reading everybody
    once in the time in which everybody publishes once costs the store about what telling everybody of it would.
    """

    resync_s: float = 60.0
    unheard_resync_s: float = 10.0
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
        self._resting = trio.CancelScope()
        self._tried = trio.Event()
        self._doubt = trio.Event()

    def ask_store(self) -> None:
        """Have the store asked soon whether it answers. Never blocks."""
        self._doubt.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled. Started when the store has been read once, or could not be."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, "reading the store", self._keep_reading)
            nursery.start_soon(keep_going, "asking the store", self._keep_asking)
            await self._tried.wait()
            nursery.start_soon(keep_going, "listening for live updates", self._keep_listening)
            task_status.started()

    async def _keep_reading(self) -> None:
        backoff = FullJitter(self._config.min_backoff_s, self._config.max_backoff_s, rng=self._rng)
        while True:
            again = self._again = trio.Event()
            try:
                await self._read()
                wait_s = self._config.resync_s if self._view.health().live else self._unheard_wait_s()
                backoff.reset()
            except StoreError as exc:
                self._view.store_failed(str(exc))
                wait_s = backoff.next_s()
            finally:
                self._tried.set()
            with trio.move_on_after(wait_s) as self._resting:
                await again.wait()

    def _unheard_wait_s(self) -> float:
        # Not everywhere at once: all relays have lost the same transporter.
        return self._config.unheard_resync_s * self._rng.uniform(0.7, 1.0)

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

    async def _keep_asking(self) -> None:
        """Find out whether a store that somebody could not use is away. If it is, it is read until it is back."""
        while True:
            await self._doubt.wait()
            self._doubt = trio.Event()
            if self._view.is_store_doubted:
                try:
                    self._view.store_said(await self._threads.run(self._store.now_ms))
                except StoreError as exc:
                    self._view.store_failed(str(exc))
                    self._again.set()
            await trio.sleep(ASK_PAUSE_S)

    async def _keep_listening(self) -> None:
        backoff = FullJitter(self._config.min_backoff_s, self._config.max_backoff_s, rng=self._rng)
        while True:
            subscription = None
            try:
                subscription = await self._threads.run(lambda: self._transporter.subscribe(TOPICS))
                self._view.live_updates_heard()
                self._again.set()  # messages between the last reading and now were not heard
                await self._listen(subscription, backoff)
            except TransporterError as exc:
                if self._view.health().live:
                    self._view.store_doubted()  # it is often the same server
                self._lost(str(exc))
            except Exception:
                self._lost("internal error")
                raise
            finally:
                if subscription is not None:
                    subscription.close()
            await trio.sleep(backoff.next_s())

    def _lost(self, error: str) -> None:
        """Nothing can be heard, so the store is read sooner."""
        self._resting.deadline = min(self._resting.deadline, trio.current_time() + self._unheard_wait_s())
        self._view.live_updates_lost(error)

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
