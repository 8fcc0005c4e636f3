"""Task: a script process that gives way to streams, however the kernel groups processes; and the relay's say in how far it does."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from fxrelay.cluster.priority import AGAIN_S, ATTEMPTS, PROC, interrupt_nobody, set_session_nice

NICE: Final = 5
PATIENT_NICE: Final = 19
"""Of the session, while its answers come in time: with this and short slices who wakes up runs at once, with NICE it does not."""
LOOK_S: Final = 0.02
STARVED_SHARE: Final = 1 / 16
"""Of a processor: beside streams alone a process gets a tenth and more, beside who takes all there is a fiftieth."""
URGENT_S: Final = 2.0


def give_way() -> None:
    """Let this process, the leader of a session of its own, and all it starts, be NICE more to others, and interrupt nobody by waking up.

    What the kernel does not let us do is left out: a script is asked all the same.
    """
    with suppress(OSError):
        os.nice(NICE)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    _set_nice_soon(PROC, os.getpid(), nice)
    interrupt_nobody(0, nice)


class Patience:
    """How far one script process, the leader of its session, gives way: quite, unless others leave it no processor to answer in time.

    Who gives way quite gets 1.5 % of a processor that others keep busy: enough for a few logins, too little for fifty a second.
    So whoever asks looks every LOOK_S (`look`); if the process ran for less than STARVED_SHARE of that, it is urgent for URGENT_S.
    """

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self._pid = pid
        self._proc = proc
        self._is_patient = False
        self._urgent_until_s = 0.0
        self._looked_at_s = 0.0
        self._ran_ns = 0

    def begin(self, now_s: float) -> None:
        """It is asked something."""
        self._looked_at_s = 0.0
        if not self._is_patient and now_s >= self._urgent_until_s:
            self._is_patient = set_session_nice(self._pid, PATIENT_NICE, self._proc)

    def look(self, now_s: float) -> bool:
        """It has not answered for another LOOK_S. Returns whether to look again."""
        ran_ns = _ran_ns(self._proc, self._pid)
        elapsed_s = now_s - self._looked_at_s if self._looked_at_s else 0.0
        if elapsed_s and (ran_ns - self._ran_ns) / 1e9 < STARVED_SHARE * elapsed_s:
            self._is_patient = not set_session_nice(self._pid, NICE, self._proc)
            self._urgent_until_s = now_s + URGENT_S
        self._looked_at_s, self._ran_ns = now_s, ran_ns
        return self._is_patient

    def end(self) -> None:
        """It is asked something that somebody else waits for, in a thread: it may take what it needs. Waits for half a second at most."""
        if self._is_patient:
            self._is_patient = not _set_nice_soon(self._proc, self._pid, NICE)


def _set_nice_soon(proc: Path, pid: int, nice: int) -> bool:
    for _ in range(ATTEMPTS):
        if set_session_nice(pid, nice, proc):
            return True
        time.sleep(AGAIN_S)
    return False


def _ran_ns(proc: Path, pid: int) -> int:
    """Of a processor, since it began (proc(5), schedstat); 0 where that is not told."""
    with suppress(OSError, ValueError, IndexError):
        return int((proc / str(pid) / "schedstat").read_text().split()[0])
    return 0
