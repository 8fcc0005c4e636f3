"""Task: what the machine says about itself: load, memory, users, and how many sessions it has."""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import psutil
import trio

from fxrelay.cluster.plain_json import size_of
from fxrelay.cluster.programs import ProgramBounds, json_of, why_not_run
from fxtunnel.errors import ScriptError

logger = logging.getLogger(__name__)

MAX_LISTED: Final = 200
MAX_LIST_BYTES: Final = 16_384
KEPT_PERIODS: Final = 3
"""How long the last good value of a failing source is used, in publishing periods."""
CONNECTION_TABLES: Final = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_BLOCK_BYTES: Final = 131_072
"""Lines are matched in parts: no other thread of the relay waits for more than about a millisecond."""
_ESTABLISHED: Final = re.compile(rb"^ *\d+: ([0-9A-F]+:[0-9A-F]{4} [0-9A-F]+:[0-9A-F]{4}) 01 ", re.MULTILINE)
"""Both ends of a connection."""

End = tuple[str, int]
"""Where connections end on this machine: an IPv4 address, or "" for any, and a port."""


class MachineReader:
    """Reads load, memory and users. For one thread at a time; blocks for milliseconds."""

    def __init__(self) -> None:
        self._cpu = psutil.cpu_times()

    def read(self) -> dict[str, Any]:
        """The machine's fields of the server object. `cpu` is the share of all cores since the last call, in percent.

        Raises:
            OSError: the machine does not say.
        """
        memory = psutil.virtual_memory()
        names = [user.name for user in psutil.users()]
        return {
            "hostname": socket.gethostname(),
            "loadavg": [round(load, 2) for load in os.getloadavg()],
            "cpu": self._cpu_percent(),
            "freemem": memory.free,
            "totalmem": memory.total,
            "availmem": memory.available,
            "uptime": int(time.clock_gettime(time.CLOCK_BOOTTIME)),
            "loggedInUsers": len(set(names)),
            "logins": len(names),
            "uniqueUserLogins": len(set(names)),
        }

    def _cpu_percent(self) -> float:
        # psutil.cpu_percent remembers the last call of each thread, and worker threads differ from call to call.
        before, after = self._cpu, psutil.cpu_times()
        self._cpu = after
        spent = [max(later - earlier, 0.0) for earlier, later in zip(before, after, strict=True)]
        by_kind = dict(zip(after._fields, spent, strict=True))
        # The kernel counts guests' time as user time as well (proc_stat(5)).
        total = sum(spent) - by_kind.get("guest", 0.0) - by_kind.get("guest_nice", 0.0)
        idle = by_kind["idle"] + by_kind.get("iowait", 0.0)
        return round(min(max(100 * (total - idle) / total, 0.0), 100.0), 1) if total > 0 else 0.0


def count_connections(ends: Collection[End], tables: Collection[Path] = CONNECTION_TABLES) -> int:
    """Established TCP connections that end there. Blocks.

    A connection within this machine has two ends; only the one at the service's port counts. While others come and go the kernel may show
    one several times: it hands a table out by the page, and finds its place again by counting.

    Raises:
        OSError: the kernel does not say.
    """
    wanted = {b"%s:%04X" % (_as_listed(address), port) for address, port in ends}
    found: set[bytes] = set()
    for table in tables if wanted else ():
        try:
            file = table.open("rb", buffering=0)
        except FileNotFoundError:
            continue  # no IPv6 here
        with file:
            rest = b""
            while block := file.read(_BLOCK_BYTES):
                lines, newline, rest = (rest + block).rpartition(b"\n")
                for ends_of_one in _ESTABLISHED.findall(lines + newline):
                    here = ends_of_one.partition(b" ")[0]
                    # An IPv4 address is the end of a mapped one in the table of IPv6.
                    if here[-5:] in wanted or here[-13:] in wanted:
                        found.add(ends_of_one)
    return len(found)


def _as_listed(address: str) -> bytes:
    """As the kernel's tables write it: the bytes as a number of this machine's order."""
    return b"%08X" % int.from_bytes(socket.inet_aton(address), sys.byteorder) if address else b""


class SessionCounter:
    """Counts sessions as `[node] sessions` says."""

    def __init__(self, how: str, ends: Collection[End], period_s: float, bounds: ProgramBounds) -> None:
        self._program = Path(how.removeprefix("exec:")) if how.startswith("exec:") else None
        self._ends = frozenset(ends)
        self._keep_s = KEPT_PERIODS * period_s
        self._bounds = bounds
        self._good: dict[str, Any] = {}
        self._good_at = float("-inf")
        self._said = ""

    async def count(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """The fields `sessions` and, from a program, `uniqueUserSessions` and `sessionList`; with `sessionErrors` if something is wrong.

        While the program fails, its last good answer stands for three periods; after that connections are counted instead.

        Raises:
            OSError: the kernel does not say.
        """
        if self._program is None:
            return await self._connections()
        try:
            why_not = await trio.to_thread.run_sync(why_not_run, self._program)
            if why_not:
                raise ScriptError(self._program.name, why_not)
            self._good = session_fields(await json_of(self._program, self._bounds, environ))
            self._good_at = trio.current_time()
        except (ScriptError, ValueError) as exc:
            error = exc.message if isinstance(exc, ScriptError) else str(exc)
            if error != self._said:
                logger.warning("sessions are not counted by %s: %s", self._program, error)
            self._said = error
            kept = self._good if trio.current_time() - self._good_at <= self._keep_s else await self._connections()
            return {**kept, "sessionErrors": [error]}
        self._said = ""
        return self._good

    async def _connections(self) -> dict[str, Any]:
        return {"sessions": await trio.to_thread.run_sync(count_connections, self._ends)}


def session_fields(listed: Any) -> dict[str, Any]:
    """The fields for a program's list of sessions. Raises ValueError if it is none."""
    if not isinstance(listed, list) or not all(isinstance(session, dict) for session in listed):
        raise ValueError("expected a JSON list of objects")
    owners = {session["owner"] for session in listed if isinstance(session.get("owner"), str)}
    shown: list[dict[str, Any]] = []
    left = MAX_LIST_BYTES
    for session in listed[:MAX_LISTED]:
        left -= size_of(session) + 2
        if left < 0:
            break
        shown.append(session)
    return {"sessions": len(listed), "uniqueUserSessions": len(owners), "sessionList": shown}
