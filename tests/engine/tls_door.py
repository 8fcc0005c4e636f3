"""A door that ends TLS, and a client whose every record the test decides."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import trio
from peers import LOOPBACK
from plane import OPEN_LIMITS, SERVICE, Plane

from fxgateway.doors.client import Client
from fxgateway.doors.door import CLIENT_OPTIONS, Door, DoorConfig
from fxgateway.routing.admission import Admission
from fxtunnel.engine.reactor import STREAM_EVENTS
from fxtunnel.engine.tls_handshake import Handshake
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.engine.tls_splice import TlsSplice
from fxtunnel.kit.settings import Address

T = TypeVar("T")
WITHIN_S = 10.0


class TlsClient(TlsSplice, Client):
    __slots__ = ()


class Head:
    """Peeks until `size` bytes of plaintext are there, as a door does that routes by the request's head."""

    def __init__(self, door: "TlsDoor", sock: TlsSocket, size: int) -> None:
        self.door = door
        self.sock = sock
        self.size = size
        self.is_over = False

    def on_event(self, events: int) -> None:
        if self.is_over:
            return  # an event and `again` in the same turn
        try:
            head = self.sock.peek(self.size)
        except OSError:
            self.on_crash()
            return
        if len(head) >= self.size or self.sock.at_end:
            self.is_over = True
            self.door.heads.append(head)
            self.door.reactor.unregister(self.sock)
            self.door.let_in(self.sock)
        elif self.sock.has_more:
            self.door.reactor.again(self)

    def on_crash(self) -> None:
        self.is_over = True
        self.door.reactor.forget(self.sock)
        self.door.heads.append(b"broken")
        self.sock.close()


@dataclass
class Seen:
    """What a door's handshakes came to."""

    secure: list[TlsSocket] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    under_way: list[Handshake] = field(default_factory=list)


class TlsDoor(Door):
    """Every client's TLS ends here; `head_bytes` are peeked at before the stream is opened."""

    context: ssl.SSLContext
    head_bytes = 0
    http_answer = b""

    def __init__(self, plane: Plane) -> None:
        super().__init__(plane.reactor, DoorConfig("d", Address.parse("127.0.0.1:1"), SERVICE), plane.registry, Admission(OPEN_LIMITS))
        self.seen = Seen()
        self.heads: list[bytes] = []

    def _take(self, sock: socket.socket, peer: object) -> None:
        handshake = Handshake(self.reactor, sock, self.context, self, http_answer=self.http_answer)
        self.seen.under_way.append(handshake)
        handshake.start()

    def on_secure(self, handshake: Handshake, sock: TlsSocket) -> None:
        self.seen.secure.append(sock)
        self.seen.under_way.remove(handshake)
        if self.head_bytes:
            head = Head(self, sock, self.head_bytes)
            self.reactor.register(sock, head, STREAM_EVENTS)
            self.reactor.again(head)
        else:
            self.let_in(sock)

    def on_failed(self, handshake: Handshake, reason: str) -> None:
        self.seen.failed.append(reason)
        self.seen.under_way.remove(handshake)

    def let_in(self, sock: TlsSocket) -> None:
        assert self._admit(sock, LOOPBACK)
        self._let_in(TlsClient(self, sock, LOOPBACK), "192.0.2.1:1")


def add_tls_door(plane: Plane, context: ssl.SSLContext, *, head_bytes: int = 0, http_answer: bytes = b"") -> tuple[TlsDoor, int]:
    """The door and its port."""
    door = TlsDoor(plane)
    door.context, door.head_bytes, door.http_answer = context, head_bytes, http_answer
    listener = socket.create_server((LOOPBACK, 0), backlog=512)
    listener.setblocking(False)
    for option in CLIENT_OPTIONS:
        listener.setsockopt(*option)
    door.open(listener)
    plane.doors.append(door)
    return door, listener.getsockname()[1]


class WebClient:
    """TLS over a blocking socket, for a thread. Nothing is sent before `flush`, so what shares a segment is the test's choice."""

    def __init__(self, port: int, context: ssl.SSLContext, name: str | None = "web.test", session: ssl.SSLSession | None = None) -> None:
        self.sock = socket.create_connection((LOOPBACK, port), timeout=WITHIN_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name, session=session)

    def __enter__(self) -> "WebClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def handshake(self, *, also: bytes = b"") -> "WebClient":
        """Shake hands; `also` travels with the last flight."""
        self._fed(self.tls.do_handshake)
        if also:
            self.tls.write(also)
        self.flush()
        return self

    def write(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    def flush(self) -> None:
        if self.outgoing.pending:
            self.sock.sendall(self.outgoing.read())

    def read(self, size: int = 65_536) -> bytes:
        """Plaintext; empty after close_notify. SSLEOFError after a bare FIN, ConnectionResetError after a RST."""
        try:
            return self._fed(lambda: self.tls.read(size))
        except ssl.SSLZeroReturnError:
            return b""

    def until_broken(self) -> bytes:
        """What comes before a RST, a fatal alert or a FIN without close_notify; fails if close_notify comes."""
        data = b""
        while True:
            try:
                more = self.read()
            except (ConnectionResetError, ssl.SSLError):
                return data
            assert more, f"a clean end after {len(data)} bytes"
            data += more

    def read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.read(size - len(data))
            assert more, f"the end after {len(data)} of {size} bytes"
            data += more
        return data

    def read_all(self) -> bytes:
        data = bytearray()
        while more := self.read():
            data += more
        return bytes(data)

    def end(self, *, fin: bool = True) -> None:
        """close_notify; everything that has arrived must have been read."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.flush()
        if fin:
            self.sock.shutdown(socket.SHUT_WR)

    def exchange(self, data: bytes, *, piece: int = 65_536) -> bytes:
        """Send `data` and close_notify while receiving all there is, up to the service's end."""
        answer = bytearray()
        view, at, ended = memoryview(data), 0, False
        cipher = b""
        self.sock.setblocking(False)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not cipher and not ended:
                if at < len(data):
                    at += self.tls.write(view[at : at + piece])
                else:
                    ended = True
                    with suppress(ssl.SSLWantReadError):
                        self.tls.unwrap()
                cipher = self.outgoing.read()
            busy = False
            if cipher:
                try:
                    cipher = cipher[self.sock.send(cipher) :]
                    busy = True
                except BlockingIOError:
                    pass
            try:
                chunk = self.sock.recv(262_144)
                busy = True
                if chunk:
                    self.incoming.write(chunk)
                else:
                    self.incoming.write_eof()
            except BlockingIOError:
                pass
            try:
                while more := self.tls.read(65_536):
                    answer += more
                return bytes(answer)
            except ssl.SSLZeroReturnError:
                return bytes(answer)
            except ssl.SSLWantReadError:
                pass
            if not busy:
                time.sleep(0.0005)
        raise AssertionError(f"no end after {len(answer)} bytes")

    def _fed(self, call: Callable[[], T]) -> T:
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                self.flush()
                data = self.sock.recv(65_536)
                if data:
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            except ssl.SSLError:
                self.flush()  # the alert
                raise


async def in_thread(call: Callable[[], T]) -> T:
    """Run a blocking client."""
    with trio.fail_after(WITHIN_S * 3):
        return await trio.to_thread.run_sync(call)
