"""Task: children of a script process: one for each call, with what the process has prepared, and gone with everything when it is over."""

import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

_PR_SET_PDEATHSIG: Final = 1
_BLOCK_BYTES: Final = 65_536
_libc: Final = ctypes.CDLL(None)
_killed: Final[list[int]] = []


class RelayGone(Exception):
    """Nobody waits for the answer any more: the script was killed, and this process is to end."""


def die_with(parent: int) -> None:
    """In a child: no life without the process `parent`, which made it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it was asked to be watched
        os._exit(1)


def bound(limit: int, most: int) -> None:
    """Let this process and its children have at most that of a resource (RLIMIT_…). A host's tighter limit stays."""
    _, hard = resource.getrlimit(limit)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))


@contextmanager
def told_when_gone(relay: socket.socket, handler: Callable[..., None] | signal.Handlers) -> Iterator[None]:
    """This process gets SIGIO when the other end of `relay` is closed, and when something comes from there.

    The kernel's own signal for that (PR_SET_PDEATHSIG) would come whenever the relay's thread ends that began this process.
    """
    signal.signal(signal.SIGIO, handler)
    fcntl.fcntl(relay, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(relay, fcntl.F_GETFL)
    fcntl.fcntl(relay, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        yield
    finally:
        fcntl.fcntl(relay, fcntl.F_SETFL, flags)


def is_gone(relay: socket.socket) -> bool:
    """Whether the other end of `relay` is closed."""
    poller = select.poll()
    poller.register(relay, 0)  # a hang-up is told without being asked for
    return bool(poller.poll(0))


@contextmanager
def dying_with(relay: socket.socket) -> Iterator[None]:
    """This process is killed when the other end of `relay` is closed, also in a call that runs no Python. Nothing may come from there.

    Raises:
        RelayGone: it was closed before.
    """
    with told_when_gone(relay, signal.SIG_DFL):
        if is_gone(relay):
            raise RelayGone
        yield


def wait_readable(descriptor: int, relay: socket.socket, timeout_s: float) -> bool:
    """Whether `descriptor` became readable within the time.

    Raises:
        RelayGone: the other end of `relay` was closed meanwhile.
    """
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poller.register(relay, 0)  # a hang-up is told without being asked for
    ready = dict(poller.poll(max(0.0, timeout_s) * 1000))
    if relay.fileno() in ready:
        raise RelayGone
    return bool(ready)


def in_child(work: Callable[[], bytes], limit_s: float, relay: socket.socket, max_bytes: int) -> bytes:
    """The line without its end that `work` returns in a copy of this process. What it changes, changes there alone.

    This process must have one thread. The child is killed in any case; `collect_children` waits for it, which takes a millisecond that
    nobody needs to wait for the answer.

    Raises:
        TimeoutError: it took longer than `limit_s`.
        EOFError: the child died.
        ValueError: it returned more than `max_bytes`.
        OSError: there can be no child now, for want of processes, memory or descriptors.
        RelayGone: the other end of `relay` was closed meanwhile.
    """
    parent = os.getpid()
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    if pid == 0:
        _be_child(work, parent, writing, relay)
    try:
        os.close(writing)
        return _collect(reading, relay, time.monotonic() + limit_s, max_bytes)
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        _killed.append(pid)


def collect_children() -> None:
    """Wait for the children that were killed; they end at once."""
    while _killed:
        os.waitpid(_killed.pop(), 0)


def _be_child(work: Callable[[], bytes], parent: int, writing: int, relay: socket.socket) -> NoReturn:
    # BaseException, and no way back: whatever happens here must not go on as if it were the process itself.
    with suppress(BaseException):
        die_with(parent)
        relay.close()
        answer = memoryview(work() + b"\n")
        while answer:
            answer = answer[os.write(writing, answer) :]
    os._exit(0)


def _collect(reading: int, relay: socket.socket, deadline: float, max_bytes: int) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):  # an end of the pipe would come later, when the child's memory is gone
        if not wait_readable(reading, relay, deadline - time.monotonic()):
            raise TimeoutError
        block = os.read(reading, _BLOCK_BYTES)
        if not block:
            raise EOFError("the child died")
        received += block
        if len(received) > max_bytes + 1:
            raise ValueError("the answer is too long")
    return bytes(received[:-1])
