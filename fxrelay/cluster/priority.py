"""Task: the scheduling priority of the processes that this relay starts, however the kernel groups processes.

Niceness only counts within a session where the kernel groups processes by session (sched(7), autogroup), so the whole session is made
as nice. What the kernel does not have, or does not let us do, is left out.
"""

import ctypes
import os
import platform
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

SLICE_NS: Final = 100_000
"""Who wakes up waits so long at most for the slice that is under way here. The kernel's own is 1.4 ms on two processors, 2.8 on eight."""
PROC: Final = Path("/proc")
ATTEMPTS: Final = 10
AGAIN_S: Final = 0.05
"""Between two attempts at `set_session_nice`."""
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
_ATTRIBUTES: Final = struct.Struct("IIQiIQQQ")
"""struct sched_attr (sched_setattr(2)): size, policy, flags, nice, priority, runtime, deadline, period."""


def set_session_nice(pid: int, nice: int, proc: Path = PROC) -> bool:
    """For the session of this process. False: not now; without privileges the kernel takes one such wish in 100 ms, of all processes."""
    try:
        (proc / str(pid) / "autogroup").write_text(str(nice))
    except BlockingIOError:
        return False
    except OSError:
        pass  # this kernel has no such thing, or the process is gone
    return True


def interrupt_nobody(pid: int, nice: int) -> None:
    """This process (0: our own), and what it starts from now on, interrupts nobody by waking up, and nobody waits long for it to pause."""
    with suppress(OSError):
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:  # from Linux 6.12 on `runtime` is the length of a slice; before, it is ignored
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_BATCH, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_int(pid), attributes, ctypes.c_uint(0))
