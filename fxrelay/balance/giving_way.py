"""Task: a script process that gives way to streams, however the kernel groups processes."""

import ctypes
import os
import platform
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

NICE: Final = 5
SLICE_NS: Final = 100_000
"""Who wakes up waits so long at most for the slice that is under way here. The kernel's own is 1.4 ms on two processors, 2.8 on eight."""
_AUTOGROUP: Final = Path("/proc/self/autogroup")
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
    _set_autogroup(os.getpriority(os.PRIO_PROCESS, 0))
    _shorten_slices(os.getpriority(os.PRIO_PROCESS, 0))


def _set_autogroup(nice: int) -> None:
    for _ in range(_ATTEMPTS):
        try:
            _AUTOGROUP.write_text(str(nice))
        except BlockingIOError:
            time.sleep(_AGAIN_S)  # without privileges the kernel takes one in 100 ms, of all processes
        except OSError:
            return
        else:
            return


def _shorten_slices(nice: int) -> None:
    """From Linux 6.12 on `runtime` is the length of a slice; before, it is ignored."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_BATCH, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))
