"""What a systemd unit takes away from its service, taken away without systemd: `python confinement.py UNIT COMMAND [ARGUMENT...]`.

Applied are the unit's SystemCallFilter, RestrictAddressFamilies, RestrictRealtime and MemoryDenyWriteExecute (by libseccomp, in
filters like systemd's own), its empty CapabilityBoundingSet, and ProcSubset and ProtectProc by a /proc of the command's own. These
two need root. Not applied: what hides or write-protects directories (ProtectSystem, ProtectHome, PrivateTmp, PrivateDevices), and
the user namespace (PrivateUsers).
"""

import ctypes
import errno
import functools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from ctypes.util import find_library
from pathlib import Path

_ALLOW, _DENY = 0x7FFF0000, 0x00050000
"""SCMP_ACT_ALLOW and SCMP_ACT_ERRNO(0), seccomp.h."""
_EQUAL, _GREATER, _MASKED_EQUAL = 4, 6, 7
_PROT_WRITE, _PROT_EXEC = 2, 4
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_PR_CAPBSET_DROP, _LAST_CAPABILITY = 24, 40
_MAX_FAMILY = 46
_REALTIME = (1, 2, 4, 6)  # SCHED_FIFO, SCHED_RR, reserved, SCHED_DEADLINE


class _Compare(ctypes.Structure):
    _fields_ = (("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("first", ctypes.c_uint64), ("second", ctypes.c_uint64))


def why_not() -> str:
    """Why a command cannot be confined here; empty if it can."""
    if shutil.which("systemd-analyze") is None:
        return "systemd-analyze is not installed, which knows the groups of system calls"
    if find_library("seccomp") is None:
        return "libseccomp is not installed"
    return "" if os.geteuid() == 0 else "only root can mount a /proc as the units ask for"


def settings_of(unit: Path) -> dict[str, list[str]]:
    """All values of each key, in order."""
    settings: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(key, []).append(value)
    return settings


@functools.cache
def groups() -> dict[str, frozenset[str]]:
    """What systemd's groups of system calls consist of, groups within them resolved."""
    listed: dict[str, list[str]] = {}
    printed = subprocess.run(["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True, text=True, check=True, timeout=60)
    for line in printed.stdout.splitlines():
        if line.startswith("@"):
            members = listed.setdefault(line.strip(), [])
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())
        elif not line.strip().startswith("#") and line.strip():
            break  # "# Ungrouped System Calls" and notes follow

    def resolved(names: Iterable[str]) -> frozenset[str]:
        return frozenset(call for name in names for call in (resolved(listed[name]) if name in listed else [name]))

    return {name: resolved(members) for name, members in listed.items()}


def allowed_calls(settings: Mapping[str, list[str]]) -> frozenset[str]:
    """The system calls that SystemCallFilter lets through (systemd.exec(5)): an allow-list, from which `~` lines take away."""
    known = groups()
    allowed = known["@default"]
    for line in settings["SystemCallFilter"]:
        names = line.removeprefix("~").split()
        calls = frozenset(call for name in names for call in known.get(name, [name]))
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


class _Filter:
    """One filter: what no rule is about has the default action."""

    def __init__(self, library: ctypes.CDLL, default: int) -> None:
        self._library = library
        self._context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
        assert self._context

    def rule(self, action: int, call: str, *compare: _Compare) -> None:
        """Calls that this architecture has not are left out, as systemd does."""
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:
            array = (_Compare * len(compare))(*compare)
            done = self._library.seccomp_rule_add_array(self._context, ctypes.c_uint32(action), number, len(compare), array)
            assert done == 0, (call, done)

    def load(self) -> None:
        """From now on, for good."""
        assert self._library.seccomp_load(self._context) == 0


def _filter_calls(settings: Mapping[str, list[str]]) -> None:
    library = ctypes.CDLL(find_library("seccomp"))
    library.seccomp_init.restype = ctypes.c_void_p
    filters = []
    if settings.get("MemoryDenyWriteExecute") == ["yes"]:
        filters.append(memory := _Filter(library, _ALLOW))
        both = _PROT_WRITE | _PROT_EXEC
        memory.rule(_DENY | errno.EPERM, "mmap", _Compare(2, _MASKED_EQUAL, both, both))
        for call in ("mprotect", "pkey_mprotect"):
            memory.rule(_DENY | errno.EPERM, call, _Compare(2, _MASKED_EQUAL, _PROT_EXEC, _PROT_EXEC))
    if settings.get("RestrictRealtime") == ["yes"]:
        filters.append(realtime := _Filter(library, _ALLOW))
        for policy in _REALTIME:
            realtime.rule(_DENY | errno.EPERM, "sched_setscheduler", _Compare(1, _EQUAL, policy))
    if families := settings.get("RestrictAddressFamilies"):
        filters.append(sockets := _Filter(library, _ALLOW))
        named = {getattr(socket, family) for family in families[0].split()}
        for family in set(range(_MAX_FAMILY)) - named:
            sockets.rule(_DENY | errno.EAFNOSUPPORT, "socket", _Compare(0, _EQUAL, family))
        sockets.rule(_DENY | errno.EAFNOSUPPORT, "socket", _Compare(0, _GREATER, _MAX_FAMILY - 1))
    filters.append(calls := _Filter(library, _DENY | getattr(errno, settings["SystemCallErrorNumber"][0])))
    for call in allowed_calls(settings):
        calls.rule(_ALLOW, call)
    for each in filters:
        each.load()


def _own_proc(settings: Mapping[str, list[str]]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    options = [f"subset={value}" for value in settings.get("ProcSubset", []) if value != "all"]
    options += [f"hidepid={value}" for value in settings.get("ProtectProc", [])]
    done = [
        libc.unshare(_CLONE_NEWNS),
        libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        libc.mount(b"proc", b"/proc", b"proc", 0, ",".join(options).encode()),
    ]
    assert done == [0, 0, 0], (done, os.strerror(ctypes.get_errno()))


def _drop_capabilities() -> None:
    # Root's own are within the bounding set at the next execve, capabilities(7): then there are none.
    libc = ctypes.CDLL(None)
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def main() -> None:
    """Give everything up and become the command."""
    settings, command = settings_of(Path(sys.argv[1])), sys.argv[2:]
    groups()  # while programs can still be run as before
    _own_proc(settings)
    assert settings["CapabilityBoundingSet"] == [""]
    _drop_capabilities()
    _filter_calls(settings)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
