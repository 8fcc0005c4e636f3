"""Task: one connection from this relay to a service, for the requests of one client connection, one after the other."""

import contextlib
import errno
import math
import os
import select
import socket
from collections.abc import Callable
from typing import Final

import trio

from fxrelay.cluster.settings import PathKind
from fxrelay.delivery.addresses import share_s
from fxrelay.delivery.delivery import DeliveryDesk, connect
from fxrelay.delivery.services import Endpoint
from fxrelay.web.heads import MAX_ANSWER_HEAD_BYTES, HeadScanner
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.splice import CLOSE_CLEANLY, abort
from fxtunnel.errors import NodeError
from fxtunnel.model import RelayId

RECEIVE_BYTES: Final = 65_536
SERVICE_EVENTS: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_LOOK: Final = socket.MSG_PEEK | socket.MSG_DONTWAIT


class ServiceLink:
    """A connected socket, and bytes read beyond the last response. Owns the socket until `close` or `abort`, or until `sock` is taken over.

    `is_used` tells whether a request has been answered on it: a service may end such a connection at any moment.
    """

    __slots__ = ("_reactor", "_stream", "is_used", "node", "on_readable", "scanner", "sock", "way")

    def __init__(self, sock: socket.socket, node: RelayId | None, way: PathKind) -> None:
        self.sock = sock
        self.node = node
        self.way = way
        self.is_used = False
        self.on_readable: Callable[[], None] | None = None
        """Called from the reactor, once `watch` was, when something may have arrived."""
        self._reactor: Reactor | None = None
        self.scanner = HeadScanner(MAX_ANSWER_HEAD_BYTES)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    def watch(self, reactor: Reactor) -> None:
        """Let the reactor tell `on_readable`. May be repeated."""
        if self._reactor is None:
            self._reactor = reactor
            reactor.register(self.sock, self, SERVICE_EVENTS)

    def unwatch(self) -> None:
        """Somebody else takes the socket over."""
        reactor, self._reactor = self._reactor, None
        if reactor is not None:
            reactor.unregister(self.sock)

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self.on_readable is not None:
            self.on_readable()

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; this connection ends, nothing else does."""
        self.abort()

    def send_nowait(self, data: bytes) -> int:
        """Send as much as the socket takes at once; how much that was. A broken connection takes nothing: `send` tells."""
        try:
            return self.sock.send(data)
        except OSError:
            return 0

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of it.

        Raises:
            trio.BrokenResourceError: the service closed the connection.
        """
        await self._stream.send_all(data)

    async def send_some(self, data: memoryview) -> int:
        """Send as much as the socket takes as soon as it takes anything; how much that was. For what `send_nowait` has left.

        Raises:
            trio.BrokenResourceError: the service closed the connection.
        """
        while True:
            await trio.lowlevel.wait_writable(self.sock)
            try:
                return self.sock.send(data)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(f"the service broke the connection: {exc.strerror}") from exc

    async def receive(self) -> bytes:
        """More bytes; `b""` at the end.

        Raises:
            trio.BrokenResourceError: the service reset the connection.
        """
        return await self._stream.receive_some(RECEIVE_BYTES)

    async def receive_later(self) -> bytes:
        """As `receive`, where nothing can have arrived yet: a look for it would cost a call for nothing."""
        await trio.lowlevel.wait_readable(self.sock)
        try:
            return self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return await self.receive()
        except OSError as exc:
            raise trio.BrokenResourceError(f"the service broke the connection: {exc.strerror}") from exc

    async def send_eof(self) -> None:
        """Nothing more will be sent.

        Raises:
            trio.BrokenResourceError: the service closed the connection.
        """
        await self._stream.send_eof()

    def is_stale(self) -> bool:
        """Whether the service has closed it, or says something unasked: it cannot take another request."""
        if self.scanner.rest:
            return True
        try:
            self.sock.recv(1, _LOOK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close in order. May be repeated."""
        self._forget()
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_CLEANLY)
        self.sock.close()

    def abort(self) -> None:
        """Close with RST: the service must not take what it has for the whole request. May be repeated."""
        self._forget()
        with contextlib.suppress(OSError):
            abort(self.sock)

    def _forget(self) -> None:
        reactor, self._reactor = self._reactor, None
        self.on_readable = None
        if reactor is not None:
            reactor.forget(self.sock)


async def open_link(
    desk: DeliveryDesk, endpoints: tuple[Endpoint, ...], greeting: bytes, node: RelayId | None, way: PathKind
) -> ServiceLink:
    """A connection to the first endpoint that takes it. Divides the time that it is given among them; safe to cancel.

    Raises:
        NodeError: none does; `str()` says what the last one said.
    """
    problem = "no address"
    deadline = trio.current_effective_deadline()
    in_order = desk.addresses.in_order(endpoints, desk.reactor.now)
    for position, endpoint in enumerate(in_order):
        sock = connect(endpoint)
        if isinstance(sock, str):
            problem = sock
            continue
        others = len(in_order) - position - 1
        left_s = deadline - trio.current_time()
        try:
            error = errno.ETIMEDOUT
            with trio.move_on_after(max(0.0, share_s(left_s, 1 + others)) if others else math.inf) as share:
                error = await _outcome(sock)
            if share.cancelled_caught:
                desk.addresses.was_late(endpoint, desk.reactor.now)
            if not error and greeting and sock.send(greeting) != len(greeting):
                error = errno.ENOBUFS
        except OSError as exc:
            error = exc.errno or errno.EIO
        except BaseException:
            sock.close()
            raise
        if not error:
            return ServiceLink(sock, node, way)
        sock.close()
        problem = os.strerror(error)
    await trio.lowlevel.checkpoint()
    raise NodeError(problem)


async def _outcome(sock: socket.socket) -> int:
    """The error of a connection that is under way, or 0."""
    try:
        sock.getpeername()
    except OSError:
        await trio.lowlevel.wait_writable(sock)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    await trio.lowlevel.checkpoint()
    return 0
