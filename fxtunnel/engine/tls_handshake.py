"""Pump: the server's half of a TLS handshake on an accepted socket, and the goodbye when it fails."""

import socket
import ssl
from contextlib import suppress
from typing import Protocol

import outcome

from fxtunnel.engine.lingering_close import LingeringClose
from fxtunnel.engine.reactor import INCOMING, STREAM_EVENTS, Reactor
from fxtunnel.engine.splice import abort
from fxtunnel.engine.tls_socket import TlsSocket, stand_in
from fxtunnel.kit.tls_problems import explain_to_server, is_torn


class SecureOwner(Protocol):
    """Who wants a TLS connection. Exactly one of these is called, once, and never from within `Handshake.start`."""

    def on_secure(self, handshake: "Handshake", sock: TlsSocket) -> None:
        """The socket is the owner's, and not registered. The first request may have arrived already: `peek` before waiting."""

    def on_failed(self, handshake: "Handshake", reason: str) -> None:
        """The socket is closed. `reason` is for the log; nothing of it was written by the client."""


class Handshake:
    """Owns the socket until its owner hears. Sets no deadline: the owner calls `fail` for those that take too long.

    What a client can make us keep before it is done is bounded by OpenSSL: a ClientHello of more than 131,396 bytes, or any other
    message of more than it may have (at most 100 KiB), is refused before it is read; 32 empty records or 5 warnings in a row are, too.
    Everything else stays in the kernel. A handshake costs about 1 ms, most of it signing: that is done beside the loop, which goes on.

    `source` is whose turn it takes there. `http_answer` is sent, in the clear, to a client that begins with a plain HTTP request.
    """

    __slots__ = (
        "_answer",
        "_closing",
        "_context",
        "_has_news",
        "_is_offloaded",
        "_owner",
        "_sock",
        "_source",
        "is_over",
        "reactor",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        context: ssl.SSLContext,
        owner: SecureOwner,
        *,
        source: str = "",
        http_answer: bytes = b"",
    ) -> None:
        self.reactor = reactor
        self.is_over = False
        self._owner = owner
        self._context = context
        self._sock = sock
        self._source = source
        self._answer = http_answer
        self._closing: LingeringClose | None = None
        self._is_offloaded = False
        """The thread has the socket."""
        self._has_news = False
        """Something happened meanwhile."""

    def start(self) -> None:
        """Begin: the socket is accepted, non-blocking and not registered; nothing of TLS has been taken from it."""
        self._context.sslsocket_class = TlsSocket
        with suppress(OSError):  # then it is tried again when it is needed
            stand_in()
        try:
            self._sock = self._context.wrap_socket(self._sock, True, False, suppress_ragged_eofs=False)
        except (OSError, ValueError):  # gone already, and closed by this
            self.reactor.call_later(0, lambda: self.fail("the client closed the connection during the TLS handshake"))
        else:
            self.reactor.register(self._sock, self, STREAM_EVENTS)

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self.is_over:
            return
        if self._is_offloaded:
            self._has_news = True
            return
        self._is_offloaded, self._has_news = True, False
        self.reactor.offload.do(self._step, self._stepped, self._source)

    def _step(self) -> None:
        """In the thread."""
        if not self.is_over:
            self._sock.do_handshake()  # type: ignore[attr-defined]  # also sends the alert, before it raises

    def _stepped(self, result: outcome.Outcome[None]) -> None:
        """In the loop again."""
        self._is_offloaded = False
        tls = self._sock
        if self.is_over:
            with suppress(OSError):
                abort(tls)
            return
        try:
            result.unwrap()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if self._has_news:
                self.on_event(INCOMING)
        except OSError as exc:
            self._leave(exc)
        except Exception:
            self.fail("internal error")
            raise
        else:
            self.is_over = True
            self.reactor.unregister(tls)
            self._owner.on_secure(self, tls)  # type: ignore[arg-type]  # a TlsSocket since `start`

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; this connection ends, nothing else does."""
        self.fail("internal error")

    def fail(self, reason: str) -> None:
        """Give up: RST, and the owner hears. Does nothing once the owner has heard."""
        if self._closing is not None:
            self._closing.cut_short()
        elif not self.is_over:
            if self._is_offloaded:
                self.reactor.unregister(self._sock)  # to be closed when the thread has let go of it
            else:
                self.reactor.forget(self._sock)
                with suppress(OSError):  # it may be closed already
                    abort(self._sock)
            self._end(reason)

    def _leave(self, exc: OSError) -> None:
        """The handshake has failed. If that is news to the client, it has been sent an alert, and gets a moment to read it."""
        reason = str(explain_to_server(exc, "TLS 1.2 or 1.3"))
        if not isinstance(exc, ssl.SSLError) or is_torn(exc) or isinstance(exc, ssl.SSLZeroReturnError):
            self.fail(reason)
            return
        self.reactor.unregister(self._sock)
        plain = socket.socket(fileno=self._sock.detach())  # what is still said is read as it is
        plain.setblocking(False)
        answer = self._answer if exc.reason == "HTTP_REQUEST" else b""
        self._closing = LingeringClose(self.reactor, plain, answer, lambda: self._end(reason))

    def _end(self, reason: str) -> None:
        self.is_over = True
        self._owner.on_failed(self, reason)
