"""Task: `fxgateway connect`: a client's end of a stream that is asked for by name: for ssh's ProxyCommand, or as a local port."""

import json
import os
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, cast
from urllib.parse import quote, urlencode, urlsplit

import h11
import trio

from fxgateway.connect_streams import GOODBYE_S, TlsHalves, break_on_close, carry, end_on_close, join
from fxgateway.routing.preread_router import STREAM_PATH, STREAM_PROTOCOL
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.errors import FxError
from fxtunnel.kit.settings import Address
from fxtunnel.kit.tls import handshake_web_client
from fxtunnel.kit.tls_problems import HandshakeFailed, HandshakeProblem, no_forged_end

DIRECT_TIMEOUT_S: Final = 2.0
"""For the node itself to answer: from outside it usually cannot, and a user waits."""
GATEWAY_TIMEOUT_S: Final = 15.0
"""Longer than a gateway waits for its relays (limits.open_timeout_s, 10 s), since its answer says what is wrong."""
TICKET_VARIABLE: Final = "FXGATEWAY_TICKET"
MAX_TICKET_FILE_BYTES: Final = 16_384
_TICKET: Final = re.compile(r"[!-~]{1,8192}")
_BLOCK_BYTES: Final = 65_536
_MAX_HEAD_BYTES: Final = 16_384


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stream to `service`, at `node` if one is named. `direct` is tried first, then the door at `via` (http:// or https://). `ticket` is
    asked for one for each stream.
    """

    service: str
    via: str
    node: str = ""
    direct: Address | None = None
    ticket: Callable[[], str] = str
    ca_file: str | None = None


def ticket_source(given: str) -> Callable[[], str]:
    """Where tickets come from: a file, which is read for each stream; `-`, the first line of standard input, for one stream; `env`, the
    variable FXGATEWAY_TICKET. Empty: `env`, if it is set. What it returns raises FxError.
    """

    def from_environ() -> str:
        ticket = os.environ.get(TICKET_VARIABLE, "")
        if given and not ticket:
            raise FxError(f"there is no ticket in {TICKET_VARIABLE}")
        return _checked(ticket, TICKET_VARIABLE) if ticket else ""

    def from_input() -> str:
        line = bytearray()
        # A byte at a time: what follows the line is the stream's.
        while len(line) <= MAX_TICKET_FILE_BYTES and (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
            line += byte
        return _checked(line.decode("latin-1"), "standard input")

    def from_file() -> str:
        try:
            with open(given, "rb") as file:
                return _checked(file.read(MAX_TICKET_FILE_BYTES).decode("latin-1"), given)
        except OSError as exc:
            raise FxError(f"{given}: {exc.strerror or exc}") from exc

    return {"": from_environ, "env": from_environ, "-": from_input}.get(given, from_file)


def _checked(text: str, source: str) -> str:
    ticket = text.strip()
    if not _TICKET.fullmatch(ticket):  # it becomes a line of an HTTP head
        raise FxError(f"{source}: holds no ticket")
    return ticket


async def connect(wanted: Wanted) -> "_Begun":
    """The stream, connected to the service; closing it is a reset until `end_on_close`.

    Raises:
        FxError: neither way leads there; says why.
    """
    if wanted.direct is not None:
        with trio.move_on_after(DIRECT_TIMEOUT_S), suppress(OSError):
            direct = _Begun(await trio.open_tcp_stream(wanted.direct.host or "", wanted.direct.port or 0))
            break_on_close(direct.socket)
            return direct
    try:
        with trio.fail_after(GATEWAY_TIMEOUT_S):
            stream = await _through_gateway(wanted)
            break_on_close(stream.socket)
            return stream
    except (OSError, trio.BrokenResourceError) as exc:
        raise FxError(f"{wanted.via}: {_said(exc)}; is a door of the gateway there?") from exc
    except trio.TooSlowError as exc:
        raise FxError(f"{wanted.via}: no answer within {GATEWAY_TIMEOUT_S:g} s") from exc


async def join_terminal(wanted: Wanted) -> None:
    """Carry stdin and stdout on the stream until the service has ended. For ProxyCommand.

    Raises:
        FxError: no connection, or it broke.
    """
    async with _connected(wanted) as stream:
        incoming, outgoing = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())), trio.lowlevel.FdStream(os.dup(sys.stdout.fileno()))
        async with incoming, outgoing, trio.open_nursery() as nursery:
            nursery.start_soon(carry, incoming, stream)
            async for block in stream:
                await outgoing.send_all(block)
            # Whoever waits for the terminal's next line need not: the service has ended.
            nursery.cancel_scope.cancel()


async def forward(wanted: Wanted, listen: Address, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Give each connection to a local address a stream of its own, until cancelled. Starts with the address that is listened on.

    Raises:
        FxError: the address cannot be listened on.
    """

    async def serve(client: trio.SocketStream) -> None:
        break_on_close(client.socket)
        async with client:
            try:
                async with _connected(wanted) as stream:
                    await join(stream, client)
                end_on_close(client.socket)
            except FxError as exc:
                _tell(str(exc))
            except Exception as exc:  # no thread for a name to be looked up, say: the others live on
                _tell(f"a connection to {wanted.service} failed: {exc}")

    try:
        listeners = await trio.open_tcp_listeners(listen.port or 0, host=listen.host)
    except OSError as exc:
        raise FxError(f"cannot listen on {listen}: {_said(exc)}") from exc
    host, port = listeners[0].socket.getsockname()[:2]
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, serve, listeners))
        task_status.started(str(Address(host, port)))


def _tell(what: str) -> None:
    with suppress(OSError):  # a terminal that is gone
        sys.stderr.write(f"fxgateway: {what}\n")


@asynccontextmanager
async def _connected(wanted: Wanted) -> AsyncIterator["_Begun"]:
    stream = await connect(wanted)
    broken: BaseException | None = None
    try:
        yield stream
        end_on_close(stream.socket)
        with trio.move_on_after(GOODBYE_S), suppress(trio.BrokenResourceError):
            await stream.send_eof()
    except* (trio.BrokenResourceError, OSError) as group:
        broken = group  # what is raised in here leaves in a group again
    finally:
        await trio.aclose_forcefully(stream)
    if broken is not None:
        raise FxError(f"the connection to {wanted.service} broke") from broken


def _said(exc: BaseException) -> str:
    """What the system said, from below trio's words about all addresses that were tried."""
    reason: BaseException = exc.__cause__ or exc
    while isinstance(reason, BaseExceptionGroup):
        reason = reason.exceptions[0]
    if isinstance(reason, OSError) and reason.errno and not isinstance(reason, socket.gaierror):
        return os.strerror(reason.errno)
    return str(getattr(reason, "strerror", None) or reason)


async def _through_gateway(wanted: Wanted) -> "_Begun":
    parts = urlsplit(wanted.via)
    host = parts.hostname or ""
    tcp = await trio.open_tcp_stream(host, parts.port or (443 if parts.scheme == "https" else 80))
    stream: trio.SocketStream | TlsHalves = tcp
    if parts.scheme == "https":
        try:
            context = no_forged_end(ssl.create_default_context(cafile=wanted.ca_file))
        except ssl.SSLError as exc:
            await trio.aclose_forcefully(tcp)
            raise FxError(f"{wanted.ca_file}: holds no certificates in PEM format") from exc
        context.set_alpn_protocols(["http/1.1"])
        context.sslsocket_class = TlsSocket
        try:
            stream = TlsHalves(cast(TlsSocket, await handshake_web_client(socket.socket(fileno=tcp.socket.detach()), context, host)))
        except HandshakeFailed as exc:
            if exc.problem is not HandshakeProblem.UNTRUSTED:
                raise FxError(f"{wanted.via}: {exc}") from exc
            known = f"an authority in {wanted.ca_file}" if wanted.ca_file else "an authority that this system knows; name it with --ca"
            raise FxError(f"{wanted.via}: the certificate is not from {known}") from exc
    try:
        return await _upgraded(stream, wanted, parts.netloc.rpartition("@")[2])
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _upgraded(stream: trio.SocketStream | TlsHalves, wanted: Wanted, host: str) -> "_Begun":
    query = f"?{urlencode({'node': wanted.node})}" if wanted.node else ""
    headers = [("Host", host), ("Connection", "Upgrade"), ("Upgrade", STREAM_PROTOCOL), ("Accept", "application/json")]
    ticket = await trio.to_thread.run_sync(wanted.ticket)
    if ticket:
        headers.append(("Authorization", f"Bearer {ticket}"))
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    request = h11.Request(method="GET", target=f"{STREAM_PATH}{quote(wanted.service)}{query}", headers=headers)
    await stream.send_all((parser.send(request) or b"") + (parser.send(h11.EndOfMessage()) or b""))
    try:
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(bytes(await stream.receive_some(_BLOCK_BYTES)))
    except h11.RemoteProtocolError as exc:
        raise FxError(f"{wanted.via}: does not answer in HTTP; is it a door of kind http or auto?") from exc
    if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
        return _Begun(stream, parser.trailing_data[0])
    status = getattr(event, "status_code", 0)
    message = {
        401: "the ticket is missing, too old, used before, or not for this; get a fresh one",
        403: "you may not have this",
        404: "it does not give out this stream; see `streams` of the door",
        429: "too many connections",
        502: "no relay could serve it: nodes are taken, full or not reached; the relays' logs say more",
        503: f"no relay offers it now{f' at node {wanted.node}' if wanted.node else ''}",
    }
    raise FxError(f"{wanted.via}: {wanted.service}: {message.get(status, f'refused with status {status}')}{_trace_in(parser)}")


def _trace_in(parser: h11.Connection) -> str:
    """The mark under which the logs of gateway and relay tell more, if it came along with the answer's head."""
    try:
        event = parser.next_event()
        trace = json.loads(bytes(event.data))["error"]["trace"] if isinstance(event, h11.Data) else ""
    except (h11.RemoteProtocolError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" (trace {trace[:32]})" if isinstance(trace, str) and trace.isalnum() else ""


class _Begun(trio.abc.HalfCloseableStream):
    """A stream of which the first bytes have been read already."""

    def __init__(self, stream: trio.SocketStream | TlsHalves, first: bytes = b"") -> None:
        self._stream = stream
        self.socket = stream.socket
        self._first = first

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        if self._first:
            await trio.lowlevel.checkpoint()
            first, self._first = self._first, b""
            return first
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self._stream.aclose()
