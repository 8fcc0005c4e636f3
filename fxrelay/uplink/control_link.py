"""Task: one control link as the relay holds it: upgrade, hello, tickets, until its end (PROTOCOL.md, 3)."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio
from trio_websocket import ConnectionClosed

import fxtunnel
from fxrelay.uplink.dial import Dialler, within
from fxrelay.uplink.gateway_file import GatewayFile, GatewayUrl
from fxrelay.uplink.identity import Identity
from fxrelay.uplink.ports import GatewayClosing, UplinkConfig
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import (
    CAP_WORKERS,
    PROTOCOL_VERSION,
    Closing,
    Drain,
    Earlier,
    Hello,
    Load,
    Message,
    Refused,
    Ticket,
    TicketRequest,
    Welcome,
    encode,
)
from fxtunnel.control.upgrade import CONTROL_PATH, open_websocket
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed, TunnelError
from fxtunnel.kit.tls import TlsStream
from fxtunnel.model import Offer, SessionId
from fxtunnel.protocol.alpn import ALPN_HTTP, at_process

logger = logging.getLogger(__name__)

BEATS_PER_DEATH: Final = 3
"""Pings that may go unanswered before a path is dead."""
LOAD_LOOK_S: Final = 0.5
"""Between two looks at whether other relays should be asked first: until the gateway knows, clients are refused here."""
MIN_HEARTBEAT_S: Final = 0.02
"""Floor for the interval that the gateway asks for, so that no gateway can keep this process busy with pings."""


class ControlLink:
    """An open control link. `run` carries it; the rest may be called while it runs."""

    def __init__(self, channel: Channel, welcome: Welcome, max_dead_after_s: float) -> None:
        self.welcome = welcome
        self._channel = channel
        # The gateway sets the pace, but not so slow that a dead path would go unnoticed.
        self._dead_after_s = min(welcome.dead_after_s, max_dead_after_s)
        self._heartbeat_s = max(min(welcome.heartbeat_s, self._dead_after_s / BEATS_PER_DEATH), MIN_HEARTBEAT_S)
        self._requests = 0
        self._waiting: dict[int, _Answer] = {}
        self._closing: Closing | None = None
        self._is_over = False
        self._on_drain: Callable[[Drain], None] = lambda message: None

    def send_nowait(self, message: Message) -> None:
        """Queue a message. Raises TunnelClosed when the link is ending."""
        self._channel.send_nowait(message)

    def end_soon(self, last: Closing) -> None:
        """Let `run` send what is queued and `last`, and end within a second."""
        self._channel.end_soon(last)

    async def ticket(self, session_id: SessionId | None, kept: tuple[SessionId, ...] | None = None) -> str:
        """A ticket for one data link: for a new session, or to resume one. Set a deadline around it. Cancelling it wastes a ticket.

        `kept`, for a new one: all sessions that the relay has there already.

        Raises:
            TunnelClosed: the link ended first.
        """
        if self._is_over:
            raise TunnelClosed(Code.LINK_LOST, "the control link is gone")
        self._requests += 1
        number = self._requests
        answer = self._waiting[number] = _Answer()
        try:
            self._channel.send_nowait(TicketRequest(request=number, session=session_id, sessions=kept))
            await answer.arrived.wait()
        finally:
            self._waiting.pop(number, None)
        if answer.ticket is None:
            raise TunnelClosed(Code.LINK_LOST, "the control link ended before a ticket came")
        return answer.ticket

    async def run(
        self, load: Callable[[], Load], on_drain: Callable[[Drain], None], is_vouched_for: Callable[[], bool] = lambda: False
    ) -> None:
        """Carry messages until the link ends. Run it once; cancelling it is a goodbye. For `is_vouched_for` see `Channel.run`.

        `load` returns the present load. The gateway is told of changes, once a heartbeat at most; of `reluctant` at once.
        `on_drain` is called when the gateway will send no more new streams this way.

        Raises:
            TunnelClosed: always, when it ends by itself; GatewayClosing when the gateway said why.
        """
        self._on_drain = on_drain
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report_load, load)
                try:
                    await self._channel.run(
                        self._on_message,
                        heartbeat_s=self._heartbeat_s,
                        dead_after_s=self._dead_after_s,
                        is_vouched_for=is_vouched_for,
                    )
                except TunnelClosed as exc:
                    ended = exc
                nursery.cancel_scope.cancel()
        finally:
            self._is_over = True
            for answer in self._waiting.values():
                answer.arrived.set()
            await self._channel.goodbye(Closing(code=Code.SHUTDOWN, message="the relay stops"))
        if self._closing is not None:
            raise GatewayClosing(self._closing.code, self._closing.message or self._closing.code.label, self._closing.retry_after_s)
        raise ended

    def _on_message(self, message: Message) -> None:
        match message:
            case Ticket(request=number, ticket=ticket):
                answer = self._waiting.pop(number, None)
                if answer is not None:
                    answer.ticket = ticket
                    answer.arrived.set()
            case Closing():
                self._closing = message
            case Drain():
                self._on_drain(message)
            case _:
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"a gateway does not send {message.type} here")

    async def _report_load(self, load: Callable[[], Load]) -> None:
        told: Load | None = None
        told_at = 0.0
        while True:
            now, fresh = trio.current_time(), load()
            is_urgent = told is None or fresh.reluctant is not told.reluctant
            if is_urgent or (fresh != told and now - told_at >= self._heartbeat_s):
                try:
                    self._channel.send_nowait(fresh)
                except TunnelClosed:
                    return
                told, told_at = fresh, now
            await trio.sleep(min(self._heartbeat_s, LOAD_LOOK_S))


class _Answer:
    __slots__ = ("arrived", "ticket")

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.ticket: str | None = None


@asynccontextmanager
async def open_control_link(
    dialler: Dialler,
    url: GatewayUrl,
    gateway: GatewayFile,
    hello: Hello,
    bearer: Callable[[str], str],
    config: UplinkConfig,
    worker: str = "",
    process: str = "",
) -> AsyncIterator[ControlLink]:
    """A control link that the gateway has welcomed; everything of it is closed at the end of the block.

    `bearer` makes the assertion for the connection's `binding`. `worker` is the one that had the link before, if the gateway has several;
    `process` is the only gateway process that will do. Takes at most two of the dialler's timeouts.

    Raises:
        PeerRefused: the gateway said no, to the upgrade or to the hello.
        TunnelError: it could not be reached, did not answer in time, or broke the protocol.
    """
    stream = TlsStream(await dialler.dial(url, at_process(process, ALPN_HTTP), worker))
    failure: TunnelError | None = None
    try:
        async with trio.open_nursery() as readers:
            try:
                with within(dialler.timeout_s, f"{url.authority} did not welcome this relay"):
                    headers = {"Authorization": f"Bearer {bearer(stream.socket.binding())}"}
                    websocket = await open_websocket(readers, stream, url.authority, CONTROL_PATH, headers)
                    try:
                        await websocket.send_message(encode(hello))
                    except ConnectionClosed as exc:
                        raise TunnelClosed(Code.LINK_LOST, f"{url.authority} closed the control link", by_peer=True) from exc
                    channel = Channel(websocket)
                    welcome = _welcomed(await channel.receive(), gateway)
                yield ControlLink(channel, welcome, config.dead_after_s)
            except TunnelError as exc:
                failure = exc  # by name, not out of the nursery, which would wrap it in a group
            readers.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)
    if failure is not None:
        raise failure


def control_hello(identity: Identity, offers: tuple[Offer, ...], caps: tuple[str, ...], earlier: tuple[Earlier, ...] = ()) -> Hello:
    """The first message of a control link."""
    return Hello(version=fxtunnel.__version__, instance=identity.instance, services=offers, caps=(*caps, CAP_WORKERS), earlier=earlier)


def _welcomed(answer: Message, gateway: GatewayFile) -> Welcome:
    match answer:
        case Welcome(v=version) if version != PROTOCOL_VERSION:
            raise PeerRefused(
                Refusal.VERSION_MISMATCH, f"the gateway speaks version {version} of the protocol, this relay version {PROTOCOL_VERSION}"
            )
        case Welcome(gateway_id=gateway_id) if gateway_id != gateway.gateway_id:
            raise PeerRefused(Refusal.BAD_ASSERTION, f"it calls itself {gateway_id}, and {gateway.path} is for {gateway.gateway_id}")
        case Welcome():
            return answer
        case Refused(code=refusal, message=message, retry_after_s=retry_after_s):
            raise PeerRefused(refusal, message or refusal.value, retry_after_s=retry_after_s)
        case Closing(code=code, message=message, retry_after_s=retry_after_s):
            raise GatewayClosing(code, message or code.label, retry_after_s)
        case _:
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"the gateway answered hello with {answer.type}")
