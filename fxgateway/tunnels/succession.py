"""Task: a gateway's processes across restarts: a connection that names an earlier one is passed on to it, unread (PROTOCOL.md, 3.1).

Each process has a line. One end is kept for its successors, which inherit it as they inherit listening sockets. Only connections travel
on a line, and only towards the earlier process.
"""

import logging
import socket
from collections.abc import Callable, Mapping
from typing import Final

import trio

from fxgateway.tunnels.hello_peek import peek_client_hello
from fxgateway.tunnels.peer_processes import AcceptedConnection, SingleProcess
from fxgateway.tunnels.pre_auth_queue import TooBusy
from fxtunnel.control.busy import RetryAfter
from fxtunnel.kit.client_hello import ClientHello
from fxtunnel.kit.listeners import Inherited
from fxtunnel.protocol.alpn import named_process

logger = logging.getLogger(__name__)

LINE_BYTES: Final = 65_536
"""Kernel memory for connections that the earlier process has not taken yet, about 170 of them. Any more are told to come again."""
COME_AGAIN: Final = RetryAfter(0.5, 0.5)
_HANDOVER_BYTE: Final = b"\0"


class Lines:
    """The lines of one process: to the processes before it, and its own, on which those after it pass connections on to it."""

    def __init__(self) -> None:
        self._earlier: dict[str, socket.socket] = {}
        self._ours: socket.socket | None = None

    @property
    def is_named(self) -> bool:
        """See `PeerProcesses`."""
        return self._ours is not None

    @property
    def earlier(self) -> tuple[str, ...]:
        """See `PeerProcesses`."""
        return tuple(self._earlier)

    async def run(
        self,
        earlier: Mapping[str, socket.socket],
        ours: socket.socket | None,
        forget: Callable[[str], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Use these lines, and close them at the end: those to earlier processes, and our own. Runs until cancelled.

        A line is dropped, and `forget` called, when its process ends. Without a line of our own nobody comes back to this process.
        """
        self._earlier, self._ours = dict(earlier), ours
        try:
            async with trio.open_nursery() as nursery:
                for process, line in earlier.items():
                    nursery.start_soon(self._outlive, process, line, forget)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._ours = None
            for line in (*self._earlier.values(), *([ours] if ours is not None else [])):
                line.close()
            self._earlier.clear()

    def pass_on(self, passed: AcceptedConnection, hello: ClientHello) -> bool:
        """Pass the connection on to the earlier process that it names, if any; whether that was done. The caller closes its own copy.

        A name that belongs to no process here is left alone: the TLS handshake then fails with no common protocol.

        Raises:
            TooBusy: that process has no time for it now.
        """
        named = {named_process(protocol) for protocol in hello.alpn}
        process = next((process for process in named if process in self._earlier), "")
        if not process:
            return False
        try:
            socket.send_fds(self._earlier[process], [_HANDOVER_BYTE], [passed.sock.fileno()])
        except (BrokenPipeError, ConnectionResetError):
            return False  # it has just ended; `_outlive` is about to notice
        except OSError as exc:  # the line is full, or too many descriptors are in flight (unix(7), ETOOMANYREFS)
            raise TooBusy(COME_AGAIN) from exc
        logger.debug("connection from %s is passed on to process %s", passed.remote_address, process)
        return True

    async def receive(self) -> AcceptedConnection:
        """The next connection that a later process has passed on to us; none without a line, or when nobody is left to pass any on."""
        while (line := self._ours) is not None:
            await trio.lowlevel.wait_readable(line)
            data, fds, _, _ = socket.recv_fds(line, len(_HANDOVER_BYTE), 1, socket.MSG_CMSG_CLOEXEC)
            for fd in fds:  # none, if this process is out of descriptors
                sock = socket.socket(fileno=fd)
                try:
                    return AcceptedConnection.fresh(sock, sock.getpeername())
                except OSError:  # the relay has hung up meanwhile
                    sock.close()
            if not data:
                break
        await trio.sleep_forever()
        raise AssertionError

    async def _outlive(self, process: str, line: socket.socket, forget: Callable[[str], None]) -> None:
        await until_its_end(line)
        logger.info("process %s, an earlier one of this gateway, has ended", process)
        del self._earlier[process]
        line.close()
        forget(process)


class Succession(SingleProcess):
    """Implements `PeerProcesses` for a single-process gateway that may have predecessors still draining, and may get successors."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._lines = Lines()

    @property
    def is_named(self) -> bool:
        """See `PeerProcesses`."""
        return self._lines.is_named

    @property
    def earlier(self) -> tuple[str, ...]:
        """See `PeerProcesses`."""
        return self._lines.earlier

    async def run(self, inherited: Inherited, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over the lines to earlier processes, and have a line to this one kept for successors. Runs until cancelled.

        Start this only once it is our turn, so that a successor that never gets one leaves no line behind.
        """
        ours = None
        if inherited.keeps_lines:
            ours, theirs = line_pair()
            with theirs:
                inherited.keep_line(self._process, theirs)
        await self._lines.run(inherited.take_lines(), ours, inherited.forget_line, task_status=task_status)

    async def keeps(self, passed: AcceptedConnection) -> bool:
        """See `PeerProcesses`."""
        await trio.lowlevel.checkpoint()
        if not self._lines.earlier:
            return True
        hello = await peek_client_hello(passed.sock)
        return hello is None or not self._lines.pass_on(passed, hello)

    async def wait_passed(self) -> AcceptedConnection:
        """See `PeerProcesses`."""
        return await self._lines.receive()


def line_pair() -> tuple[socket.socket, socket.socket]:
    """A new line: the end of the process it leads to, and the end that is kept for its successors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINE_BYTES)
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


async def until_its_end(line: socket.socket) -> None:
    """Wait until the process has ended to which this line leads."""
    await trio.lowlevel.wait_readable(line)  # nothing is ever sent in this direction: readable means closed
