"""Comes first in daemons whose PYTHONPATH has this folder: at each SIGUSR2 they add a line about what they hold to a file of their own."""

import ctypes
import gc
import json
import os
import signal
import sys


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3), glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def _begin(directory: str) -> None:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    # Opened now: a gateway opens no files once it runs.
    out = os.open(os.path.join(directory, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(*_: object) -> None:
        blocks = sys.getallocatedblocks()
        tasks = sum(type(one).__qualname__ == "Task" for one in gc.get_objects())
        line = {"free_bytes": mallinfo2().fordblks, "blocks": blocks, "tasks": tasks}
        os.write(out, json.dumps(line).encode() + b"\n")

    signal.signal(signal.SIGUSR2, tell)


if directory := os.environ.get("FX_CHAOS_HOLDINGS"):
    _begin(directory)
