"""Task: Landlock (landlock(7)): giving up for good to open files but those named, connect() of TCP, and signals to other processes."""

import ctypes
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

# The same numbers on every architecture (asm-generic/unistd.h).
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_CREATE_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

_CONNECT_TCP: Final = 1 << 1
_SCOPE_ABSTRACT_SOCKETS: Final = 1 << 0
_SCOPE_SIGNALS: Final = 1 << 1

ABI_NETWORK: Final = 4
ABI_SCOPES: Final = 6


class Access(IntFlag):
    """What may be done beneath a path (linux/landlock.h, LANDLOCK_ACCESS_FS_*)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # ABI 2
    TRUNCATE = 1 << 14  # ABI 3
    IOCTL_DEV = 1 << 15  # ABI 5


READ: Final = Access.READ_FILE | Access.READ_DIR
CHANGE: Final = READ | Access.WRITE_FILE | Access.TRUNCATE | Access.MAKE_REG | Access.MAKE_SOCK | Access.REMOVE_FILE
"""Files of a directory, and sockets: read, replaced, made and removed."""
_ON_FILES: Final = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
"""What the kernel takes for a rule on something that is no directory."""
_NOTHING: Final = Access(0)


class Unavailable(OSError):
    """This kernel cannot hold us to it, or does not let us; `strerror` says which."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What stays allowed: `access` to everything beneath `path`. A path that does not exist grants nothing."""

    path: Path
    access: Access


@dataclass(frozen=True, slots=True)
class InForce:
    """What this process, its threads and its children can no longer do, for as long as they live."""

    abi: int
    kept: Access
    """What may be done to every file as before."""
    connect: bool
    """connect() of TCP fails. What else there is to reach somebody takes `fxtunnel.kit.seccomp`."""
    scopes: bool
    """Processes outside get no signals, and their abstract unix sockets no connections."""

    def __str__(self) -> str:
        parts = ["changing files beyond those named"] if self.kept & READ else ["files beyond those named"]
        parts += ["programs"] if not self.kept & Access.EXECUTE else []
        parts += ["connect() of TCP"] if self.connect else []
        parts += ["signals to other processes"] if self.scopes else []
        return ", ".join(parts)


def supported_abi() -> int:
    """The version of Landlock that the kernel offers; 0 if none."""
    abi: int = _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_VERSION))
    return max(0, abi)


def restrict(grants: Iterable[Grant], *, kept: Access = _NOTHING, scopes: bool = True) -> InForce:
    """Give up everything that the kernel can hold us to, except `grants`, and except `kept` with all files. Cannot be undone.

    Binds the calling thread, and every thread and process that it starts from now on: call it before there are others. Sockets and files
    that are open stay so. `scopes` also cuts off abstract unix sockets and signals, where the kernel can.

    Raises:
        Unavailable: nothing has changed.
    """
    abi = supported_abi()
    if not abi:
        raise Unavailable(0, "the kernel has no Landlock, or it is switched off (lsm= on its command line)")
    handled = _handled(abi) & ~kept
    connect, scoped = abi >= ABI_NETWORK, abi >= ABI_SCOPES and scopes
    libc = _libc()
    ruleset = _ruleset(libc, abi, handled, _CONNECT_TCP if connect else 0, _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if scoped else 0)
    try:
        for grant in grants:
            _allow(libc, ruleset, grant, handled)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise _failed("no_new_privs cannot be set")
        if libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)):
            raise _failed("the rules cannot be put in force")
    finally:
        os.close(ruleset)
    return InForce(abi, kept, connect, scoped)


class _RulesetAttributes(ctypes.Structure):
    """struct landlock_ruleset_attr; older kernels take only its beginning."""

    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _handled(abi: int) -> Access:
    """Every access that this kernel knows."""
    handled = Access(Access.REFER - 1)
    if abi >= 2:
        handled |= Access.REFER
    if abi >= 3:
        handled |= Access.TRUNCATE
    if abi >= 5:
        handled |= Access.IOCTL_DEV
    return handled


def _ruleset(libc: ctypes.CDLL, abi: int, handled: Access, net: int, scoped: int) -> int:
    attributes = _RulesetAttributes(int(handled), net, scoped)
    size = 24 if abi >= ABI_SCOPES else 16 if abi >= ABI_NETWORK else 8
    fd: int = libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if fd < 0:
        raise _failed("no rules can be made")
    return fd


def _allow(libc: ctypes.CDLL, ruleset: int, grant: Grant, handled: Access) -> None:
    try:
        parent = os.open(grant.path, os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        logger.debug("sandbox: %s is not there: %s", grant.path, exc.strerror)
        return
    try:
        access = grant.access & handled
        if not grant.path.is_dir():
            access &= _ON_FILES
        if not access:
            return  # all of it is kept, and the kernel takes no empty rules
        rule = _PathBeneath(int(access), parent)
        if libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0)):
            raise _failed(f"{grant.path} cannot be allowed")
    finally:
        os.close(parent)


def _failed(what: str) -> Unavailable:
    number = ctypes.get_errno()
    return Unavailable(number, f"{what}: {os.strerror(number)}")
