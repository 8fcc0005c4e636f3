"""Task: a data link's hello, which exchanges a ticket for a session (PROTOCOL.md, 4 and 7)."""

import logging
from typing import Final

import trio

from fxgateway.tunnels.ports import RegistryPort, SessionHandle
from fxgateway.tunnels.tickets import LinkTicket, TicketBook
from fxtunnel.codes import Code, Refusal
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.kit.tls import TlsStream
from fxtunnel.protocol.frames import HELLO
from fxtunnel.protocol.hello import (
    CAP_RESUME,
    HEADER_BYTES,
    KNOWN_CAPS,
    Denied,
    Hello,
    Welcome,
    decode_hello,
    encode_denied,
    encode_welcome,
    parse_header,
)

logger = logging.getLogger(__name__)

_RETRY_AFTER_S: Final = 5.0
_TEXT_CHARS: Final = 256


class DataLinkAcceptor:
    """Admits data links, any number at once."""

    def __init__(self, registry: RegistryPort, tickets: TicketBook) -> None:
        self._registry = registry
        self._tickets = tickets

    async def admit(self, stream: TlsStream, remote_address: str) -> None:
        """Read the hello, then give the connection to its session, or deny it. Set a deadline around it.

        Afterwards the connection is the session's and `stream` detached. If this raises or is cancelled, the caller closes `stream`.

        Raises:
            PeerRefused: the link was denied, and the relay told so.
            RemoteProtocolError: the peer does not speak the protocol.
            TunnelClosed: the peer left.
        """
        kind, length_bytes, _ = parse_header(await _received(stream, HEADER_BYTES))
        if kind != HELLO:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the relay speaks first, and says HELLO")
        payload = await _received(stream, length_bytes)
        try:
            self._attach(stream, _decoded(payload), remote_address)
        except PeerRefused as exc:
            await stream.send_all(encode_denied(Denied(exc.refusal, str(exc)[:_TEXT_CHARS], exc.retry_after_s)))
            raise

    def _attach(self, stream: TlsStream, hello: Hello, remote_address: str) -> None:
        # No await in here: between quoting the counter in WELCOME and attaching the link, nothing may move it or attach another link.
        if unknown := set(hello.need) - KNOWN_CAPS:
            raise PeerRefused(Refusal.UNSUPPORTED, f"the relay needs {', '.join(sorted(unknown))}, which this gateway lacks")
        ticket = self._tickets.redeem(hello.ticket, trio.current_time())
        if ticket is None or ticket.session_id != hello.session:
            raise PeerRefused(Refusal.BAD_TICKET, "the ticket is unknown, used, too old, or for another session")
        session = self._session(ticket)
        session.detach("the relay dialled again")
        if CAP_RESUME not in hello.caps:
            session.forgo_resumption()
        caps = (CAP_RESUME,) if session.resumes else ()
        welcome = encode_welcome(Welcome(session.id, session.received, caps=caps))
        try:
            session.attach(stream.socket, hello.received)
        except RemoteProtocolError as exc:
            raise PeerRefused(Refusal.BAD_RESUME, str(exc)) from exc
        sock, _ = stream.detach()
        # The session writes at the end of the reactor's turn at the earliest: these are the first bytes on the link.
        if not _sent_at_once(sock, welcome):
            session.detach("the connection broke during its hello")
            raise TunnelClosed(Code.LINK_LOST, "the connection broke during its hello", by_peer=True)
        logger.info("data link of %s from %s is up", ticket.relay_id, remote_address, extra={"tunnel": session.id})
        self._registry.end_given_up(ticket.relay_id, ticket.instance)

    def _session(self, ticket: LinkTicket) -> SessionHandle:
        if ticket.session_id is not None:
            resumed = self._registry.find_session(ticket.relay_id, ticket.instance, ticket.session_id)
            if resumed is None:
                raise PeerRefused(Refusal.UNKNOWN_SESSION, "the session is over; ask for a new one")
            return resumed
        if self._registry.is_draining:
            raise PeerRefused(Refusal.DRAINING, "the gateway is going away", retry_after_s=_RETRY_AFTER_S)
        fresh = self._registry.new_session(ticket.relay_id, ticket.instance)
        if fresh is None:
            raise PeerRefused(Refusal.TOO_MANY, "the relay has its data links already, or no control link", retry_after_s=_RETRY_AFTER_S)
        return fresh


def _decoded(payload: bytes) -> Hello:
    try:
        return decode_hello(payload)
    except RemoteProtocolError as exc:
        raise PeerRefused(Refusal.BAD_REQUEST, str(exc)) from exc


async def _received(stream: TlsStream, size_bytes: int) -> bytes:
    try:
        return await stream.receive_exactly(size_bytes)
    except trio.BrokenResourceError as exc:
        raise TunnelClosed(Code.LINK_LOST, str(exc), by_peer=True) from exc


def _sent_at_once(sock: LinkSocket, frame: bytes) -> bool:
    """Send a small frame on a connection that has sent nothing but its handshake: there is room for it, or the connection is broken."""
    try:
        return sock.send(frame) == len(frame)
    except OSError:
        return False
