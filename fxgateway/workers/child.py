"""Task: keeps one worker process alive: starts it, gives it what it needs, watches it, ends it, and restarts it when it dies."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

import fxgateway
from fxgateway.workers.channel import MAX_SOCKETS, Channel, ChannelOwner, Message, pair
from fxtunnel.engine.reactor import Reactor
from fxtunnel.errors import FxError
from fxtunnel.kit.process import keep_going

logger = logging.getLogger(__name__)

READY_S: Final = 30.0
"""For a worker to be ready after its start, on a busy machine."""
SILENT_S: Final = 10.0
"""Without a beat for this long a worker is stuck, and is killed. As long as relays wait for a sign of life (liveness.dead_after_s)."""
LOOK_S: Final = 1.0
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 30.0
SETTLED_S: Final = 60.0
"""A worker that lived this long is restarted without the waits that earlier deaths had built up."""


@dataclass(frozen=True, slots=True)
class SpawnPayload:
    """What a worker is started with: its first message, and copies of these listening sockets, which stay the parent's."""

    message: Message
    sockets: Sequence[tuple[str, socket.socket]]
    own: Mapping[str, socket.socket] = field(default_factory=dict)
    """Sockets for this worker only, which are given away."""


class ChildOwner(Protocol):
    """What a child needs of the parent."""

    @property
    def reactor(self) -> Reactor:
        """For the line."""

    def payload(self, number: int) -> SpawnPayload:
        """What to start the worker of this number with."""

    def introduce(self, child: "Child") -> None:
        """A worker process has been started: connect it with the others."""

    def died(self, child: "Child") -> None:
        """Its process is gone."""


class Child:
    """A worker, through all the processes that it has one after the other. `owner` gets what they say on their lines."""

    def __init__(self, number: int, parent: ChildOwner, owner: ChannelOwner) -> None:
        self.number = number
        self.channel: Channel | None = None
        self.prepared = trio.Event()
        """Set once a process of it has been able to prepare everything that it needs to serve."""
        self.is_ready = False
        self.serves = False
        """Its doors no longer wait for relays."""
        self.has_closed = False
        """After `stop` or `let_go`: it takes no more clients."""
        self.pid = 0
        self.last_beat = 0.0
        self._parent = parent
        self._process: trio.Process | None = None
        self._owner = owner
        self._ready = trio.Event()
        self._has_started = False
        """Whether `started()` has been called."""
        self._is_stopping = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the worker alive until `stop`, or until cancelled, which kills it. `started()` when it serves for the first time.

        Raises:
            FxError: the first process did not get ready; another one would not either.
        """
        pause_s, backoff_s, is_first = 0.0, FIRST_BACKOFF_S, True
        while True:
            began = trio.current_time()
            try:
                ending = await self._live_after(pause_s, task_status)
            except Exception:
                logger.exception("worker %d cannot be looked after", self.number)
                ending = "an internal error"
            if self._is_stopping:
                return
            lasted_s = max(0.0, trio.current_time() - began - pause_s)
            if is_first and not self._ready.is_set():
                raise FxError(f"worker {self.number} did not start ({ending}); its log lines say why")
            is_first = False
            pause_s = backoff_s = FIRST_BACKOFF_S if lasted_s >= SETTLED_S else backoff_s
            logger.error("worker %d has died (%s) after %.0f s; it is started again in %g s", self.number, ending, lasted_s, pause_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def take_turn(self) -> None:
        """Let it serve: nobody else uses its listening sockets any more."""
        if self.channel is not None:
            self.channel.send({"op": "go"})

    def stop(self) -> None:
        """Have it drain and end."""
        self._wind_up("stop")

    def let_go(self) -> None:
        """Have it close its listening sockets, which a successor has, and keep its open connections. Call `depart` afterwards."""
        self._wind_up("let-go")

    def depart(self) -> None:
        """Have it send its relays to the gateway's successor, and end when its clients have ended."""
        if self.channel is not None:
            self.channel.send({"op": "depart"})

    def start_again(self, why: str) -> None:
        """Kill the present process, if there is one; `run` starts another."""
        self.kill(f"is started again: {why}")

    def kill(self, why: str) -> None:
        """Kill the present process, if there is one."""
        if self._process is not None and self._process.returncode is None:
            logger.error("worker %d %s", self.number, why)
            self._process.send_signal(signal.SIGKILL)

    def beat(self) -> None:
        """It has given a sign of life."""
        self.last_beat = trio.current_time()

    def became_ready(self) -> None:
        """It has said that it serves."""
        self.is_ready = True
        self._ready.set()

    def _wind_up(self, order: str) -> None:
        self._is_stopping = True
        if self.channel is not None and self.is_ready:
            self.channel.send({"op": order})
        else:
            self.kill("ends before it has served")

    async def _live_after(self, pause_s: float, task_status: trio.TaskStatus[None]) -> str:
        """One process from start to end; returns how it ended, for the log. A start that fails (descriptors, memory) is an end, too."""
        await trio.sleep(pause_s)
        if self._is_stopping:
            return "not wanted any more"
        try:
            process, line = await self._start()
        except (OSError, RuntimeError) as exc:  # descriptors, memory, processes; a thread to start it from
            return _reason(exc)
        self._process, self.pid, self.last_beat = process, process.pid, trio.current_time()
        self.channel = Channel(self._parent.reactor, line, self._owner, self.number)
        try:
            if self._is_stopping:
                return "not wanted any more"
            try:
                self._equip(self.channel)
                self._parent.introduce(self)
            except OSError as exc:
                return _reason(exc)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_going, f"watching worker {self.number}", partial(self._watch, process))
                if not self._has_started:
                    nursery.start_soon(self._report, task_status)
                code = await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            await self._end(process)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _start(self) -> tuple[trio.Process, socket.socket]:
        """A process, and our end of the line to it."""
        ours, theirs = pair()
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-P", "-m", "fxgateway.workers.worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=_environ(),
                )
        except BaseException:
            ours.close()
            raise
        return process, ours

    async def _end(self, process: trio.Process) -> None:
        """The process is over, or is killed now."""
        try:
            if process.returncode is None:
                process.kill()
                with trio.move_on_after(LOOK_S, shield=True):
                    await process.wait()
        finally:
            self.is_ready, self.serves, self.pid = False, False, 0
            if self.channel is not None:
                self.channel.close()
                self.channel = None
            self._parent.died(self)

    def _equip(self, channel: Channel) -> None:
        payload = self._parent.payload(self.number)
        try:
            send_sockets(channel, payload.sockets)
            send_sockets(channel, list(payload.own.items()))
        finally:
            for sock in payload.own.values():
                sock.close()
        channel.send(payload.message)

    async def _report(self, task_status: trio.TaskStatus[None]) -> None:
        await self._ready.wait()
        self._has_started = True
        task_status.started()

    async def _watch(self, process: trio.Process) -> None:
        while True:
            looked_at = trio.current_time()
            await trio.sleep(LOOK_S)
            if trio.current_time() - looked_at > 2 * LOOK_S:
                self.last_beat = trio.current_time()  # this process itself was held up, and has not read yet what the worker said meanwhile
            silent_s = trio.current_time() - self.last_beat
            if silent_s > (SILENT_S if self.is_ready else READY_S):
                logger.error("worker %d has said nothing for %.0f s and is killed", self.number, silent_s)
                process.send_signal(signal.SIGKILL)


def send_sockets(channel: Channel, sockets: Sequence[tuple[str, socket.socket]]) -> None:
    """Send copies of listening sockets, with the addresses by which the configuration knows them, or of lines, with their names."""
    for start in range(0, len(sockets), MAX_SOCKETS):
        some = sockets[start : start + MAX_SOCKETS]
        copies = [sock.dup() for _, sock in some]
        if not channel.send({"op": "sockets", "addresses": [address for address, _ in some]}, copies):
            for copy in copies:
                copy.close()


def _environ() -> dict[str, str]:
    """Our environment with this installation on PYTHONPATH, and without the variables that only one process may act on."""
    environ = {
        name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "WATCHDOG_USEC")
    }
    root = str(Path(fxgateway.__file__).parents[1])
    environ["PYTHONPATH"] = os.pathsep.join(part for part in (root, environ.get("PYTHONPATH", "")) if part)
    return environ


def _reason(exc: Exception) -> str:
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
