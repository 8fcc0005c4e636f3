"""Task: a TCP forwarder that is put into a tunnel and resets it after so many bytes."""

import selectors
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self

from benchmarks import processes

_CHUNK: Final = 262_144
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST


@dataclass(slots=True, eq=False)
class _End:
    sock: socket.socket
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    other: "_End | None" = None

    def interest(self) -> int:
        """Read while the other end has taken everything; write while something waits for this one."""
        other = self.other
        reads = selectors.EVENT_READ if other is not None and not other.unsent else 0
        return reads | (selectors.EVENT_WRITE if self.unsent else 0)


class Tap:
    """Forwards connections from `port` on to `target_port`; resets all of them, both ways, when `cut_at_bytes` have passed.

    New connections are taken again at once after a cut. It runs in one thread while the `with` block does.
    """

    def __init__(self, cut_at_bytes: Sequence[int]) -> None:
        self.port = processes.free_port()
        self.cuts = 0
        self._cut_at_bytes = list(cut_at_bytes)
        self._target_port = 0
        self._passed_bytes = 0
        self._selector = selectors.DefaultSelector()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)

    def interpose(self, target_port: int) -> int:
        """Say where to; gives the port to dial instead."""
        self._target_port = target_port
        return self.port

    def arm(self) -> None:
        """Count from here: what passed so far (handshakes, readiness) does not matter."""
        self._passed_bytes = 0

    def __enter__(self) -> Self:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(5)
        self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for key, ready in self._selector.select(0.1):
                if key.data is None:
                    self._take()
                elif key.fileobj.fileno() >= 0:
                    self._turn(key.data, ready)
            if self._cut_at_bytes and self._passed_bytes >= self._cut_at_bytes[0]:
                self._cut_at_bytes.pop(0)
                self.cuts += 1
                self._reset_all()
        self._reset_all()

    def _take(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._target_port), timeout=2)
        except OSError:
            near.close()
            return
        ends = _End(near), _End(far)
        ends[0].other, ends[1].other = ends[1], ends[0]
        for end in ends:
            end.sock.setblocking(False)
            end.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(end.sock, end.interest(), end)

    def _turn(self, end: _End, ready: int) -> None:
        other = end.other
        assert other is not None
        try:
            if ready & selectors.EVENT_WRITE:
                end.unsent = end.unsent[end.sock.send(end.unsent) :]
            if ready & selectors.EVENT_READ and not other.unsent:
                received = end.sock.recv(_CHUNK)
                if not received:
                    self._close(end, other)
                    return
                self._passed_bytes += len(received)
                other.unsent = memoryview(received)
                with suppress(BlockingIOError):
                    other.unsent = other.unsent[other.sock.send(other.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._close(end, other)
            return
        for changed in (end, other):
            self._watch(changed)

    def _watch(self, end: _End) -> None:
        # A selector takes no empty interest: an end that waits for the other is taken out.
        known = end.sock in self._selector.get_map()
        if interest := end.interest():
            (self._selector.modify if known else self._selector.register)(end.sock, interest, end)
        elif known:
            self._selector.unregister(end.sock)

    def _close(self, *ends: _End) -> None:
        for end in ends:
            with suppress(KeyError, ValueError):
                self._selector.unregister(end.sock)
            end.sock.close()

    def _reset_all(self) -> None:
        ends = {end for key in self._selector.get_map().values() if key.data for end in (key.data, key.data.other)}
        for end in ends:
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close(*ends)
