"""Task: one script process, the socket to it, and how it ends. `Workers` has a few of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fxrelay.balance import script_call
from fxrelay.balance.answers import Answer, failed
from fxrelay.balance.candidates import CandidateList, CandidateSubset
from fxrelay.balance.niceness import Patience
from fxrelay.balance.script_call import ScriptCall
from fxrelay.balance.sent_texts import SentTexts
from fxrelay.balance.worker_main import LENGTH, MAX_ANSWER_BYTES, READY

if TYPE_CHECKING:
    from fxtunnel.engine.reactor import Reactor

START_S: Final = 10.0
"""For a process to start, on a busy machine, beside the script's own time."""
GRACE_S: Final = 2.0
"""For a process to end its executable and itself, when nobody wants the answer any more."""
LATE_BY_S: Final = 0.5
"""Beside the script's own time, for its process to say itself that it took too long."""
MAX_COMPLAINT_BYTES: Final = 65_536
SHOWN_COMPLAINT: Final = 2_000
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")

_ROOT: Final = Path(__file__).absolute().parents[2]


class ScriptProcess:
    """One process and the socket to it. `call` blocks, and ends the process itself unless it can be used again; `stop` may come from
    another thread meanwhile; `kill` is for a worker that is not in a call.
    """

    def __init__(self, directory: Path, memory_bytes: int) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._patience: Patience | None = None
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

    def pack(self, servers: Sequence[str] | CandidateList | CandidateSubset) -> bytes:
        """The servers for the next request, which must be the next one that is sent."""
        return self._texts.pack_offered(servers) if isinstance(servers, CandidateList | CandidateSubset) else self._texts.pack(servers)

    def call(self, head: Mapping[str, Any], packed: bytes, timeout_s: float) -> Answer:
        """Send one request and wait for its answer."""
        self._set_grace(head)
        self.is_usable = False
        with self._lock:
            self._is_in_call = True
        try:
            answer = self._answer(json.dumps(head).encode(), packed, timeout_s)
        except TimeoutError:
            answer = failed("ScriptTimeout", "the balancing script took too long")
        except (OSError, EOFError, ValueError) as exc:
            answer = failed("ScriptDied", "the balancing script's process died", f"{type(exc).__name__}: {exc} {self.complaint()}")
        finally:
            with self._lock:
                self._is_in_call = False
                self.is_usable = self.is_usable and not self._stopped
            if not self.is_usable:
                self.kill()
        return answer

    def script_call(
        self,
        reactor: "Reactor",
        head: Mapping[str, Any],
        servers: Sequence[str] | CandidateList | CandidateSubset,
        timeout_s: float,
        then: script_call.Then,
    ) -> ScriptCall:
        """Send one request, without waiting for its answer; the process must have answered one before."""
        assert self._channel is not None
        assert self._patience is not None
        self._set_grace(head)
        self._patience.begin(reactor.now)
        packed = self.pack(servers)
        text = json.dumps(head).encode()
        request = b"".join((LENGTH.pack(len(text)), text, LENGTH.pack(len(packed)), packed))
        return ScriptCall(reactor, self._channel, request, timeout_s + LATE_BY_S, then)

    def look(self, now_s: float) -> bool:
        """The answer to a `script_call` has not come for LOOK_S. False: no need to look again."""
        return self._patience is not None and self._patience.look(now_s)

    def answered(self) -> None:
        """The answer to a `script_call` came."""
        self._grace_s = 0.0
        self.complaint()

    def _set_grace(self, head: Mapping[str, Any]) -> None:
        self._grace_s = GRACE_S if head["kind"].endswith("exec") else 0.0

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

    def kill_at_once(self) -> None:
        """As `kill`, without waiting for what an executable does. May be repeated."""
        self._grace_s = 0.0
        self.kill()

    def complaint(self) -> str:
        """What came on its stderr since the last call; the pipe holds 64 KiB, and what is more is lost."""
        if self._stderr is None:
            return ""
        with suppress(BlockingIOError):
            return os.read(self._stderr, MAX_COMPLAINT_BYTES).decode(errors="replace")[-SHOWN_COMPLAINT:].strip()
        return ""

    def _answer(self, head: bytes, packed: bytes, timeout_s: float) -> Answer:
        if self._stopped:
            raise EOFError("not wanted any more")
        if self._patience is not None:
            self._patience.end()
        channel = self._channel or self._start()
        if self._stopped:
            raise EOFError("not wanted any more")
        channel.settimeout(timeout_s + LATE_BY_S)
        for part in (head, packed):
            channel.sendall(LENGTH.pack(len(part)))
            channel.sendall(part)
        (length,) = LENGTH.unpack(_receive(channel, LENGTH.size))
        answer = json.loads(_receive(channel, length)) if length <= MAX_ANSWER_BYTES else None
        if not isinstance(answer, dict):
            return failed("BadReturn", "the balancing script broke its process")
        self.is_usable = True
        self._grace_s = 0.0
        self.complaint()
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
        self._patience = Patience(self._process.pid)
        return ours


def _receive(channel: socket.socket, size_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < size_bytes:
        block = channel.recv(size_bytes - len(received))
        if not block:
            raise EOFError("the channel ended")
        received += block
    return bytes(received)
