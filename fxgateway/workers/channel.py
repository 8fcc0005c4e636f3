"""Pump: a private line between two processes of a gateway, for JSON messages and open sockets. Sending never blocks.

A message is cut into packets of a SOCK_SEQPACKET pair: a byte (1: more follows, 0: the last) and JSON. Sockets travel with the last.
"""

import array
import errno
import json
import logging
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from fxtunnel.engine.reactor import LINK_EVENTS, WRITE, Reactor, Timer

logger = logging.getLogger(__name__)

Message = dict[str, Any]

PACKET_BYTES: Final = 32_768
MAX_SOCKETS: Final = 200
"""With one message; the kernel takes 253 (SCM_MAX_FD)."""
MAX_MESSAGE_BYTES: Final = 64 << 20
"""A status page about 4,096 relays with all their links takes about 5 MB."""
MAX_WAITING_BYTES: Final = 32 << 20
"""Queued for the other end: a process that is stuck must not fill the memory of the others."""
MAX_PACKETS_BEFORE_CLIENTS: Final = 256
"""Queued packets up to which a client may still be sent this way: it would have to wait behind them."""
PACKETS_PER_TURN: Final = 64
"""Packets read in a row before other connections of this process get a turn."""
AGAIN_S: Final = 0.01
"""Before the next attempt to send what the kernel has no memory for, or too many descriptors on their way (unix(7)): no event tells."""
_SHORT: Final = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_MORE, _LAST = b"\1", b"\0"


class ChannelOwner(Protocol):
    """Who gets the messages of a line. Nothing here may block."""

    def on_message(self, channel: "Channel", message: Message, sockets: list[socket.socket]) -> None:
        """A message; the sockets are the owner's now, non-blocking or not as the sender had them."""

    def on_gone(self, channel: "Channel") -> None:
        """The other end is gone; the channel is closed. Called once, and not after `close`."""


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a new line, non-blocking."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.setblocking(False)
    other.setblocking(False)
    return one, other


class Inbox:
    """Puts the packets of a line together to messages. It blocks, or does not, as the socket is set."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._partial = bytearray()

    def read(self) -> tuple[Message, list[socket.socket]] | None:
        """Read one packet. Returns the message that it completes, None if that is not complete yet.

        Raises:
            BlockingIOError, TimeoutError: nothing has come.
            OSError: the other end is gone, or a message is too long; the line cannot be used any more.
        """
        packet, fds, _, _ = socket.recv_fds(self._sock, PACKET_BYTES, MAX_SOCKETS, socket.MSG_CMSG_CLOEXEC)
        sockets = [socket.socket(fileno=fd) for fd in fds]  # fewer than were sent if this process is out of descriptors
        if not packet:
            _close_all(sockets)
            raise OSError(errno.EPIPE, "it is gone")
        self._partial += packet[1:]
        if len(self._partial) > MAX_MESSAGE_BYTES:
            _close_all(sockets)
            raise OSError(errno.EMSGSIZE, "a message is too long")
        if packet[:1] != _LAST:
            return None
        data, self._partial = bytes(self._partial), bytearray()
        return json.loads(data), sockets


class Channel:
    """One end of a line. Owns its socket."""

    def __init__(self, reactor: Reactor, sock: socket.socket, owner: ChannelOwner, number: int = 0) -> None:
        """`number` says who is at the other end: a worker, or 0 for the parent."""
        self.number = number
        self.is_open = True
        self._reactor = reactor
        self._sock = sock
        self._owner = owner
        self._waiting: deque[tuple[bytes, tuple[socket.socket, ...]]] = deque()
        self._waiting_bytes = 0
        self._again: Timer | None = None
        self._inbox = Inbox(sock)
        reactor.register(sock, self, LINK_EVENTS)

    @property
    def is_clear(self) -> bool:
        """Whether the other end has taken everything so far."""
        return not self._waiting

    @property
    def has_room(self) -> bool:
        """Whether a client may be sent this way without having to wait long."""
        return self.is_open and len(self._waiting) < MAX_PACKETS_BEFORE_CLIENTS

    def send(self, message: Message, sockets: Sequence[socket.socket] = ()) -> bool:
        """Send at once, or queue it until the other end takes it, in order. Owns `sockets` from then on, and closes them when sent.

        False: the line is closed or too full. Nothing was sent, and the sockets are still the caller's.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if not self.is_open or self._waiting_bytes + len(data) > MAX_WAITING_BYTES or len(sockets) > MAX_SOCKETS:
            return False
        was_clear, step = self.is_clear, PACKET_BYTES - 1
        for start in range(0, len(data), step):
            is_last = start + step >= len(data)
            packet = (_LAST if is_last else _MORE) + data[start : start + step]
            self._waiting.append((packet, tuple(sockets) if is_last else ()))
            self._waiting_bytes += len(packet)
        if was_clear:
            self._write()
        return True

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if events & WRITE:
            self._write()
        if events & ~WRITE and self.is_open:
            self._read()

    def on_crash(self) -> None:
        """From the reactor: a bug of ours in what a message led to. The line stays."""

    def close(self) -> None:
        """Hang up. What has not left is dropped, its sockets with it. May be repeated."""
        if self.is_open:
            self.is_open = False
            if self._again is not None:
                self._again.cancel()
            self._reactor.unregister(self._sock)
            self._sock.close()
            for _, sockets in self._waiting:
                _close_all(sockets)
            self._waiting.clear()
            self._waiting_bytes = 0

    def _write(self) -> None:
        had_to_wait = False
        while self._waiting and self.is_open:
            packet, sockets = self._waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno() for sock in sockets]))] if sockets else []
            try:
                self._sock.sendmsg([packet], rights)
            except BlockingIOError:
                had_to_wait = True
                break
            except OSError as exc:
                if exc.errno in _SHORT:
                    self._again = self._reactor.call_later(AGAIN_S, self._write)
                    break
                self._break(str(exc.strerror or exc))
                return
            self._waiting.popleft()
            self._waiting_bytes -= len(packet)
            _close_all(sockets)
        if self.is_open:
            self._reactor.modify(self._sock, LINK_EVENTS | WRITE if had_to_wait else LINK_EVENTS)

    def _read(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                received = self._inbox.read()
            except BlockingIOError:
                return
            except OSError as exc:
                self._break(str(exc.strerror or exc))
                return
            if received is not None:
                self._owner.on_message(self, *received)
                if not self.is_open:
                    return

    def _break(self, reason: str) -> None:
        logger.debug("line to %d: %s", self.number, reason)
        self.close()
        self._owner.on_gone(self)


def _close_all(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.close()
