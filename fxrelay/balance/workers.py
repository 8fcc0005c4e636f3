"""Task: the relay's end of the script processes: started on demand, kept warm, one call at a time each, replaced when one misbehaves."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fxrelay.balance.answers import Answer, failed
from fxrelay.balance.script_input import ScriptInput
from fxrelay.balance.sent_texts import SentTexts
from fxrelay.balance.worker_main import LENGTH, MAX_ANSWER_BYTES, READY

logger = logging.getLogger(__name__)

PROCESSES: Final = 2
"""Script processes of each kind, and decisions with such scripts at once; further decisions wait for one."""
START_S: Final = 10.0
"""For a process to start, on a busy machine, beside the script's own time."""
GRACE_S: Final = 2.0
"""For a process to end its executable and itself, when nobody wants the answer any more."""
MAX_COMPLAINT_BYTES: Final = 65_536
SHOWN_COMPLAINT: Final = 2_000
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")

_ROOT: Final = Path(__file__).absolute().parents[2]


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
        self.started = 0
        """Processes so far."""

    async def call(self, kind: str, spec: str, given: ScriptInput) -> Answer:
        """Run a script; `kind` is "js", "exec" or "python"; "owner-exec" and "owner-python" get `given.base` alone. Every failure is an
        answer of its own kind. Cancelling kills the process.
        """
        limits = self.limits
        counts = [[count.index, count.sessions, count.in_flight] for count in given.counts]
        head = {"kind": kind, "spec": spec, "limit_s": limits.timeout_s, "memory_bytes": limits.memory_bytes}
        head |= {"base": given.base, "counts": counts}
        own = self._kinds.setdefault(kind, _Kind())
        async with own.limiter:
            worker = own.idle_one() or self._new_one()
            own.busy.add(worker)
            usable = False
            try:
                answer = await trio.to_thread.run_sync(
                    worker.call, head, given.servers, limits.timeout_s, abandon_on_cancel=True, limiter=own.threads
                )
                usable = worker.is_usable
            finally:
                own.busy.discard(worker)
                if usable:
                    own.idle.append(worker)
                else:
                    worker.abandon()
        return answer

    def _new_one(self) -> "_Worker":
        self.started += 1
        return _Worker(self._directory, self.limits.memory_bytes)

    def close(self) -> None:
        """Kill the processes. May be repeated."""
        for kind in self._kinds.values():
            for worker in kind.idle:
                worker.kill()
            kind.idle.clear()
            for worker in kind.busy:
                worker.stop()


class _Kind:
    """The processes of one kind of scripts: what a Python function leaves behind in its process is not for the others."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []
        self.busy: set[_Worker] = set()
        self.limiter = trio.CapacityLimiter(PROCESSES)
        self.threads = trio.CapacityLimiter(PROCESSES)

    def idle_one(self) -> "_Worker | None":
        """A process that waits for work."""
        while self.idle:
            worker = self.idle.pop()
            if worker.is_alive:
                return worker
            worker.kill()
        return None


class _Worker:
    """One process and the socket to it. `call` blocks, and ends the process itself unless it can be used again; `stop` may come from
    another thread meanwhile; `kill` is for a worker that is not in a call.
    """

    def __init__(self, directory: Path, memory_bytes: int) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._stderr: int | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._is_in_call = False
        self._grace_s = 0.0
        self._texts = SentTexts()
        self.is_usable = True

    @property
    def is_alive(self) -> bool:
        """Whether its process still runs."""
        return self._process is not None and self._process.poll() is None

    def call(self, head: Mapping[str, Any], servers: Sequence[str], timeout_s: float) -> Answer:
        """Send one request and wait for its answer."""
        self._grace_s = GRACE_S if head["kind"].endswith("exec") else 0.0
        self.is_usable = False
        with self._lock:
            self._is_in_call = True
        try:
            answer = self._answer(json.dumps(head).encode(), self._texts.pack(servers), timeout_s)
        except TimeoutError:
            answer = failed("ScriptTimeout", "the balancing script took too long")
        except (OSError, EOFError, ValueError) as exc:
            answer = failed("ScriptDied", "the balancing script's process died", f"{type(exc).__name__}: {exc} {self._complaint()}")
        finally:
            with self._lock:
                self._is_in_call = False
                self.is_usable = self.is_usable and not self._stopped
            if not self.is_usable:
                self.kill()
        return answer

    def stop(self) -> None:
        """Have it ended soon, without waiting: the process sees its socket end, and `call`, if it runs, returns. May be repeated."""
        self._stopped = True
        channel = self._channel
        if channel is not None:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Nobody will use it again: a call that runs ends it, and where the call was over already, this does. May be repeated."""
        with self._lock:
            self._stopped = True
            is_over = not self._is_in_call
        if is_over:
            self.kill()
        else:
            self.stop()

    def kill(self) -> None:
        """End the process, whatever it does; its executable first, which it does itself. May be repeated."""
        self.stop()
        process, channel = self._process, self._channel
        if process is not None and process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(self._grace_s)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()  # a killed process ends at once
        if channel is not None:
            channel.close()
        stderr, self._stderr = self._stderr, None
        if stderr is not None:
            os.close(stderr)

    def _complaint(self) -> str:
        """What came on its stderr since the last call; the pipe holds 64 KiB, and what is more is lost."""
        if self._stderr is None:
            return ""
        with suppress(BlockingIOError):
            return os.read(self._stderr, MAX_COMPLAINT_BYTES).decode(errors="replace")[-SHOWN_COMPLAINT:].strip()
        return ""

    def _answer(self, head: bytes, packed: bytes, timeout_s: float) -> Answer:
        if self._stopped:
            raise EOFError("not wanted any more")
        channel = self._channel or self._start()
        if self._stopped:
            raise EOFError("not wanted any more")
        channel.settimeout(timeout_s + 0.5)
        for part in (head, packed):
            channel.sendall(LENGTH.pack(len(part)))
            channel.sendall(part)
        (length,) = LENGTH.unpack(_receive(channel, LENGTH.size))
        answer = json.loads(_receive(channel, length)) if length <= MAX_ANSWER_BYTES else None
        if not isinstance(answer, dict):
            return failed("BadReturn", "the balancing script broke its process")
        self.is_usable = True
        self._grace_s = 0.0
        self._complaint()
        return answer

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._stderr, stderr = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(_ROOT))))
            # -P: nothing is imported from the working directory, whoever may write there.
            module = ("fxrelay.balance.worker_main", str(theirs.fileno()), str(self._memory_bytes), str(self._directory))
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter and a module of ours
                [sys.executable, "-P", "-m", *module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(stderr)
        self._channel = ours
        ours.settimeout(START_S)
        if _receive(ours, len(READY)) != READY:
            raise EOFError("it did not start")
        return ours


def _receive(channel: socket.socket, size_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < size_bytes:
        block = channel.recv(size_bytes - len(received))
        if not block:
            raise EOFError("the channel ended")
        received += block
    return bytes(received)
