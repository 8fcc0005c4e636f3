"""Task: a script process that gives way to streams, however the kernel groups processes; and the relay's say in how far it does."""

import ctypes
import os
import platform
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

NICE: Final = 5
PATIENT_NICE: Final = 19
"""Of the session, while its answers come in time: with this and short slices who wakes up runs at once, with NICE it does not."""
LOOK_S: Final = 0.02
STARVED_SHARE: Final = 1 / 16
"""Of a processor: beside streams alone a process gets a tenth and more, beside who takes all there is a fiftieth."""
URGENT_S: Final = 2.0
SLICE_NS: Final = 100_000
"""Who wakes up waits so long at most for the slice that is under way here. The kernel's own is 1.4 ms on two processors, 2.8 on eight."""
_PROC: Final = Path("/proc")
_ATTEMPTS: Final = 10
_AGAIN_S: Final = 0.05
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
_ATTRIBUTES: Final = struct.Struct("IIQiIQQQ")
"""struct sched_attr (sched_setattr(2)): size, policy, flags, nice, priority, runtime, deadline, period."""


def give_way() -> None:
    """Let this process, the leader of a session of its own, and all it starts, be NICE more to others, and interrupt nobody by waking up.

    Niceness only counts within a session where the kernel groups processes by session (sched(7), autogroup), so the whole session is made
    as nice. What the kernel does not have, or does not let us do, is left out: a script is asked all the same.
    """
    with suppress(OSError):
        os.nice(NICE)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _set_nice_soon(_PROC, os.getpid(), os.getpriority(os.PRIO_PROCESS, 0))
    _shorten_slices(os.getpriority(os.PRIO_PROCESS, 0))


class Patience:
    """How far one script process, the leader of its session, gives way: quite, unless others leave it no processor to answer in time.

    Who gives way quite gets 1.5 % of a processor that others keep busy: enough for a few logins, too little for fifty a second.
    So whoever asks looks every LOOK_S (`look`); if the process ran for less than STARVED_SHARE of that, it is urgent for URGENT_S.
    """

    def __init__(self, pid: int, proc: Path = _PROC) -> None:
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
            self._is_patient = _set_nice(self._proc, self._pid, PATIENT_NICE)

    def look(self, now_s: float) -> bool:
        """It has not answered for another LOOK_S. False: there is no need to look again."""
        ran_ns = _ran_ns(self._proc, self._pid)
        elapsed_s = now_s - self._looked_at_s if self._looked_at_s else 0.0
        if elapsed_s and (ran_ns - self._ran_ns) / 1e9 < STARVED_SHARE * elapsed_s:
            self._is_patient = not _set_nice(self._proc, self._pid, NICE)
            self._urgent_until_s = now_s + URGENT_S
        self._looked_at_s, self._ran_ns = now_s, ran_ns
        return self._is_patient

    def end(self) -> None:
        """It is asked something that somebody else waits for, in a thread: it may take what it needs. Waits for half a second at most."""
        if self._is_patient:
            self._is_patient = not _set_nice_soon(self._proc, self._pid, NICE)


def _set_nice(proc: Path, pid: int, nice: int) -> bool:
    """Of a session; False: not now, since without privileges the kernel takes one such wish in 100 ms, of all processes."""
    try:
        (proc / str(pid) / "autogroup").write_text(str(nice))
    except BlockingIOError:
        return False
    except OSError:
        pass  # this kernel has no such thing, or the process is gone
    return True


def _set_nice_soon(proc: Path, pid: int, nice: int) -> bool:
    for _ in range(_ATTEMPTS):
        if _set_nice(proc, pid, nice):
            return True
        time.sleep(_AGAIN_S)
    return False


def _ran_ns(proc: Path, pid: int) -> int:
    """Of a processor, since it began (proc(5), schedstat); 0 where that is not told."""
    with suppress(OSError, ValueError, IndexError):
        return int((proc / str(pid) / "schedstat").read_text().split()[0])
    return 0


def _shorten_slices(nice: int) -> None:
    """From Linux 6.12 on `runtime` is the length of a slice; before, it is ignored."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_BATCH, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))
