"""Task: the ways back into the parent's keeping: lines to the workers of earlier gateways for ours, and lines to ours for later gateways.

What a gateway of one process does for itself (`Succession`): workers have names as processes of their own, and are followed one by one.
"""

import secrets
import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio

from fxgateway.tunnels.succession import line_pair, until_its_end
from fxtunnel.kit.listeners import LINE_NAME, Inherited


class Name(NamedTuple):
    """Of a worker that begins; and its end of the line on which relays come back to it, now the caller's. None: nobody will follow."""

    process: str
    line: socket.socket | None


class Returns:
    """The lines of all workers. Later gateways get those of workers that live, from our turn on: one that never has a turn leaves none."""

    def __init__(self, inherited: Inherited) -> None:
        self._inherited = inherited
        self._earlier = inherited.take_lines()
        self._has_turn = False
        self._processes: dict[int, str] = {}
        self._ends: dict[str, socket.socket] = {}
        """What successors shall be given, until it is our turn."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """It is our turn. Forget earlier processes when they end. Until cancelled."""
        self._has_turn = True
        for process in list(self._ends):
            self._keep(process)
        async with trio.open_nursery() as nursery:
            for process in self._earlier:
                nursery.start_soon(self._outlive, process)
            task_status.started()
            await trio.sleep_forever()

    def begin(self, worker: int) -> Name:
        """A worker of this number begins, as a process of a new name."""
        self.end(worker)
        process = self._processes[worker] = secrets.token_hex(8)
        if not self._inherited.keeps_lines:
            return Name(process, None)
        ours, self._ends[process] = line_pair()
        if self._has_turn:
            self._keep(process)
        return Name(process, ours)

    def end(self, worker: int) -> None:
        """The process of this worker is gone, if there was one."""
        process = self._processes.pop(worker, None)
        if process is not None:
            end = self._ends.pop(process, None)
            if end is not None:
                end.close()
            else:
                self._inherited.forget_line(process)

    def to_earlier(self) -> Sequence[tuple[str, socket.socket]]:
        """The lines to earlier processes, by the names they are kept under. They stay ours."""
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
