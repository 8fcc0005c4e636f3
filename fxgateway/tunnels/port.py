"""Task: the TLS port that relays connect to. Nothing that one connection does affects the others."""

import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from fxgateway.tunnels.control import AuthenticatedRelay, ControlConfig, ControlLinkAcceptor
from fxgateway.tunnels.datalinks import DataLinkAcceptor
from fxgateway.tunnels.enrolment import Enroller
from fxgateway.tunnels.identities import Identities
from fxgateway.tunnels.peer_processes import AcceptedConnection, PeerProcesses, SingleProcess
from fxgateway.tunnels.ports import RegistryPort
from fxgateway.tunnels.pre_auth_queue import PortLimits, PreAuthPeer, PreAuthQueue, TooBusy
from fxgateway.tunnels.tickets import TicketBook
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.busy import RetryAfter, encode_busy
from fxtunnel.control.upgrade import (
    BODY_BYTES,
    CONTROL_PATH,
    ENROL_PATH,
    HEAD_BYTES,
    Head,
    accept_websocket,
    answer,
    read_body,
    read_head,
    refusal_fields,
)
from fxtunnel.errors import PeerRefused, TunnelClosed, TunnelError, leaves
from fxtunnel.kit.link_tls import LinkContext
from fxtunnel.kit.listeners import EXHAUSTED
from fxtunnel.kit.process import keep_going
from fxtunnel.kit.tls import TlsStream, handshake_server
from fxtunnel.kit.tokens import Assertion, KeyProblem, verify_assertion
from fxtunnel.model import GatewayId, RelayId
from fxtunnel.protocol.alpn import ALPN_DATA, is_data

__all__ = ["PortLimits", "TunnelPort"]

logger = logging.getLogger(__name__)

BUSY: Final = "busy"
ACCEPTED_AT_ONCE: Final = 64
"""Connections accepted in a row before the rest of this process gets a turn."""
_PEEK_BYTES: Final = 4_096
"""Enough to find the ALPN names of a usual ClientHello in, which has about 2 KiB (client_hello.MAX_HELLO_BYTES)."""
_DROPPED_BYTES: Final = 16_384
"""Of a stranger's unread bytes: a whole ClientHello."""
_PAUSE_S: Final = 0.25  # at descriptor exhaustion; long enough for some connection to end


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """A control link whose relay has proved who it is."""

    head: Head
    relay_id: RelayId
    kid: str


class TunnelPort:
    """Accepts relays: enrolments, control links, data links."""

    def __init__(
        self,
        context: LinkContext,
        gateway_id: GatewayId,
        identities: Identities,
        registry: RegistryPort,
        limits: PortLimits,
        control: ControlConfig = ControlConfig(),  # noqa: B008 - immutable
        peer_processes: PeerProcesses | None = None,
    ) -> None:
        self._context = context
        self._limits = limits
        self._gateway_id = gateway_id
        self._identities = identities
        self._now_unix: Callable[[], float] = time.time
        self._peer_processes: PeerProcesses = peer_processes or SingleProcess()
        self.refused: dict[str, int] = {}
        self._pre_auth = PreAuthQueue()
        self._accepting = trio.CancelScope()
        self._taking = trio.CancelScope()
        tickets = TicketBook(lambda: f"fxt_{secrets.token_urlsafe(32)}")
        self._control = ControlLinkAcceptor(gateway_id, registry, tickets, control, self._peer_processes)
        self._data = DataLinkAcceptor(registry, tickets)
        self._enroller = Enroller(identities, gateway_id, self._now_unix)

    @property
    def pending(self) -> int:
        """Connections whose peer has not yet proved who it is."""
        return len(self._pre_auth)

    def apply(self, context: LinkContext, limits: PortLimits) -> None:
        """A new certificate and new limits, for connections from now on."""
        self._context, self._limits = context, limits

    async def run(self, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept until cancelled, and close the listeners.

        After `stop_accepting` it returns when the last link has ended, unless relays can still be passed on to this process.
        Cancelling lets control links say goodbye, which takes at most a second.
        """
        async with trio.open_nursery() as around:
            around.start_soon(keep_going, "taking turns back from slow relays", self._pre_auth.run)
            async with trio.open_nursery() as handlers:
                await self._accept_all(listeners, handlers, task_status)
            around.cancel_scope.cancel()

    async def _accept_all(self, listeners: list[trio.SocketListener], handlers: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        handlers.start_soon(self._take_passed, handlers)
        with self._accepting:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener, handlers)
                task_status.started()

    def stop_accepting(self) -> None:
        """Close the listeners, soon: a successor has them. Open links stay; relays can still reconnect here if this process is named."""
        self._accepting.cancel()
        if not self._peer_processes.is_named:
            self._taking.cancel()

    async def _accept(self, listener: trio.SocketListener, handlers: trio.Nursery) -> None:
        # A second descriptor for the same queue: trio accepts one connection per turn of its loop, too few when all relays come back.
        more = socket.fromfd(listener.socket.fileno(), listener.socket.family, listener.socket.type)
        async with listener:
            with more:
                more.setblocking(False)
                await keep_going("accepting relays", partial(self._accept_some, listener, more, handlers))

    async def _accept_some(self, listener: trio.SocketListener, more: socket.socket, handlers: trio.Nursery) -> None:
        try:
            accepted, address = await listener.socket.accept()
        except OSError as exc:
            # Besides exhaustion these are errors of the connection that was to be accepted (accept(2)): nothing to do but go on.
            if exc.errno in EXHAUSTED:
                logger.warning("the tunnel port takes no connections for a moment: %s", exc.strerror)
            await trio.sleep(_PAUSE_S if exc.errno in EXHAUSTED else 0)
            return
        sock = socket.socket(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._welcome(AcceptedConnection.fresh(sock, address), self._peer_processes.keeps, handlers)
        with contextlib.suppress(OSError):  # none is left; anything else is met again above
            for _ in range(ACCEPTED_AT_ONCE):
                self._welcome(AcceptedConnection.fresh(*more.accept()), self._peer_processes.keeps, handlers)

    async def _take_passed(self, handlers: trio.Nursery) -> None:
        with self._taking:
            await keep_going("taking relays that others have accepted", partial(self._take_one, handlers))

    async def _take_one(self, handlers: trio.Nursery) -> None:
        self._welcome(await self._peer_processes.wait_passed(), _always, handlers)

    def _welcome(self, passed: AcceptedConnection, keeps: Callable[[AcceptedConnection], Awaitable[bool]], handlers: trio.Nursery) -> None:
        try:
            peer = self._pre_auth.enter(passed.ip, self._limits, has_spoken=_first_words(passed.sock) is not None)
        except TooBusy as exc:
            self._turn_away(passed, exc.retry_after)
        else:
            handlers.start_soon(self._serve, passed, peer, keeps)

    def _turn_away(self, passed: AcceptedConnection, retry_after: RetryAfter) -> None:
        """Say when to come again, and close. It has cost us no TLS."""
        self.refused[BUSY] = self.refused.get(BUSY, 0) + 1
        if passed.counts_as_relay:
            self._peer_processes.was_no_relay()
        logger.info("tunnel port: busy, connection from %s is to come again in %.1f s", passed.remote_address, retry_after.retry_after_s)
        with passed.sock as sock:
            _say(sock, encode_busy(retry_after))

    async def _serve(self, passed: AcceptedConnection, peer: PreAuthPeer, keeps: Callable[[AcceptedConnection], Awaitable[bool]]) -> None:
        """Serve one connection. The barrier: nothing that it raises gets past this."""
        sock, remote_address = passed.sock, passed.remote_address
        try:
            with sock:
                await self._converse(passed, peer, keeps)
        except* TunnelError as group:
            for exc in leaves(group):
                if isinstance(exc, PeerRefused):
                    self.refused[exc.refusal.value] = self.refused.get(exc.refusal.value, 0) + 1
                logger.warning("tunnel port: connection from %s refused: %s", remote_address, exc)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            logger.warning("tunnel port: connection from %s was lost", remote_address)
        except* Exception:
            logger.exception("tunnel port: connection from %s ended by an internal error", remote_address)

    async def _converse(
        self, passed: AcceptedConnection, peer: PreAuthPeer, keeps: Callable[[AcceptedConnection], Awaitable[bool]]
    ) -> None:
        sock, remote_address = passed.sock, passed.remote_address
        stream: TlsStream | None = None
        upgrade: _Upgrade | None = None
        try:
            with peer.scope:
                await trio.lowlevel.wait_readable(sock)
                peer.completes = ALPN_DATA.encode() in (_first_words(sock) or b"")
                await self._pre_auth.wait_turn(peer)
                if not await keeps(passed):
                    return
                _check_connected(sock)
                stream = TlsStream(await handshake_server(sock, self._context))
                upgrade = await self._identify(stream, remote_address)
            if peer.scope.cancelled_caught:
                self._log_unproven(peer, remote_address)
                if peer.is_evicted and not peer.turn.is_set():
                    _say(sock, encode_busy(self._pre_auth.retry_after()))
                return
            self._pre_auth.admit(peer)
            if stream is not None and upgrade is not None:
                await self._serve_control(stream, upgrade, remote_address, lambda: self._pre_auth.leave(peer))
        except TooBusy as exc:
            self._turn_away(passed, exc.retry_after)
        finally:
            self._pre_auth.leave(peer)
            if upgrade is None and passed.counts_as_relay:
                self._peer_processes.was_no_relay()
            if stream is not None:
                await stream.aclose()

    async def _identify(self, stream: TlsStream, remote_address: str) -> _Upgrade | None:
        """Do all that a stranger may ask for: a data link, an enrolment. Returns the control link of a relay that has proved who it is."""
        if is_data(stream.socket.selected_alpn_protocol()):
            await self._data.admit(stream, remote_address)
            return None
        try:
            head = await read_head(stream, max_bytes=min(HEAD_BYTES, self._limits.hello_bytes))
            if (head.method, head.target) == ("GET", CONTROL_PATH):
                return await self._authenticate(head, stream.socket.binding())
            if (head.method, head.target) == ("POST", ENROL_PATH):
                body = await read_body(stream, head, max_bytes=min(BODY_BYTES, self._limits.hello_bytes - HEAD_BYTES))
                await answer(stream, 200, await self._enroller.enrol(body, stream.socket.binding()))
            else:
                await answer(stream, 404, {"error": "not-found", "message": "relays only", "retry_after_s": 0})
        except PeerRefused as exc:
            await answer(stream, exc.refusal.status, refusal_fields(exc, self._now_unix()))
            raise
        return None

    async def _authenticate(self, head: Head, binding: str) -> _Upgrade:
        scheme, _, token = (head.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise PeerRefused(Refusal.BAD_ASSERTION, "bad assertion: there is none (Authorization: Bearer …)")
        try:
            assertion = self._verify(token, binding)
        except PeerRefused as exc:
            # Another process may have enrolled it, or a command may have lifted its revocation, since we last read the file.
            if exc.refusal is not Refusal.REVOKED and not (exc.refusal is Refusal.UNKNOWN_RELAY and self._peer_processes.worker):
                raise
            await trio.to_thread.run_sync(self._identities.look_again)
            assertion = self._verify(token, binding)
        self._control.check_room(assertion.relay_id)
        return _Upgrade(head, assertion.relay_id, assertion.kid)

    def _verify(self, token: str, binding: str) -> Assertion:
        find_key, now_unix = self._identities.find_key, self._now_unix()
        return verify_assertion(token.strip(), gateway_id=self._gateway_id, binding=binding, find_key=find_key, now_unix=now_unix)

    async def _serve_control(self, stream: TlsStream, upgrade: _Upgrade, remote_address: str, on_welcome: Callable[[], None]) -> None:
        def is_trusted() -> bool:
            return not isinstance(self._identities.find_key(upgrade.relay_id, upgrade.kid), KeyProblem)

        refused: PeerRefused | None = None
        async with trio.open_nursery() as nursery:
            try:
                with trio.fail_after(self._limits.hello_timeout_s):
                    ws = await accept_websocket(nursery, stream, upgrade.head)
            except PeerRefused as exc:
                refused = exc
            else:
                await self._control.serve(ws, AuthenticatedRelay(upgrade.relay_id, remote_address, is_trusted, on_welcome))
            nursery.cancel_scope.cancel()
        if refused is not None:
            with trio.move_on_after(self._limits.hello_timeout_s):
                await answer(stream, refused.refusal.status, refusal_fields(refused, self._now_unix()))
            raise refused

    def _log_unproven(self, peer: PreAuthPeer, remote_address: str) -> None:
        why = "made room for newer ones" if peer.is_evicted else f"did not prove who it is within {self._limits.hello_timeout_s:g} s"
        logger.warning("tunnel port: connection from %s closed: it %s", remote_address, why)


def _say(sock: socket.socket, last: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.send(last)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(_DROPPED_BYTES)  # closing with unread bytes would send a reset, which could overtake the words


async def _always(passed: AcceptedConnection) -> bool:
    await trio.lowlevel.checkpoint()
    return True


def _first_words(sock: socket.socket) -> bytes | None:
    """What has arrived so far, only peeked at; None if nothing has. Makes the socket non-blocking."""
    sock.setblocking(False)
    try:
        return sock.recv(_PEEK_BYTES, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _check_connected(sock: socket.socket) -> None:
    """Raise TunnelClosed if the peer has already reset the connection.

    The ssl module would take the descriptor over before it notices, and leave closing it to the garbage collector.
    """
    try:
        sock.getpeername()
    except OSError as exc:
        raise TunnelClosed(Code.LINK_LOST, "the peer was gone before its handshake", by_peer=True) from exc
