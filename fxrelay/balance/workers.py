"""Task: the relay's end of the script processes: started on demand, kept warm, one call at a time each, replaced when one misbehaves."""

import json
import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fxrelay.balance.worker_main import LENGTH, MAX_ANSWER_BYTES

logger = logging.getLogger(__name__)

PROCESSES: Final = 2
"""Script processes, and decisions with scripts at once; further decisions wait for one."""
START_S: Final = 10.0
"""For a process to start, on a busy machine, beside the script's own time."""
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ScriptLimits:
    """What one call of one script may take."""

    timeout_s: float = 5.0
    memory_bytes: int = 64 << 20


class Workers:
    """A few script processes. `call` may be used by many tasks at once; `close` ends the processes."""

    def __init__(self, limits: ScriptLimits, directory: Path) -> None:
        self.limits = limits
        self._directory = directory
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._limiter = trio.CapacityLimiter(PROCESSES)
        self._threads = trio.CapacityLimiter(PROCESSES)
        self.started = 0

    async def call(self, kind: str, spec: str, text: str) -> Answer:
        """Run a script; `kind` is "js", "exec" or "python". Every failure is an answer of its own kind. Cancelling kills the process."""
        limits = self.limits
        head = json.dumps({"kind": kind, "spec": spec, "limit_s": limits.timeout_s, "memory_bytes": limits.memory_bytes})
        async with self._limiter:
            worker = self._idle.pop() if self._idle else _Worker(self._directory, limits.memory_bytes)
            self._busy.add(worker)
            usable = False
            try:
                answer = await trio.to_thread.run_sync(
                    worker.call, head, text, limits.timeout_s, abandon_on_cancel=True, limiter=self._threads
                )
                usable = worker.is_usable
            finally:
                self._busy.discard(worker)
                if usable:
                    self._idle.append(worker)
                else:
                    worker.kill()
        return answer

    def close(self) -> None:
        """Kill the processes. May be repeated."""
        for worker in [*self._idle, *self._busy]:
            worker.kill()
        self._idle.clear()


class _Worker:
    """One process and the socket to it. `call` blocks; `kill` may come from another thread meanwhile."""

    def __init__(self, directory: Path, memory_bytes: int) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._killed = False
        self.is_usable = True

    def call(self, head: str, text: str, timeout_s: float) -> Answer:
        """Send one request and wait for its answer."""
        self.is_usable = False
        try:
            channel = self._channel or self._start()
            channel.settimeout(timeout_s + (0.5 if self._channel is not None else START_S))
            self._channel = channel
            for part in (head.encode(), text.encode()):
                channel.sendall(LENGTH.pack(len(part)))
                channel.sendall(part)
            (length,) = LENGTH.unpack(_receive(channel, LENGTH.size))
            if length > MAX_ANSWER_BYTES:
                return _failed("BadReturn", "the balancing script broke its process")
            answer = json.loads(_receive(channel, length))
        except TimeoutError:
            return _failed("ScriptTimeout", "the balancing script took too long")
        except (OSError, EOFError, ValueError) as exc:
            return _failed("ScriptDied", "the balancing script's process died", f"{type(exc).__name__}: {exc}")
        if not isinstance(answer, dict):
            return _failed("BadReturn", "the balancing script broke its process")
        self.is_usable = True
        return answer

    def kill(self) -> None:
        """End the process, whatever it does. May be repeated."""
        self._killed = True
        process, channel = self._process, self._channel
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()  # a killed process ends at once
        if channel is not None:
            channel.close()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(self._directory))))
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter and a module of ours
                [sys.executable, "-m", "fxrelay.balance.worker_main", str(theirs.fileno()), str(self._memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if self._killed:  # meanwhile
            self._process.kill()
            self._process.wait()
        return ours


def _receive(channel: socket.socket, size_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < size_bytes:
        block = channel.recv(size_bytes - len(received))
        if not block:
            raise EOFError("the channel ended")
        received += block
    return bytes(received)


def _failed(name: str, message: str, detail: str = "") -> Answer:
    return {"kind": "failed", "name": name, "message": message, "detail": detail}
