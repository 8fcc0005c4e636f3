"""Task: the parent's care for the lines on which relays come back after a restart: from our workers to those of earlier gateways, and to
our workers from later gateways. `Succession` does this for a gateway of one process. Each worker has a name and a line of its own.
"""

import secrets
import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio

from fxgateway.tunnels.succession import line_pair, until_its_end
from fxtunnel.kit.listeners import LINE_NAME, Inherited


class ProcessName(NamedTuple):
    """What relays call a worker that begins, and its end of the line to it, which the caller owns; None if nobody keeps sockets for us."""

    process: str
    line: socket.socket | None


class ReconnectLines:
    """The lines of all workers. Those of our own are kept for successors from our turn on: a gateway that never gets one leaves none."""

    def __init__(self, inherited: Inherited) -> None:
        self._inherited = inherited
        self._earlier = inherited.take_lines()
        self._has_turn = False
        self._processes: dict[int, str] = {}
        self._ends: dict[str, socket.socket] = {}
        """The ends to be kept for successors, by process, until it is our turn."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Begin our turn, and drop the lines to earlier processes when these end. Runs until cancelled."""
        self._has_turn = True
        for process in list(self._ends):
            self._keep(process)
        async with trio.open_nursery() as nursery:
            for process in self._earlier:
                nursery.start_soon(self._outlive, process)
            task_status.started()
            await trio.sleep_forever()

    def begin(self, worker: int) -> ProcessName:
        """Make a new name and line for the process that begins as this worker.

        Raises:
            OSError: no descriptors are left.
        """
        self.end(worker)
        process = self._processes[worker] = secrets.token_hex(8)
        if not self._inherited.keeps_lines:
            return ProcessName(process, None)
        ours, self._ends[process] = line_pair()
        if self._has_turn:
            self._keep(process)
        return ProcessName(process, ours)

    def end(self, worker: int) -> None:
        """Drop the line to this worker's process, which has ended. May be repeated."""
        process = self._processes.pop(worker, None)
        if process is not None:
            end = self._ends.pop(process, None)
            if end is not None:
                end.close()
            else:
                self._inherited.forget_line(process)

    def to_earlier(self) -> Sequence[tuple[str, socket.socket]]:
        """The lines to earlier processes, by the names under which they are kept. They stay ours."""
        return [(f"{LINE_NAME}{process}", line) for process, line in self._earlier.items()]

    def close(self) -> None:
        """Close our copies."""
        for line in (*self._earlier.values(), *self._ends.values()):
            line.close()
        self._earlier.clear()
        self._ends.clear()

    def _keep(self, process: str) -> None:
        with self._ends.pop(process) as end:
            self._inherited.keep_line(process, end)

    async def _outlive(self, process: str) -> None:
        await until_its_end(self._earlier[process])
        self._earlier.pop(process).close()
        self._inherited.forget_line(process)
