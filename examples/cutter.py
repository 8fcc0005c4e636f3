"""A TCP forwarder that cuts what runs through it, with RST, as a rebooting firewall does; or lets it fall silent, as one that forgot it."""

import contextlib
import socket
import struct
import threading

_LINGER_NONE = struct.pack("ii", 1, 0)


class Cutter:
    """Forwards 127.0.0.1:`port` to a target port. Threads, since it is only a prop."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._ways: list[_Way] = []
        self._lock = threading.Lock()
        self._is_cut_off = False

    def start(self, target_port: int) -> None:
        """Begin to forward."""
        threading.Thread(target=self._accept, args=(target_port,), daemon=True).start()

    def cut(self) -> int:
        """End every connection with RST on both sides; returns how many there were."""
        with self._lock:
            ways, self._ways = self._ways, []
        for way in ways:
            way.reset()
        return len(ways)

    def freeze(self) -> int:
        """Let every connection fall silent, and open: nothing is forwarded, not even its end. Later ones flow. Returns how many."""
        with self._lock:
            for way in self._ways:
                way.flows.clear()
            return len(self._ways)

    def freeze_one(self, number: int) -> None:
        """As `freeze`, for the connection that is this one by age among those that flow, the oldest being 0."""
        with self._lock:
            [way for way in self._ways if way.flows.is_set()][number].flows.clear()

    def thaw(self) -> None:
        """What was frozen flows again."""
        self._is_cut_off = False
        with self._lock:
            for way in self._ways:
                way.flows.set()

    def cut_off(self) -> None:
        """As `freeze`, and later connections are silent from the start: a partition. `thaw` ends it."""
        self._is_cut_off = True
        self.freeze()

    def close(self) -> None:
        """Stop forwarding; what runs is cut."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self, target_port: int) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            try:
                outer = socket.create_connection(("127.0.0.1", target_port))
            except OSError:
                inner.close()
                continue
            for sock in (inner, outer):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            way = _Way(inner, outer)
            with self._lock:
                self._ways.append(way)
                if self._is_cut_off:
                    way.flows.clear()
            for source, sink in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._copy, args=(way, source, sink), daemon=True).start()

    def _copy(self, way: "_Way", source: socket.socket, sink: socket.socket) -> None:
        try:
            while block := source.recv(1 << 18):
                way.flows.wait()
                sink.sendall(block)
            way.flows.wait()
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            way.flows.wait()
            way.reset()
        else:
            if not way.ended(source):
                return
        with self._lock:
            self._ways = [other for other in self._ways if other is not way]


class _Way:
    """A connection in two halves, and whether its bytes flow."""

    def __init__(self, inner: socket.socket, outer: socket.socket) -> None:
        self.flows = threading.Event()
        self.flows.set()
        self._socks = (inner, outer)
        self._ended: set[socket.socket] = set()
        self._lock = threading.Lock()

    def ended(self, source: socket.socket) -> bool:
        """Note that this half has said all it had to say. Whether that was the last: then all is closed."""
        with self._lock:
            self._ended.add(source)
            if len(self._ended) < len(self._socks):
                return False
            for sock in self._socks:
                sock.close()
            return True

    def reset(self) -> None:
        """Close both halves with RST."""
        with self._lock:
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
                    sock.shutdown(socket.SHUT_RD)  # wakes the thread that reads; the close below then sends RST
                sock.close()
        self.flows.set()
