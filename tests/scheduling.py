"""How the kernel schedules a process, as far as it tells."""

import platform
import re
from pathlib import Path


def nice_of_session(pid: int) -> int | None:
    """None where the kernel does not group processes by session."""
    groups = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if not groups.exists() or groups.read_text().strip() != "1":
        return None
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


def slice_ns(pid: int) -> int | None:
    """None before Linux 6.12, where it cannot be chosen, and where the kernel does not show it."""
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    found = re.search(r"^se\.slice +: +(\d+)$", Path(f"/proc/{pid}/sched").read_text(), re.MULTILINE) if release >= (6, 12) else None
    return int(found[1]) if found is not None else None
