"""Task: publishes this node's server object: every few seconds, at once when something changes, and a last time when it leaves."""

import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from fxrelay.cluster.inflight import MARGIN_MS
from fxrelay.cluster.ports import SERVERS, Store, Transporter
from fxrelay.cluster.server import MAX_SERVER_BYTES, BadServer, parse_server
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.kit.process import keep_going
from fxtunnel.model import InstanceId, RelayId

logger = logging.getLogger(__name__)

MIN_PAUSE_S: Final = 0.2
"""The shortest time between two updates, however much changes."""
RETRY_S: Final = 3.0
"""Until the next update after one that the store did not take."""
EARLY_GATHER_S: Final = 0.2
"""From a session's end to the early update that tells of it: other sessions may end meanwhile, and the kernel stops counting it."""
EARLY_PAUSE_S: Final = 1.0
"""The shortest time from any update to an early one."""
MAX_EARLY: Final = 6
"""Early updates in a row. After that there is one per `publish_s`, in place of the regular one, so that a node whose sessions end all the
time does not write to the store more often than others."""
FAREWELL_S: Final = 2.0
"""For the last object, which says that this node has ended, to reach the store when the relay stops."""

Facts = Mapping[str, Any]
"""Fields of the server object, with the names of docs/CLUSTER.md."""


@dataclass(frozen=True, slots=True)
class PublisherConfig:
    """Who publishes, and how often."""

    server_id: RelayId
    instance: InstanceId
    version: str
    publish_s: float = 10.0


class _Early:
    """A token bucket for early updates. `now` is monotonic seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._left = float(MAX_EARLY)
        self._counted_at = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until the next early update is allowed."""
        self._count(now)
        return max(0.0, (1 - self._left) * self._every_s)

    def take(self, now: float) -> None:
        """An early update is made."""
        self._count(now)
        self._left = max(0.0, self._left - 1)

    def _count(self, now: float) -> None:
        self._left = min(float(MAX_EARLY), self._left + (now - self._counted_at) / self._every_s)
        self._counted_at = now


class Publisher:
    """Publishes. `run` it once; `changed`, `session_ended` and `hear_end` may be called at any time from the trio thread or the reactor.

    `sources` are `measure`, which gathers what the machine says and may take its time, and `agent`, which returns at once what the relay
    knows about itself (`tunnels`).
    """

    def __init__(
        self,
        config: PublisherConfig,
        store: Store,
        transporter: Transporter,
        view: ClusterView,
        threads: Threads,
        sources: tuple[Callable[[], Awaitable[Facts]], Callable[[], Facts]],
    ) -> None:
        self._config = config
        self._store = store
        self._transporter = transporter
        self._view = view
        self._threads = threads
        self._measure, self._agent = sources
        self._started_ms = 0
        """Tells others which of two processes with one id is the later one, which wins."""
        self._seq = 0
        self._changed = trio.Event()
        self._tried = trio.Event()
        self._measured: Facts = {}
        self._measured_ms: int | None = None
        self._counted_ms = 0.0
        self._ended = False
        self._early = _Early(config.publish_s)
        self._updated_at = 0.0
        self._waiting: trio.CancelScope | None = None
        self._is_leaving = False
        self._is_over = False
        self._is_silent = False
        self.published = 0
        self.last_error = ""

    def changed(self) -> None:
        """Something others should know of has changed: publish soon."""
        self._changed.set()

    def session_ended(self) -> None:
        """A session that others may count is over: publish soon, but not for each. Costs next to nothing if that is going to be done."""
        if not self._ended:
            self._ended = True
            self._come_early()

    def hear_end(self, server_id: RelayId, placed_ms: int) -> None:
        """A placement has ended, here or at another relay. Matters if the last measurement may count it."""
        if server_id == self._config.server_id and placed_ms <= self._counted_ms:
            self.session_ended()

    def hush(self) -> None:
        """Another process of this node is about to publish: say nothing more, or others would see two nodes with one id."""
        self._is_silent = True

    def leave(self) -> None:
        """This node takes nothing new from now on: say so at once. Not if `hush` was called and the other process has been heard since."""
        self._is_silent = self._is_silent and self._has_successor()
        self._is_leaving = True
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish until cancelled; then publish that this node has ended, so that others need not conclude it from its age.

        `started()` once the first server object has been published, or could not be.
        """
        self._started_ms = self._view.now_ms
        self._changed.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_going, "publishing this node", self._keep_publishing)
                await self._tried.wait()
                task_status.started()
        finally:
            with trio.move_on_after(FAREWELL_S, shield=True):
                self._is_leaving = self._is_over = True
                await self._send(self._measured)

    async def _keep_publishing(self) -> None:
        while True:
            period_s = min(self._config.publish_s, RETRY_S) if self._view.health().store_down_s else self._config.publish_s
            with trio.move_on_after(period_s) as self._waiting:
                if self._ended:
                    self._come_early()
                await self._changed.wait()
            self._waiting = None
            is_early, self._ended = self._ended, False  # reset before publishing: what changes meanwhile is for the next update
            self._changed = trio.Event()
            if is_early:
                self._early.take(trio.current_time())
            try:
                await self._publish()
            except Exception:
                self._changed.set()  # the next update makes up for this one
                raise
            finally:
                self._tried.set()
                self._updated_at = trio.current_time()
            # A session that has just begun may be counted twice, in this update and as a placement: another early update puts that right.
            self._ended = self._ended or (is_early and self._config.server_id in self._view.in_flight.counts(self._view.now))
            await trio.sleep(min(MIN_PAUSE_S, self._config.publish_s))

    def _come_early(self) -> None:
        """End the wait for the next update as soon as an early one may be made."""
        if self._waiting is not None:
            now = trio.current_time()
            wait_s = max(EARLY_GATHER_S, self._updated_at + EARLY_PAUSE_S - now, self._early.wait_s(now))
            self._waiting.deadline = min(self._waiting.deadline, now + wait_s)

    async def _publish(self) -> None:
        # A node that leaves has no time to measure, and what it measures after its successor has started would look like a quarrel.
        if not self._is_leaving and (self._measured_ms is None or not self._is_silent):
            # The measurement counts as of its beginning, so that no placement made meanwhile is taken to be included.
            began_ms = self._view.now_ms
            self._counted_ms = math.inf  # nobody knows when exactly sessions are counted
            self._measured = await self._measure()
            self._measured_ms = began_ms
            self._counted_ms = self._view.now_ms + MARGIN_MS
        await self._send(self._measured)

    def _has_successor(self) -> bool:
        member = self._view.members.get(self._config.server_id, self._view.now)
        return member is not None and member.server.instance != self._config.instance

    async def _send(self, measured: Facts) -> None:
        if self._is_silent and self._has_successor():
            return
        text = self._next_object(measured)
        try:
            parse_server(text)
        except BadServer as exc:
            error = f"this node's own data: {exc}"
            if error != self.last_error:
                logger.error("not published: %s (at most %d bytes in all)", exc, MAX_SERVER_BYTES)
            self.last_error = error
            return
        self._view.know(text)  # this node knows itself even while the store is away
        if not self._is_silent:
            await self._hand_out(text)

    def _next_object(self, measured: Facts) -> str:
        """The next server object, as JSON."""
        self._seq += 1
        measured_ms = self._view.now_ms if self._measured_ms is None else self._measured_ms
        return json.dumps(
            {
                **measured,
                **({"draining": True} if self._is_leaving else {}),
                "serverId": self._config.server_id,
                "seq": self._seq,
                "measuredAt": measured.get("measuredAt", measured_ms),
                "agent": {
                    **self._agent(),
                    **({"ended": True} if self._is_over else {}),
                    "version": self._config.version,
                    "instanceId": self._config.instance,
                    "startedAt": self._started_ms,
                },
            },
            ensure_ascii=False,
            separators=(",", ":"),
        )

    async def _hand_out(self, text: str) -> None:
        """To the store, and to those who listen; what fails is noted for status and tried again with the next object."""
        try:
            if self._has_successor():
                # A newer process has this id, and its object is the one to keep. Ours only goes to those who listen, who see the quarrel.
                self._view.store_took(await self._threads.run(self._store.now_ms))
            else:
                self._view.store_took(await self._threads.run(lambda: self._store.put(SERVERS, self._config.server_id, text)))
                self.published += 1
            self.last_error = ""
        except StoreError as exc:
            self.last_error = str(exc)
            self._view.store_refused(str(exc))
        try:
            await self._threads.run(lambda: self._transporter.publish(SERVERS, text))
        except TransporterError as exc:
            self.last_error = str(exc)
