"""Task: a gateway's processes across restarts: a connection that names an earlier one is passed on to it, unread (PROTOCOL.md, 3.1).

Each process has a line. One end is kept for its successors, which inherit it as they inherit listening sockets. Only connections travel
on a line, and only towards the earlier process.
"""

import array
import logging
import socket
from collections.abc import Callable
from typing import Final

import trio

from fxgateway.tunnels.colleagues import Alone, Passed
from fxgateway.tunnels.first_look import look_at_hello
from fxgateway.tunnels.lobby import TurnedAway
from fxtunnel.control.busy import Appointment
from fxtunnel.kit.listeners import Inherited
from fxtunnel.protocol.alpn import named_process

logger = logging.getLogger(__name__)

LINE_BYTES: Final = 65_536
"""Kernel memory for connections that the earlier process has not taken yet, about 170 of them. Any more are told to come again."""
COME_AGAIN: Final = Appointment(0.5, 0.5)
_GUEST: Final = b"\0"
_FD_BYTES: Final = array.array("i").itemsize


class Succession(Alone):
    """Implements `Colleagues` for a single-process gateway that may have predecessors still draining, and may get successors."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._earlier: dict[str, socket.socket] = {}
        self._ours: socket.socket | None = None
        self._forget: Callable[[str], None] = lambda process: None

    @property
    def is_named(self) -> bool:
        """See `Colleagues`."""
        return self._ours is not None

    @property
    def earlier(self) -> tuple[str, ...]:
        """See `Colleagues`."""
        return tuple(self._earlier)

    async def run(self, inherited: Inherited, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over the lines to earlier processes, and have a line to this one kept for successors. Runs until cancelled.

        A line is dropped when its process ends. Start this only once it is our turn, so that a successor that never gets one leaves
        no line behind.
        """
        self._earlier, self._forget = inherited.take_lines(), inherited.forget_line
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINE_BYTES)
            theirs.setblocking(False)
            is_kept = inherited.keep_line(self._process, theirs)
        with ours:
            ours.setblocking(False)
            self._ours = ours if is_kept else None
            try:
                async with trio.open_nursery() as nursery:
                    for process in self._earlier:
                        nursery.start_soon(self._outlive, process)
                    task_status.started()
                    await trio.sleep_forever()
            finally:
                self._ours = None
                for line in self._earlier.values():
                    line.close()
                self._earlier.clear()

    async def keeps(self, passed: Passed) -> bool:
        """See `Colleagues`. A name that belongs to no process here is left alone: the TLS handshake then fails with no common protocol."""
        await trio.lowlevel.checkpoint()
        if not self._earlier:
            return True
        hello = await look_at_hello(passed.sock)
        named = {named_process(protocol) for protocol in hello.alpn} if hello is not None else set()
        process = next((process for process in named if process in self._earlier), "")
        if not process:
            return True
        try:
            self._earlier[process].sendmsg([_GUEST], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed.sock.fileno()]))])
        except (BrokenPipeError, ConnectionResetError):
            return True  # it has just ended; `_outlive` is about to notice
        except OSError as exc:  # the line is full, or too many descriptors are in flight (unix(7), ETOOMANYREFS)
            raise TurnedAway(COME_AGAIN) from exc
        logger.debug("connection from %s is passed on to process %s", passed.remote_address, process)
        return False

    async def wait_passed(self) -> Passed:
        """See `Colleagues`."""
        while (line := self._ours) is not None:
            await trio.lowlevel.wait_readable(line)
            data, ancillary, _, _ = line.recvmsg(len(_GUEST), socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC)
            for sock in _received(ancillary):
                try:
                    return Passed.fresh(sock, sock.getpeername())
                except OSError:  # the relay has hung up meanwhile
                    sock.close()
            if not data:
                break
        return await super().wait_passed()

    async def _outlive(self, process: str) -> None:
        line = self._earlier[process]
        await trio.lowlevel.wait_readable(line)  # nothing is ever sent in this direction: readable means closed
        logger.info("process %s, an earlier one of this gateway, has ended", process)
        del self._earlier[process]
        line.close()
        self._forget(process)


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[socket.socket]:
    """The connection that came with the message, or nothing if this process is out of descriptors."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) // _FD_BYTES * _FD_BYTES])
    return [socket.socket(fileno=fd) for fd in found]
