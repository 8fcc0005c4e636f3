"""What holds for all tests: a busy machine is no failure, and what guards the main branch tries the same examples every time."""

import gc
import os
import tempfile
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, settings

settings.register_profile("fxgateway", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fxgateway")

MEMORY: Final = Path("/dev/shm")
ROOM_BYTES: Final = 1 << 30


def has_room(path: Path) -> bool:
    """Whether files of tests, programs among them, may be there."""
    if not os.access(path, os.W_OK):
        return False
    found = os.statvfs(path)
    return not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize > ROOM_BYTES


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the last: who looks for garbage between tests need not look at it each time."""
    gc.collect()
    gc.freeze()


# Stores are written, and synced, thousands of times; the power does not fail here.
if "TMPDIR" not in os.environ and has_room(MEMORY):
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)
