"""Task: seccomp (seccomp(2)): giving up for good to connect to anything. Landlock stops connect() of TCP, not what goes round it."""

import ctypes
import os
import platform
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import EACCES
from typing import Final

from fxtunnel.kit.landlock import Unavailable

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2
_ALLOW: Final = 0x7FFF0000
_REFUSE: Final = 0x00050000 | EACCES
"""SECCOMP_RET_ERRNO, with the errno that Landlock gives too."""

# linux/bpf_common.h; what is loaded are 32-bit words of struct seccomp_data.
_LOAD: Final = 0x20
_MASK: Final = 0x54
_IF_EQUAL: Final = 0x15
_IF_AT_LEAST: Final = 0x35
_IF_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06

_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_ARGUMENTS_AT: Final = 16
_ARGUMENT_BYTES: Final = 8
_X32: Final = 0x40000000
"""Numbers from here on are x32's on x86_64, and nothing elsewhere."""

_MSG_FASTOPEN: Final = 0x20000000
_TYPE_MASK: Final = 0xF


@dataclass(frozen=True, slots=True)
class _Machine:
    """What an architecture calls itself (linux/audit.h), and its numbers of the calls that open connections (asm/unistd.h)."""

    architecture: int
    socket: int
    connect: int
    sendto: int
    sendmsg: int
    sendmmsg: int
    io_uring_setup: int = 425


_MACHINES: Final = {
    "x86_64": _Machine(0xC000003E, socket=41, connect=42, sendto=44, sendmsg=46, sendmmsg=307),
    "aarch64": _Machine(0xC00000B7, socket=198, connect=203, sendto=206, sendmsg=211, sendmmsg=269),
}

_Step = tuple[int, int, int, int]
"""struct sock_filter: what to do, steps to leave out if so, if not, and the value."""


def give_up_connections() -> None:
    """Open no connection any more, and no socket but TCP's and unix ones; every attempt is EACCES. Cannot be undone.

    Binds the calling thread, and every thread and process that it starts from now on: call it before there are others. Still possible:
    listening, accepting, connections that are open, and datagrams to unix sockets, which service managers want to be notified by.

    Raises:
        Unavailable: nothing has changed.
    """
    machine = _MACHINES.get(platform.machine()) if sys.maxsize > 1 << 32 else None
    if machine is None:
        raise Unavailable(0, f"there is no filter of system calls for {platform.machine()}")
    steps = [_Filter(*step) for step in _program(machine)]
    program = _Program(len(steps), (_Filter * len(steps))(*steps))
    libc = ctypes.CDLL(None, use_errno=True)
    for what in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*what):
            number = ctypes.get_errno()
            raise Unavailable(number, f"system calls cannot be filtered: {os.strerror(number)}")


class _Filter(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = (("code", ctypes.c_uint16), ("if_so", ctypes.c_uint8), ("if_not", ctypes.c_uint8), ("value", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.POINTER(_Filter)))


def _program(machine: _Machine) -> Iterator[_Step]:
    # Calls of other ABIs (i386, x32, 32-bit ARM) have other numbers: nobody here makes any.
    yield _load(_ARCHITECTURE_AT)
    yield _IF_EQUAL, 1, 0, machine.architecture
    yield _answer(_REFUSE)
    yield _load(_NUMBER_AT)
    yield _IF_AT_LEAST, 0, 1, _X32
    yield _answer(_REFUSE)
    blocks = {
        machine.connect: [_answer(_REFUSE)],
        machine.io_uring_setup: [_answer(_REFUSE)],  # its rings connect without a system call
        machine.sendto: _unless_fast_open(3),
        machine.sendmsg: _unless_fast_open(2),
        machine.sendmmsg: _unless_fast_open(3),
        machine.socket: _SOCKETS,
    }
    for number, block in blocks.items():
        yield _IF_EQUAL, 0, len(block), number
        yield from block
    yield _answer(_ALLOW)


def _load(offset: int) -> _Step:
    return _LOAD, 0, 0, offset


def _load_argument(number: int) -> _Step:
    """Its lower half: the kernel takes these arguments as int. Both architectures are little-endian."""
    return _load(_ARGUMENTS_AT + number * _ARGUMENT_BYTES)


def _answer(action: int) -> _Step:
    return _RETURN, 0, 0, action


def _unless_fast_open(flags: int) -> Sequence[_Step]:
    """With MSG_FASTOPEN sending connects (tcp(7)); `flags` is the number of that argument."""
    return [_load_argument(flags), (_IF_ANY_BIT, 0, 1, _MSG_FASTOPEN), _answer(_REFUSE), _answer(_ALLOW)]


# UDP, raw and packet sockets send without connecting, SCTP's connect when they send, and MPTCP's are not TCP's for Landlock.
_SOCKETS: Final[Sequence[_Step]] = [
    _load_argument(0),
    (_IF_EQUAL, 9, 0, socket.AF_UNIX),
    (_IF_EQUAL, 1, 0, socket.AF_INET),
    (_IF_EQUAL, 0, 6, socket.AF_INET6),
    _load_argument(1),
    (_MASK, 0, 0, _TYPE_MASK),
    (_IF_EQUAL, 0, 3, socket.SOCK_STREAM),
    _load_argument(2),
    (_IF_EQUAL, 2, 0, 0),
    (_IF_EQUAL, 1, 0, socket.IPPROTO_TCP),
    _answer(_REFUSE),
    _answer(_ALLOW),
]
