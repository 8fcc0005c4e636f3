"""Task: processes of a gateway that follow each other: who names an earlier one is passed on to it, unread (PROTOCOL.md, 3.1).

Each has a line, one end of which it gives away like a listening socket; its successors inherit it. On it travel connections and nothing
else, and only towards the earlier process.
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
"""Of the kernel's memory, for what the earlier process has not taken yet: some 170 connections. More are told to come again."""
COME_AGAIN: Final = Appointment(0.5, 0.5)
_GUEST: Final = b"\0"
_FD_BYTES: Final = array.array("i").itemsize


class Succession(Alone):
    """Implements `Colleagues` for a gateway of one process that may have come after others, and may be followed by more."""

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
        """Take the lines to earlier processes, and have one to this process kept; forget each when its process is gone. Until cancelled.

        Begin when it is our turn: a successor that never has one leaves no line behind.
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
        """See `Colleagues`. Whoever names a process that is not there finds in the handshake that nobody speaks its protocol."""
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
            return True  # gone, as `_outlive` is about to find
        except OSError as exc:  # the line is full, or the kernel has no room for descriptors that travel
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
                except OSError:  # it has hung up meanwhile
                    sock.close()
            if not data:
                break
        return await super().wait_passed()

    async def _outlive(self, process: str) -> None:
        line = self._earlier[process]
        await trio.lowlevel.wait_readable(line)  # nothing is ever said this way: it is the end
        logger.info("process %s, an earlier one of this gateway, has ended", process)
        del self._earlier[process]
        line.close()
        self._forget(process)


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[socket.socket]:
    """What has come along: one connection, or none if this process may open no more files."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) // _FD_BYTES * _FD_BYTES])
    return [socket.socket(fileno=fd) for fd in found]
