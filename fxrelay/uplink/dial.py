"""Task: from a gateway's URL to a TLS socket: TCP with happy eyeballs, on request through an HTTP proxy, then TLS under the pinned CA."""

import base64
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

import h11
import trio
from pydantic import SecretStr

from fxrelay.uplink.gateway_file import GatewayUrl
from fxtunnel.control.busy import BUSY_BYTES, RetryAfter, parse_busy
from fxtunnel.errors import TunnelError
from fxtunnel.kit.link_tls import LinkContext, LinkSocket
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem, client_context, handshake_client
from fxtunnel.kit.unpaced import unpace_within_host
from fxtunnel.protocol.alpn import ALPN_SPOKEN, ALPN_WORKER

MAX_CONTEXTS: Final = 6
"""Kept, of TLS; a relay speaks to one worker of a gateway at a time, and comes back to few processes that go away."""
_ALWAYS_KEPT: Final = frozenset((protocol,) for protocol in ALPN_SPOKEN)
PROXY_HEAD_BYTES: Final = 8192
"""A proxy's whole answer to CONNECT, interim answers included; protects memory."""
_RECEIVE_BYTES: Final = 4096
_DEFAULT_PROXY_PORT: Final = 3128
_REACHES_NOBODY: Final = frozenset({502, 503, 504})
"""A proxy's answers when nobody listens behind it."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy reached with CONNECT. `authorization` is the whole header's value."""

    host: str
    port: int
    authorization: SecretStr | None = None

    @classmethod
    def parse(cls, url: SecretStr) -> "Proxy":
        """The proxy in http://[USER:PASSWORD@]HOST[:PORT]; user and password may be percent-encoded.

        Raises:
            ValueError: anything else; the message does not repeat the text, which may hold a password.
        """
        try:
            parts = urlsplit(url.get_secret_value())
            port = _DEFAULT_PROXY_PORT if parts.port is None else parts.port
        except ValueError:
            raise ValueError("expected http://[USER:PASSWORD@]HOST:PORT") from None
        if parts.scheme != "http" or not parts.hostname or not port or parts.path not in ("", "/"):
            raise ValueError("expected http://[USER:PASSWORD@]HOST:PORT")
        if parts.username is None:
            return cls(parts.hostname, port)
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        return cls(parts.hostname, port, SecretStr("Basic " + base64.b64encode(pair).decode("ascii")))

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port}"


class Unanswered(TunnelError):
    """No gateway has said a word: whatever takes connections there hung up, or is a proxy that reaches nobody.

    Not who stays silent: that may be a gateway with too much to do.
    """


class Unreachable(Unanswered):
    """Nothing listens there, or no way leads there. Trying again soon costs nobody anything."""


class GatewayBusy(TunnelError):
    """The gateway has no time for us before `retry_after`. It costs it next to nothing to say so, and it is no failure."""

    def __init__(self, retry_after: RetryAfter) -> None:
        super().__init__(f"the gateway is busy, and wants us again in {retry_after.retry_after_s:.1f} s")
        self.retry_after = retry_after


@contextmanager
def within(limit_s: float, what: str) -> Iterator[None]:
    """A deadline whose passing is a TunnelError: "`what` within N s"."""
    try:
        with trio.fail_after(limit_s):
            yield
    except trio.TooSlowError:
        raise TunnelError(f"{what} within {limit_s:g} s") from None


class Dialler:
    """Opens TLS connections to one gateway, whose certificate must come from `ca_pem` and bear the URL's host name.

    Each dial takes at most `timeout_s`, everything included. Sent data that stays unacknowledged for `dead_after_s` ends a connection
    (TCP_USER_TIMEOUT), so a write into a dead path fails as soon as a read would be given up.
    """

    def __init__(self, ca_pem: str, proxy: Proxy | None, *, timeout_s: float, dead_after_s: float) -> None:
        """Raises ConfigError when `ca_pem` holds no certificate."""
        self.timeout_s = timeout_s
        self._proxy = proxy
        self._dead_after_s = dead_after_s
        self._ca_pem = ca_pem
        self._contexts: dict[tuple[str, ...], LinkContext] = {(alpn,): client_context(ca_pem, [alpn]) for alpn in ALPN_SPOKEN}

    async def dial(self, url: GatewayUrl, alpn: str, worker: str = "") -> LinkSocket:
        """A non-blocking TLS socket that speaks `alpn` (see `at_process`); the caller closes it. Cancelling leaves nothing open.

        `worker` is who should take it, of a gateway that has said so (PROTOCOL.md, 1).

        Raises:
            TunnelError: one line that says what did not work; HandshakeFailed when it was TLS, GatewayBusy when it is to be later,
                Unanswered when whoever took it hung up without a word.
        """
        with within(self.timeout_s, f"no connection to {url.authority}" + (f" through {self._proxy}" if self._proxy else "")):
            if self._proxy is None:
                stream = await _connect(url.host, url.port, url.authority)
            else:
                stream = await _connect(self._proxy.host, self._proxy.port, str(self._proxy))
                await _ask_proxy(stream, self._proxy, url)
            # Taken out of trio's hands: TLS works on the descriptor itself, and so does the engine later.
            sock = socket.socket(fileno=stream.socket.detach())
            unpace_within_host(sock)
            for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_USER_TIMEOUT, int(self._dead_after_s * 1000))):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            try:
                return await handshake_client(sock, self._context(alpn, worker), url.host, _listen_for_busy)
            except HandshakeFailed as exc:
                if exc.problem is HandshakeProblem.CLOSED_BY_PEER:
                    raise Unanswered(str(exc)) from exc
                raise

    def _context(self, alpn: str, worker: str) -> LinkContext:
        protocols = (f"{ALPN_WORKER}{worker}", alpn) if worker else (alpn,)
        context = self._contexts.get(protocols)
        if context is None:
            if len(self._contexts) >= MAX_CONTEXTS:
                del self._contexts[next(known for known in self._contexts if known not in _ALWAYS_KEPT)]
            context = self._contexts[protocols] = client_context(self._ca_pem, protocols)
        return context


def _listen_for_busy(sock: socket.socket) -> None:
    """Raises GatewayBusy if that is what the gateway has said, instead of TLS."""
    try:
        # Not the method of SSLSocket, which refuses to peek.
        first = socket.socket.recv(sock, BUSY_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return
    _raise_if_busy(first)


def _raise_if_busy(first: bytes) -> None:
    retry_after = parse_busy(first)
    if retry_after is not None:
        raise GatewayBusy(retry_after)


async def _connect(host: str, port: int, name: str) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(host, port)
    except socket.gaierror as exc:
        raise TunnelError(f"cannot find {name}: {exc.strerror or exc}") from exc
    except OSError as exc:
        raise Unreachable(f"cannot connect to {name}: {_reason(exc)}") from exc
    except ValueError as exc:  # a name that no DNS label can hold
        raise TunnelError(f"cannot find {name}: not a host name") from exc


def _reason(exc: BaseException) -> str:
    """Why connecting failed, where several addresses may each have failed in their own way."""
    if isinstance(exc.__cause__, BaseException):
        exc = exc.__cause__
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else str(exc)


async def _ask_proxy(stream: trio.SocketStream, proxy: Proxy, url: GatewayUrl) -> None:
    """Turn `stream` into a connection to the gateway; closes it when that fails."""
    try:
        headers = [("Host", url.authority)]
        if proxy.authorization is not None:
            headers.append(("Proxy-Authorization", proxy.authorization.get_secret_value()))
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=PROXY_HEAD_BYTES)
        request = http.send(h11.Request(method="CONNECT", target=url.authority, headers=headers)) or b""
        http.send(h11.EndOfMessage())
        await stream.send_all(request)
        status = await _read_status(stream, http, proxy)
        if 200 <= status < 300:
            # TLS begins with us: whatever the "gateway" says before that is not from one.
            if http.trailing_data[0]:
                _raise_if_busy(http.trailing_data[0])
                raise TunnelError(f"{proxy} sent bytes of its own before TLS")
            return
        if status == 407:
            problem = "wants a user name and password" if proxy.authorization is None else "does not accept the user name and password"
            raise TunnelError(f'{proxy} {problem}: set proxy = "http://USER:PASSWORD@HOST:PORT" in relay.toml')
        error = Unanswered if status in _REACHES_NOBODY else TunnelError
        raise error(f"{proxy} answered {status} when asked for {url.authority}")
    except trio.BrokenResourceError as exc:
        await trio.aclose_forcefully(stream)
        raise Unanswered(f"{proxy} closed the connection") from exc
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _read_status(stream: trio.SocketStream, http: h11.Connection, proxy: Proxy) -> int:
    """The status of the final answer; h11 stays paused behind its head."""
    received_bytes = 0
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as exc:
            raise TunnelError(f"{proxy} does not answer in HTTP") from exc
        if isinstance(event, h11.Response):
            return int(event.status_code)
        if event is h11.NEED_DATA:
            if received_bytes >= PROXY_HEAD_BYTES:
                raise TunnelError(f"{proxy} answered with more than {PROXY_HEAD_BYTES} bytes")
            data = await stream.receive_some(_RECEIVE_BYTES)
            if not data:
                raise Unanswered(f"{proxy} closed the connection")
            received_bytes += len(data)
            http.receive_data(data)
