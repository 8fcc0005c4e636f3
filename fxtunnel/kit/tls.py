"""Task: TLS 1.3 straight on a socket, and a trio stream over it.

Not trio's SSLStream: it buffers records in memory and drops the alert when a handshake fails, so the peer never learns why and keeps
waiting. Here OpenSSL owns the file descriptor, sends its own alerts, and the finished socket can be handed to the engine as it is.
"""

import contextlib
import datetime as dt
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import trio

from fxtunnel.errors import ConfigError, LocalProtocolError
from fxtunnel.kit.conflict_detector import ConflictDetector
from fxtunnel.kit.files import read_secret
from fxtunnel.kit.link_tls import LinkContext, LinkSocket, link_client_context, link_server_context
from fxtunnel.kit.tls_problems import (
    HandshakeFailed,
    HandshakeProblem,
    describe_dates,
    explain_to_client,
    explain_to_server,
)

__all__ = [
    "HandshakeFailed",
    "HandshakeProblem",
    "TlsStream",
    "client_context",
    "handshake_client",
    "handshake_server",
    "handshake_web_client",
    "server_context",
]

DEFAULT_RECEIVE_BYTES: Final = 65536
_SEND_CHUNK_BYTES: Final = 65536
_DISCARD_BYTES: Final = 65536
# A look at a certificate that was just refused for its dates; only to say by how much.
_LOOK_S: Final = 2.0

_TlsSocket = TypeVar("_TlsSocket", LinkSocket, ssl.SSLSocket)
_A = TypeVar("_A")
_T = TypeVar("_T")


def server_context(cert_path: Path, key_path: Path, alpn: Sequence[str]) -> LinkContext:
    """TLS 1.3 for a listening port, without sessions to resume: every connection is a full handshake.

    Raises:
        ConfigError: a file is missing, is not PEM, is readable by others, or the two do not belong together.
    """
    if b"ENCRYPTED" in read_secret(key_path):
        raise ConfigError.one(key_path, "", "is encrypted with a passphrase; run: openssl pkey -in OLD -out NEW")
    if not cert_path.is_file():
        if cert_path.exists():
            raise ConfigError.one(cert_path, "", "is not a regular file")
        raise ConfigError.one(cert_path, "", "does not exist; put the certificate there, or issue one (certs/README.md)")
    try:
        return link_server_context(cert_path, key_path, alpn)
    except (ssl.SSLError, OSError) as exc:
        reason = (
            "does not belong to the key" if "MISMATCH" in (getattr(exc, "reason", "") or "") else "certificate or key is not in PEM format"
        )
        raise ConfigError.one(cert_path, "", f"{reason} ({key_path})") from exc


def client_context(ca_pem: str, alpn: Sequence[str]) -> LinkContext:
    """TLS 1.3 towards a server whose certificate must come from `ca_pem` (one or more certificates) and bear the name asked for.

    Raises:
        ConfigError: `ca_pem` holds no certificate.
    """
    try:
        return link_client_context(ca_pem, alpn)
    except ValueError as exc:
        raise ConfigError.one("certificate authority", "", "holds no certificate in PEM format") from exc


async def handshake_server(sock: socket.socket, context: LinkContext) -> LinkSocket:
    """Answer a client's handshake on a connected socket, which must not be used any more: it is taken over, or closed.

    Sets no deadline; cancelling closes the socket. The result is non-blocking and belongs to the caller, and has agreed on one of
    the context's ALPN protocols.

    Raises:
        HandshakeFailed: the peer was sent an alert (when there was anything of TLS to answer) and the socket is closed.
    """
    return _with_alpn(await _handshake(sock, lambda: context.wrap(sock), explain_to_server))


async def handshake_client(
    sock: socket.socket, context: LinkContext, server_hostname: str, look: Callable[[socket.socket], None] | None = None
) -> LinkSocket:
    """Open TLS towards `server_hostname` (a name or an IP address) on a connected socket, which is taken over, or closed.

    As `handshake_server`. `look` may peek at what the server says first, before TLS takes it, and raise what that means. When the server's
    certificate is refused for its dates, the address is dialled once more, for at most 2 s, to read those dates: the message then says by
    how much.

    Raises:
        HandshakeFailed: with the reason; `problem` tells untrusted, expired, not yet valid and misnamed certificates apart.
    """
    return await _handshake_client(sock, lambda: context.wrap(sock, server_hostname), server_hostname, look)


async def handshake_web_client(sock: socket.socket, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLSocket:
    """As `handshake_client`, towards a server that `context` is to judge; it, too, must agree on one of the context's ALPN protocols."""

    def wrap() -> ssl.SSLSocket:
        # The ssl module loses the descriptor when it is the one to find a name that cannot be encoded.
        server_hostname.encode("idna")
        return context.wrap_socket(sock, False, False, suppress_ragged_eofs=False, server_hostname=server_hostname)

    return await _handshake_client(sock, wrap, server_hostname, None)


class TlsStream(trio.abc.HalfCloseableStream):
    """A trio stream over a socket whose handshake is done; the stream owns it until `detach`.

    One task may send while another receives. A receive may be cancelled without losing anything; a cancelled `send_all` leaves a
    record half written, so the stream can send nothing more. Only the peer's close_notify reads as the end (`b""`): a connection
    that just stops is a BrokenResourceError, because TCP's FIN can be forged.
    """

    def __init__(self, sock: LinkSocket) -> None:
        self._sock = sock
        self._unread = b""
        self._is_open = True
        self._can_send = True
        self._sending = ConflictDetector("another task is sending on this stream")
        self._receiving = ConflictDetector("another task is receiving on this stream")
        # TLS may want to write in order to read (a key update), and trio allows one waiter per direction.
        self._readable = trio.Lock()
        self._writable = trio.Lock()

    @property
    def socket(self) -> LinkSocket:
        """The socket, for its addresses and its certificate; its bytes belong to the stream."""
        return self._sock

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte, at most `max_bytes` (65,536 unless told); `b""` after the peer's close_notify.

        Raises:
            trio.BrokenResourceError: the connection broke, or ended without close_notify.
        """
        limit = DEFAULT_RECEIVE_BYTES if max_bytes is None else max_bytes
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if self._unread:
                data, self._unread = self._unread[:limit], self._unread[limit:]
                return data
            try:
                return await self._when_ready(self._sock.recv, limit)
            except ssl.SSLZeroReturnError:
                return b""

    async def receive_exactly(self, size_bytes: int) -> bytes:
        """So many bytes, and not one more: what follows stays in the socket. Cancelled, what had come is lost.

        Raises:
            trio.BrokenResourceError: the connection broke, or ended before.
        """
        data = b""
        while len(data) < size_bytes:
            more = await self.receive_some(size_bytes - len(data))
            if not more:
                raise trio.BrokenResourceError("the peer closed the connection")
            data += more
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. Cancelled or failed, the stream can send nothing more.

        Raises:
            trio.BrokenResourceError: the connection broke, or an earlier send did not finish.
        """
        with self._sending, memoryview(data).cast("B") as view:
            await trio.lowlevel.checkpoint()
            self._check_can_send()
            self._can_send = False
            sent_bytes = 0
            while sent_bytes < len(view):
                try:
                    sent_bytes += await self._when_ready(self._sock.send, view[sent_bytes : sent_bytes + _SEND_CHUNK_BYTES])
                except ssl.SSLZeroReturnError as exc:
                    raise trio.BrokenResourceError("the peer has closed the connection") from exc
            self._can_send = True

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes bytes again."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_can_send()
            async with self._writable:
                await trio.lowlevel.wait_writable(self._sock)

    async def send_eof(self) -> None:
        """Not available: OpenSSL treats whatever arrives after our close_notify as an error, so a half close would lose data.

        Raises:
            LocalProtocolError: always. End the conversation in its own protocol, or `aclose`.
        """
        await trio.lowlevel.checkpoint()
        raise LocalProtocolError("TLS streams have no half close")

    def unread(self, data: bytes) -> None:
        """Give back bytes that were received too much; they are received again first."""
        self._check_open()
        self._unread = bytes(data) + self._unread

    def detach(self) -> tuple[LinkSocket, bytes]:
        """The socket, now the caller's, and the bytes given back by `unread`. The stream is closed by this.

        OpenSSL may hold decrypted bytes as well (`sock.pending()`): read once before waiting for readability.

        Raises:
            LocalProtocolError: a task is sending or receiving, or a send did not finish.
        """
        self._check_open()
        if self._sending.is_busy or self._receiving.is_busy or not self._can_send:
            raise LocalProtocolError("cannot detach a stream that is in use or broken")
        unread, self._unread, self._is_open = self._unread, b"", False
        return self._sock, unread

    async def aclose(self) -> None:
        """Send close_notify unless a send is unfinished, and close; never waits for the peer. Closes even when cancelled.

        Tasks blocked in this stream get trio.ClosedResourceError.
        """
        if self._is_open:
            self._is_open = False
            trio.lowlevel.notify_closing(self._sock)
            if self._can_send and not self._sending.is_busy:
                with contextlib.suppress(OSError, ValueError):
                    self._sock.unwrap()
            _close_after_goodbye(self._sock)
        await trio.lowlevel.checkpoint()

    async def _when_ready(self, call: Callable[[_A], _T], argument: _A) -> _T:
        """The result of a call on the socket, once OpenSSL can do it."""
        while True:
            try:
                return call(argument)
            except ssl.SSLWantReadError:
                async with self._readable:
                    self._check_open()  # taking the lock is a checkpoint, and a closed socket has no descriptor to wait for
                    await trio.lowlevel.wait_readable(self._sock)
            except ssl.SSLWantWriteError:
                async with self._writable:
                    self._check_open()
                    await trio.lowlevel.wait_writable(self._sock)
            except ssl.SSLZeroReturnError:
                raise
            except OSError as exc:
                self._check_open()
                self._can_send = False
                raise trio.BrokenResourceError(f"the connection broke: {exc.strerror or exc}") from exc

    def _check_open(self) -> None:
        if not self._is_open:
            raise trio.ClosedResourceError("this stream was closed")

    def _check_can_send(self) -> None:
        self._check_open()
        if not self._can_send:
            raise trio.BrokenResourceError("an earlier send on this stream did not finish")


async def _handshake_client(
    sock: socket.socket, wrap: Callable[[], _TlsSocket], server_hostname: str, look: Callable[[socket.socket], None] | None
) -> _TlsSocket:
    address = _address_of(sock)
    try:
        return _with_alpn(await _handshake(sock, wrap, lambda exc: explain_to_client(exc, server_hostname), look))
    except HandshakeFailed as exc:
        if exc.problem not in (HandshakeProblem.EXPIRED, HandshakeProblem.NOT_YET_VALID) or address is None:
            raise
        dates = await _look_at_dates(*address, server_hostname)
        if not dates:
            raise
        raise HandshakeFailed(exc.problem, f"{exc} ({dates})") from exc.__cause__


async def _handshake(
    sock: socket.socket,
    wrap: Callable[[], _TlsSocket],
    explain: Callable[[OSError], HandshakeFailed],
    look: Callable[[socket.socket], None] | None = None,
) -> _TlsSocket:
    tls: _TlsSocket | None = None
    try:
        try:
            sock.setblocking(False)
            tls = wrap()
            await _shake_hands(tls, look)
        # In this order: a certificate error is both.
        except OSError as exc:
            if look is not None:
                look(tls or sock)  # the connection may have broken because the server has said it all
            raise explain(exc) from exc
        except ValueError as exc:
            raise HandshakeFailed(HandshakeProblem.OTHER, f"TLS cannot start: {exc}") from exc
    except BaseException:
        _close_after_goodbye(tls or sock)
        raise
    return tls


async def _shake_hands(tls: _TlsSocket, look: Callable[[socket.socket], None] | None) -> None:
    while True:
        if look is not None:
            look(tls)  # each time: what is there when OpenSSL reads is gone
        try:
            # Writes to the socket itself: also the alert, before it raises.
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(tls)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(tls)
        else:
            return await trio.lowlevel.checkpoint()


def _with_alpn(tls: _TlsSocket) -> _TlsSocket:
    if tls.selected_alpn_protocol() is None:
        _close_after_goodbye(tls)
        raise HandshakeFailed(HandshakeProblem.NO_COMMON_PROTOCOL, "the peer speaks none of our protocols (ALPN)")
    return tls


def _close_after_goodbye(sock: socket.socket) -> None:
    """Close, without the RST that bytes left unread would cause: it could overtake the alert or answer sent just before."""
    with contextlib.suppress(OSError):
        # The socket's own calls, below TLS: its bytes are read only to be dropped.
        socket.socket.shutdown(sock, socket.SHUT_WR)
        dropped = 0
        while dropped < _DISCARD_BYTES and (data := socket.socket.recv(sock, 16384)):
            dropped += len(data)
    sock.close()


def _address_of(sock: socket.socket) -> tuple[int, tuple[str | int, ...]] | None:
    with contextlib.suppress(OSError):
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return sock.family, sock.getpeername()
    return None


async def _look_at_dates(family: int, address: tuple[str | int, ...], host: str) -> str:
    """By how much the certificate shown at `address` is out of date; "" if that cannot be learned.

    The ssl module does not show a certificate that it refused, so this one asks again and believes nothing but the dates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    der: bytes | None = None
    with trio.move_on_after(_LOOK_S), contextlib.suppress(OSError, HandshakeFailed):
        sock = trio.socket.socket(family)
        with sock:
            await sock.connect(address)
            plain = socket.socket(fileno=sock.detach())
        tls = await _handshake(
            plain, lambda: context.wrap_socket(plain, False, False, server_hostname=host), lambda exc: explain_to_client(exc, host)
        )
        der = tls.getpeercert(binary_form=True)
        _close_after_goodbye(tls)
    return describe_dates(der or b"", dt.datetime.now(dt.UTC))
