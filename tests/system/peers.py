"""Services in threads, clients to go with them, and what came of a client: the right bytes, RST, or something that must never be."""

import contextlib
import hashlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

MIB = 1 << 20
DIGEST_BYTES = 32
_HEAD = struct.Struct(">QQ")
_BLOCK = random.Random(7).randbytes(24 * MIB)
"""Random, so that a piece that is lost, repeated or moved changes every hash."""
_LINGER_NONE = struct.pack("ii", 1, 0)


class Outcome(Enum):
    """How an exchange ended, as the client saw it."""

    RIGHT = "right bytes, clean end"
    RESET = "RST"
    CUT_SHORT = "a clean end too early"
    WRONG = "wrong bytes"
    STUCK = "nothing moved"


def payload(seed: int, size_bytes: int) -> memoryview:
    """Bytes that belong to `seed`."""
    start = seed * 65_537 % (len(_BLOCK) - size_bytes)
    return memoryview(_BLOCK)[start : start + size_bytes]


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    sock.close()


def dial(port: int, timeout_s: float = 30.0, source: str = "127.0.0.1") -> socket.socket:
    """A client at a door. Raises ConnectionResetError when it is turned away before its connect has returned."""
    return socket.create_connection(("127.0.0.1", port), timeout_s, (source, 0))


def read_to_end(sock: socket.socket) -> bytes:
    """Everything until a clean end. Raises ConnectionResetError for a RST."""
    received = bytearray()
    while block := sock.recv(1 << 18):
        received += block
    return bytes(received)


def read_exactly(sock: socket.socket, size_bytes: int) -> bytes:
    """Raises EOFError when there are fewer."""
    received = bytearray()
    while len(received) < size_bytes:
        block = sock.recv(size_bytes - len(received))
        if not block:
            raise EOFError(f"{len(received)} of {size_bytes} bytes")
        received += block
    return bytes(received)


def say(client: socket.socket, word: bytes = b"hello") -> None:
    """A client of an echo: what it says comes back."""
    client.sendall(word)
    assert read_exactly(client, len(word)) == word


def is_served(port: int) -> bool:
    """Whether a new client gets its echo."""
    try:
        with dial(port, 5) as client:
            client.sendall(b"hello")
            return read_exactly(client, 5) == b"hello"
    except (OSError, EOFError):
        return False


def is_refused(port: int) -> bool:
    """Whether nobody listens there any more. A process that is to stop listening does so when it has its turn."""
    try:
        dial(port).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass
    return False


class Service:
    """A service behind the firewall: `handler(sock)` runs in a thread for each connection. Listens at `address`, or at `path`."""

    def __init__(
        self, handler: Callable[[socket.socket], None], path: Path | None = None, address: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        if path is None:
            self._listener = socket.create_server(address, backlog=1024)
            self.target = f"{address[0]}:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(1024)
            self.target = f"unix:{path}"
        self.accepted = 0
        self.problems: list[str] = []
        self._handler = handler
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop, and reset whoever is still connected."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            with self._lock:
                self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._handler(sock)
        except OSError:
            pass  # what a service sees of a client that has gone
        except Exception as exc:
            self.problems.append(f"{type(exc).__name__}: {exc}")
        finally:
            with self._lock:
                self._open.discard(sock)


def echo(sock: socket.socket) -> None:
    """A service that sends back what comes, its end included."""
    while block := sock.recv(1 << 16):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)


def swap(sock: socket.socket) -> None:
    """The service side of `exchange`. A clean end of what it receives, before all of it has come, is a problem to report."""
    try:
        seed, size_bytes = _HEAD.unpack(read_exactly(sock, _HEAD.size))
    except EOFError:
        return  # a client that left before it said anything
    sender = _Sender(sock, payload(seed + 1, size_bytes))
    digest = hashlib.sha256()
    received_bytes = 0
    try:
        while block := sock.recv(1 << 18):
            digest.update(block)
            received_bytes += len(block)
    finally:
        sender.join()
    if received_bytes != size_bytes and not sender.was_reset:
        raise AssertionError(f"stream {seed}: a clean end after {received_bytes} of {size_bytes} bytes")
    sock.sendall(digest.digest())
    sock.shutdown(socket.SHUT_WR)


def exchange(port: int, seed: int, size_bytes: int, timeout_s: float = 60.0, rate_bytes_per_s: float = 0.0) -> Outcome:
    """Send and receive `size_bytes` at once through a door to `swap`, and compare the hashes of both directions."""
    try:
        sock = dial(port, timeout_s)
    except ConnectionError:
        return Outcome.RESET
    except TimeoutError:
        return Outcome.STUCK
    with sock:
        sent = payload(seed, size_bytes)
        try:
            sock.sendall(_HEAD.pack(seed, size_bytes))
        except OSError:
            return Outcome.RESET
        sender = _Sender(sock, sent, rate_bytes_per_s, then_end=True)
        try:
            received = read_to_end(sock)
        except TimeoutError:
            return Outcome.STUCK
        except OSError:
            return Outcome.RESET
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
            sender.join()
    if len(received) != size_bytes + DIGEST_BYTES:
        return Outcome.RESET if sender.was_reset else Outcome.CUT_SHORT
    right = payload(seed + 1, size_bytes) == received[:size_bytes] and hashlib.sha256(sent).digest() == received[size_bytes:]
    return Outcome.RIGHT if right else Outcome.WRONG


def exchanges(port: int, count: int, size_bytes: int, **options: float) -> "Crowd":
    """`count` exchanges at once."""
    return Crowd([lambda seed=seed: exchange(port, seed, size_bytes, **options) for seed in range(1, count + 1)])


class Crowd:
    """Clients that run at once."""

    def __init__(self, clients: list[Callable[[], Outcome]]) -> None:
        self._pool = ThreadPoolExecutor(len(clients))
        self._futures = [self._pool.submit(client) for client in clients]

    @property
    def running(self) -> int:
        """How many have not ended."""
        return sum(not future.done() for future in self._futures)

    def outcomes(self) -> list[Outcome]:
        """How each ended; waits for all."""
        try:
            return [future.result() for future in self._futures]
        finally:
            self._pool.shutdown()


def how_it_ends(sock: socket.socket, limit_s: float) -> tuple[str, float]:
    """Wait for the end of a connection: "reset", "fin" or "open", and the seconds it took."""
    began = time.monotonic()
    sock.settimeout(limit_s)
    try:
        while sock.recv(1 << 16):
            pass
        end = "fin"
    except TimeoutError:
        end = "open"
    except OSError:
        end = "reset"
    return end, time.monotonic() - began


def visit(port: int, limit_s: float = 5.0, source: str = "127.0.0.1") -> tuple[str, float]:
    """How a client that says nothing ends; see `how_it_ends`. A RST may be there before its connect has returned."""
    began = time.monotonic()
    try:
        client = dial(port, limit_s, source)
    except ConnectionResetError:
        return "reset", time.monotonic() - began
    with client:
        return how_it_ends(client, limit_s)


class _Sender:
    """Sends in a thread of its own. A RST that comes before any FIN is told to one system call only, which may be a send instead of the
    reader's recv (the reader then sees an end that looks clean): `was_reset` says so."""

    def __init__(self, sock: socket.socket, data: memoryview, rate_bytes_per_s: float = 0.0, *, then_end: bool = False) -> None:
        self.was_reset = False
        self._sock = sock
        self._data = data
        self._rate_bytes_per_s = rate_bytes_per_s
        self._then_end = then_end
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        """Until it has sent everything, or cannot."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._send()
        except ConnectionResetError:
            self.was_reset = True
        except OSError:
            pass  # a peer that has gone is seen by whoever reads

    def _send(self) -> None:
        if self._rate_bytes_per_s:
            step = max(1, int(self._rate_bytes_per_s / 20))
            for start in range(0, len(self._data), step):
                self._sock.sendall(self._data[start : start + step])
                time.sleep(step / self._rate_bytes_per_s)
        else:
            self._sock.sendall(self._data)
        if self._then_end:
            self._sock.shutdown(socket.SHUT_WR)
