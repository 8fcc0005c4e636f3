"""Task: the relay's end of the script processes: started on demand, kept warm, one call at a time each, replaced when one misbehaves."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from fxrelay.balance import script_call
from fxrelay.balance.answers import Answer, failed
from fxrelay.balance.candidates import CandidateList, CandidateSubset
from fxrelay.balance.niceness import LOOK_S
from fxrelay.balance.script_input import ScriptInput
from fxrelay.balance.script_process import ScriptProcess

if TYPE_CHECKING:
    from fxtunnel.engine.reactor import Reactor

logger = logging.getLogger(__name__)

PROCESSES: Final = 2
"""Script processes of each kind, and decisions with such scripts at once; further decisions wait for one."""


@dataclass(frozen=True, slots=True)
class ScriptLimits:
    """What one call of one script may take."""

    timeout_s: float = 5.0
    memory_bytes: int = 64 << 20


class Workers:
    """A few script processes of each kind. `call` may be used by many tasks at once; `close` ends the processes."""

    def __init__(self, limits: ScriptLimits, directory: Path) -> None:
        self.limits = limits
        self._directory = directory
        self._kinds: dict[str, _Kind] = {}
        self.reactor: Reactor | None = None
        """For `ask`; without it, `call` is the only way."""
        self.started = 0
        """Processes so far."""

    async def call(self, kind: str, spec: str, given: ScriptInput, offered: CandidateList | CandidateSubset | None = None) -> Answer:
        """Run a script; `kind` is "js", "exec" or "python"; "owner-exec" and "owner-python" get `given.base` alone. With `offered`, the
        servers are those. Every failure is an answer of its own kind. Cancelling kills the process.
        """
        head = self._head(kind, spec, given)
        own = self._kinds.setdefault(kind, _Kind())
        is_called = False

        def call() -> Answer:
            nonlocal is_called
            is_called = True
            return worker.call(head, packed, self.limits.timeout_s)

        async with own.limiter:
            worker = own.idle_one() or self._new_one()
            own.busy.add(worker)
            usable = False
            try:
                packed = worker.pack(given.servers if offered is None else offered)  # here: what is offered changes, and in this thread
                answer = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=own.threads)
                usable = worker.is_usable
            except RuntimeError as exc:
                if is_called:
                    raise
                answer = failed("NoThread", "the balancing script could not be asked", str(exc))
            finally:
                own.busy.discard(worker)
                if usable:
                    own.idle.append(worker)
                else:
                    worker.abandon()
        return answer

    def ask(
        self, kind: str, spec: str, given: ScriptInput, offered: CandidateList | CandidateSubset | None, then: Callable[[Answer], None]
    ) -> "Asked | None":
        """As `call`, for the reactor: `then` is called later with the answer, unless what is returned is cancelled:
        that kills the process. With `offered`, the servers are those, as they are now. None: no process is warm and free; use `call`.
        """
        reactor, own = self.reactor, self._kinds.get(kind)
        worker = own.idle_one() if reactor is not None and own is not None else None
        if reactor is None or own is None or worker is None:
            return None
        try:
            own.limiter.acquire_on_behalf_of_nowait(worker)
        except trio.WouldBlock:
            own.idle.append(worker)
            return None
        own.busy.add(worker)
        asking = (self._head(kind, spec, given), given.servers if offered is None else offered)
        try:
            return Asked(reactor, own, worker, asking, self.limits.timeout_s, then)
        except OSError as exc:  # the kernel has no room for another registration
            logger.warning("a balancing script could not be asked by its process: %s", exc.strerror)
            own.busy.discard(worker)
            own.limiter.release_on_behalf_of(worker)
            worker.kill_at_once()  # part of the question may have been sent
            return None

    def _head(self, kind: str, spec: str, given: ScriptInput) -> dict[str, Any]:
        counts = [[count.index, count.sessions, count.in_flight] for count in given.counts]
        head = {"kind": kind, "spec": spec, "limit_s": self.limits.timeout_s, "memory_bytes": self.limits.memory_bytes}
        return head | {"base": given.base, "counts": counts}

    def _new_one(self) -> ScriptProcess:
        self.started += 1
        return ScriptProcess(self._directory, self.limits.memory_bytes)

    def close(self) -> None:
        """Kill the processes. May be repeated."""
        for kind in self._kinds.values():
            for worker in kind.idle:
                worker.kill()
            kind.idle.clear()
            for asked in list(kind.asked):
                asked.close()
            for worker in kind.busy:
                worker.stop()


class _Kind:
    """The processes of one kind of scripts: what a Python function leaves behind in its process is not for the others."""

    def __init__(self) -> None:
        self.idle: list[ScriptProcess] = []
        self.busy: set[ScriptProcess] = set()
        self.asked: set[Asked] = set()
        self.limiter = trio.CapacityLimiter(PROCESSES)
        self.threads = trio.CapacityLimiter(PROCESSES)

    def idle_one(self) -> ScriptProcess | None:
        """A process that waits for work."""
        while self.idle:
            worker = self.idle.pop()
            if worker.is_alive:
                return worker
            worker.kill()
        return None


class Asked:
    """A call from the reactor that is not answered yet. The process is back among the idle ones, or given up, before `then` is called."""

    def __init__(
        self,
        reactor: "Reactor",
        own: _Kind,
        worker: ScriptProcess,
        asking: tuple[Mapping[str, Any], Sequence[str] | CandidateList | CandidateSubset],
        timeout_s: float,
        then: Callable[[Answer], None],
    ) -> None:
        self._own = own
        self._worker = worker
        self._then = then
        self._reactor = reactor
        self._question = worker.script_call(reactor, *asking, timeout_s, self._told)
        self._next_look = reactor.call_later(LOOK_S, self._look)
        own.asked.add(self)

    def cancel(self) -> None:
        """Nobody wants the answer any more: the process is killed, without waiting for that. May be repeated, also after the answer."""
        if self._leave():
            self._give_up()

    def close(self) -> None:
        """As `cancel`, but its process has ended when this returns."""
        if self._leave():
            self._worker.kill()

    def _leave(self) -> bool:
        if self not in self._own.asked:
            return False
        self._question.abandon()
        self._next_look.cancel()
        self._own.asked.discard(self)
        self._own.busy.discard(self._worker)
        self._own.limiter.release_on_behalf_of(self._worker)
        return True

    def _look(self) -> None:
        if self._worker.look(self._reactor.now):
            self._next_look = self._reactor.call_later(LOOK_S, self._look)

    def _give_up(self) -> None:
        try:
            # It may take GRACE_S for an executable to end.
            trio.lowlevel.start_thread_soon(self._worker.kill, lambda _: None, "ending-a-script")
        except RuntimeError as exc:
            logger.warning("no thread can be started (%s): a script is ended without grace", exc)
            self._worker.kill_at_once()

    def _told(self, answer: Answer | str) -> None:
        if not self._leave():
            return
        if not isinstance(answer, str):
            self._worker.answered()
            self._own.idle.append(self._worker)
            self._then(answer)
            return
        complaint = self._worker.complaint()
        self._give_up()
        match answer:
            case script_call.LATE:
                self._then(failed("ScriptTimeout", "the balancing script took too long"))
            case script_call.GARBAGE:
                self._then(failed("BadReturn", "the balancing script broke its process"))
            case _:
                self._then(failed("ScriptDied", "the balancing script's process died", f"the channel ended {complaint}"))
