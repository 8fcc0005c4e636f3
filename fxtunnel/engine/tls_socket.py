"""Pump: a TLS socket with the manners of a plain one: BlockingIOError, OSError, half-close, and short reads only when there is no more.

OpenSSL works on the file descriptor itself. It reads one record at a time and never beyond it, so what has not been read yet is in the
kernel, in the rest of one record (16 KiB), or in what `peek` has kept.
"""

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Final

from fxtunnel.engine.tls_calls import corked

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

MAX_RECORDS: Final = 64
"""Records taken by one read: 16 KiB each from a sender of bulk data, a byte each from one who wants to keep us busy."""
WRITE_BYTES: Final = 65_536
"""Handed to OpenSSL at once. It takes all or nothing, so this is also how much a blocked socket may keep from being counted as sent."""
_MAX_RECORD_BYTES: Final = 16_384
_MOST_SAID_BYTES: Final = 65_536


class TlsSocket(ssl.SSLSocket):
    """What a `TlsSplice` reads and writes: non-blocking, handshake done. Made by `Handshake`, through `SSLContext.sslsocket_class`.

    close_notify reads as the end (0 bytes); a connection that just stops is an OSError, because anyone on the way can forge a FIN.
    `close` says nothing to the client; `shutdown(SHUT_WR)` sends close_notify, and what the client still sends can still be read.
    """

    has_more = False
    """The last `recv_into` or `peek` stopped before it had everything: call again, no event will tell."""
    read_awaits_write = False
    """Reading can go on when the socket takes bytes: OpenSSL has to answer a KeyUpdate first (RFC 8446, 4.6.3)."""
    write_awaits_read = False
    """Writing can go on when bytes have arrived."""
    at_end = False
    """The client's close_notify has come; what came before it may still be unread."""
    _unread = b""
    _broken: OSError | None = None
    _goodbye: bytes | None = None

    def recv_into(self, buffer: "WriteableBuffer", nbytes: int | None = None, flags: int = 0) -> int:
        """Fill `buffer` from as many records as it takes. Less than asked for means: wait for the next event, unless `has_more`.

        Raises:
            BlockingIOError: there is nothing now.
            OSError: the connection broke, or ended without close_notify.
        """
        view = buffer if isinstance(buffer, memoryview) else memoryview(buffer)
        limit = nbytes or len(view)
        filled = 0
        self.has_more = self.read_awaits_write = False
        if self._unread:
            filled = min(len(self._unread), limit)
            view[:filled] = self._unread[:filled]
            self._unread = self._unread[filled:]
        elif self._broken is not None:
            raise self._broken
        if filled == limit or self.at_end:
            return filled
        try:
            for _ in range(MAX_RECORDS):
                count: int = self.read(limit - filled, view[filled:] if filled else view)  # type: ignore[assignment]  # typeshed says bytes
                if not count:
                    self.at_end = True
                    break
                filled += count
                if filled == limit:
                    return filled
            self.has_more = filled > 0
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
            self.read_awaits_write = isinstance(exc, ssl.SSLWantWriteError)
            if not filled:
                raise _would_block() from None
        except ssl.SSLZeroReturnError:  # what `read` says instead of 0 when our own close_notify is out
            self.at_end = True
            self.has_more = filled > 0
        except OSError as exc:
            if not filled:
                raise
            self._broken = exc
            self.has_more = True
        return filled

    def peek(self, limit_bytes: int) -> bytes:
        """What has arrived, up to `limit_bytes`, without taking it: `recv_into` returns it again. Empty: nothing yet, or `at_end`.

        Less than asked for means: wait for the next event, unless `has_more` (then use `Reactor.again`).

        Raises:
            OSError: the connection broke, or ended without close_notify.
        """
        self.has_more = self.read_awaits_write = False
        chunks = [self._unread]
        room = limit_bytes - len(self._unread)
        records = 0
        try:
            while room > 0 and not self.at_end and not self.has_more:
                chunk = self.read(min(room, _MAX_RECORD_BYTES))
                self.at_end = not chunk
                chunks.append(chunk)
                room -= len(chunk)
                records += 1
                self.has_more = records == MAX_RECORDS
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self.read_awaits_write = True
        except ssl.SSLZeroReturnError:
            self.at_end = True
        self._unread = b"".join(chunks)
        return self._unread[:limit_bytes]

    def send(self, data: "ReadableBuffer", flags: int = 0) -> int:
        """Send as much as the socket takes. Less than all of it means: wait until it can be written.

        The rest must be offered again with the same bytes in front and no fewer of them (SSL_write(3)).

        Raises:
            BlockingIOError: it takes nothing now.
            OSError: the connection broke, or `shutdown` came before.
        """
        if self._goodbye is not None:
            raise BrokenPipeError(errno.EPIPE, "close_notify has been sent")
        self.write_awaits_read = False
        if len(data) <= _MAX_RECORD_BYTES:  # type: ignore[arg-type]  # whoever sends has counted it
            return self._send_records(data)
        return corked(self, self._send_records, data)

    def _send_records(self, data: "ReadableBuffer") -> int:
        sent = 0
        try:
            with memoryview(data) as view:
                size = len(view)
                if size <= WRITE_BYTES:
                    return self.write(view)
                while sent < size:
                    sent += self.write(view[sent : sent + WRITE_BYTES])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError) as exc:
            self.write_awaits_read = isinstance(exc, ssl.SSLWantReadError)
            if not sent:
                raise _would_block() from None
        return sent

    def shutdown(self, how: int) -> None:
        """SHUT_WR: send close_notify and FIN, once everything has been sent; reading goes on. Anything else is the plain socket's.

        Raises:
            BlockingIOError: the socket does not take the close_notify now; call again when it can be written.
            OSError: the connection broke.
        """
        if how == socket.SHUT_WR:
            if self._goodbye is None:
                self._goodbye = self._encrypt_goodbye()
            while self._goodbye:
                self._goodbye = self._goodbye[socket.socket.send(self, self._goodbye) :]
        socket.socket.shutdown(self, how)  # not SSLSocket's, which would go on reading in the clear

    def _encrypt_goodbye(self) -> bytes:
        """The close_notify record, encrypted but not sent.

        SSLSocket.unwrap calls SSL_shutdown twice. The second call reads, and application data that it finds is lost, with the whole
        connection ("application data after close notify"). So a socket of our own, which is empty and keeps what is written, stands in
        under the descriptor's number meanwhile. The epoll goes by the open file and does not notice.
        """
        while waiting := self.pending():
            self._unread += self.read(waiting)
        with stand_in().instead_of(self.fileno()) as said:
            try:
                self.unwrap()
                self.at_end = True
            except ssl.SSLWantReadError:
                pass  # the client has not ended yet
        return bytes(said)  # also the rest of a record, if OpenSSL still had one


class StandIn:
    """A socket that keeps what is written to it, for the goodbyes of all sockets, one after the other, in one thread."""

    def __init__(self) -> None:
        inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with inside, outside:
            self._place = os.dup(inside.fileno())
            self._inside, self._outside = inside.detach(), outside.detach()

    @contextmanager
    def instead_of(self, number: int) -> Iterator[bytearray]:
        """Have that descriptor lead here within the block; after it, what was written. No other descriptor is needed for that."""
        said, place, inside = bytearray(), self._place, self._inside
        os.dup2(number, place, inheritable=False)
        try:
            os.dup2(inside, number, inheritable=False)
            try:
                yield said
            finally:
                os.dup2(place, number, inheritable=False)
        finally:
            os.dup2(inside, place, inheritable=False)  # a file that is open here would stay in the epoll when its owner closes it
            with suppress(BlockingIOError):
                said += os.read(self._outside, _MOST_SAID_BYTES)


@cache
def stand_in() -> StandIn:
    """The one of this process. Ask for it early: it takes the descriptors of all goodbyes, and there may be none left when one is due.

    Raises:
        OSError: there are none now.
    """
    return StandIn()


def _would_block() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, "not now")
