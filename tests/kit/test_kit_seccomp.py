"""The filter of system calls, run as the kernel would (Documentation/userspace-api/seccomp_filter.rst), for each architecture."""

import platform
import socket

import pytest

from fxtunnel.kit import seccomp
from fxtunnel.kit.landlock import Unavailable

ALLOW, REFUSE = 0x7FFF0000, 0x0005000D
MACHINES = pytest.mark.parametrize("name", ["x86_64", "aarch64"])
NUMBERS = {
    "x86_64": {"socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "sendmmsg": 307, "io_uring_setup": 425, "read": 0},
    "aarch64": {"socket": 198, "connect": 203, "sendto": 206, "sendmsg": 211, "sendmmsg": 269, "io_uring_setup": 425, "read": 63},
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003, "arm": 0x40000028}
INET, INET6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
FLAGS = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
FAST = socket.MSG_FASTOPEN
HIGH = 1 << 32
"""The kernel does not look at the upper half of an int."""

VERDICTS = [
    ("connect", (3, 0, 16), REFUSE),
    ("io_uring_setup", (8, 0), REFUSE),
    ("sendto", (3, 0, 1, 0), ALLOW),
    ("sendto", (3, 0, 1, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT), ALLOW),
    ("sendto", (3, 0, 1, FAST), REFUSE),
    ("sendto", (3, 0, 1, HIGH | FAST | socket.MSG_NOSIGNAL), REFUSE),
    ("sendmsg", (3, 0, 0), ALLOW),
    ("sendmsg", (3, 0, FAST), REFUSE),
    ("sendmmsg", (3, 0, 1, 0), ALLOW),
    ("sendmmsg", (3, 0, 1, FAST), REFUSE),
    ("socket", (UNIX, STREAM | FLAGS, 0), ALLOW),
    ("socket", (UNIX, DGRAM | FLAGS, 0), ALLOW),
    ("socket", (INET, STREAM | FLAGS, 0), ALLOW),
    ("socket", (INET6, STREAM, 6), ALLOW),
    ("socket", (INET, STREAM, 262), REFUSE),
    ("socket", (INET, STREAM, socket.IPPROTO_SCTP), REFUSE),
    ("socket", (INET, socket.SOCK_SEQPACKET, socket.IPPROTO_SCTP), REFUSE),
    ("socket", (HIGH | INET, HIGH | DGRAM | FLAGS, 0), REFUSE),
    ("socket", (INET6, DGRAM, 0), REFUSE),
    ("socket", (INET, socket.SOCK_RAW, 1), REFUSE),
    ("socket", (socket.AF_PACKET, socket.SOCK_RAW, 0), REFUSE),
    ("socket", (socket.AF_NETLINK, DGRAM, 0), REFUSE),
    ("socket", (socket.AF_VSOCK, STREAM, 0), REFUSE),
    ("read", (0, 0, 1), ALLOW),
]


def verdict(name: str, number: int, arguments: tuple[int, ...] = (), architecture: str | None = None) -> int:
    data = {0: number, 4: ARCHITECTURES[architecture or name]}
    data |= {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate(arguments)}
    program = list(seccomp._program(seccomp._MACHINES[name]))
    at = held = 0
    while True:
        code, if_so, if_not, value = program[at]
        at += 1
        match code:
            case 0x20:
                held = data[value]
            case 0x54:
                held &= value
            case 0x06:
                return value
            case _:
                met = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code]
                at += if_so if met else if_not


@MACHINES
@pytest.mark.parametrize(("call", "arguments", "expected"), VERDICTS)
def test_a_call(name: str, call: str, arguments: tuple[int, ...], expected: int):
    assert verdict(name, NUMBERS[name][call], arguments) == expected


@MACHINES
def test_every_other_call_is_let_through(name: str):
    filtered = set(NUMBERS[name].values())
    assert {verdict(name, number) for number in range(600) if number not in filtered} == {ALLOW}


@pytest.mark.parametrize(("name", "other", "number"), [("x86_64", "i386", 3), ("aarch64", "arm", 3), ("x86_64", "x86_64", 0x40000000)])
def test_calls_of_another_abi_are_refused(name: str, other: str, number: int):
    assert verdict(name, number, architecture=other) == REFUSE


def test_an_architecture_without_numbers_has_no_filter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(Unavailable, match="riscv64"):
        seccomp.give_up_connections()
