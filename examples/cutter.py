"""A TCP forwarder that cuts what runs through it, with RST: what a rebooting firewall does to a tunnel."""

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
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()

    def start(self, target_port: int) -> None:
        """Begin to forward."""
        threading.Thread(target=self._accept, args=(target_port,), daemon=True).start()

    def cut(self) -> int:
        """End every connection with RST on both sides; returns how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
                    sock.shutdown(socket.SHUT_RD)  # wakes the thread that reads; the close below then sends RST
                    sock.close()
        return len(pairs)

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
            pair = (inner, outer)
            with self._lock:
                self._pairs.add(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._copy, args=(source, sink, pair), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 18):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)
            return
        with self._lock:
            self._pairs.discard(pair)
        for sock in pair:
            sock.close()
