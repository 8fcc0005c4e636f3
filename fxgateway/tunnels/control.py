"""Task: one relay's control link, from its hello to its end."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, assert_never

import trio
from trio_websocket import WebSocketConnection

from fxgateway.tunnels.peer_processes import PeerProcesses
from fxgateway.tunnels.ports import Departure, Departures, RegistryPort
from fxgateway.tunnels.tickets import LIFETIME_S, TicketBook
from fxtunnel import __version__
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import (
    CAP_LEAVING,
    CAP_NAMED,
    CAP_WORKERS,
    MAX_EARLIER,
    PROTOCOL_VERSION,
    TEXT_CHARS,
    Closing,
    Drain,
    Hello,
    Load,
    Message,
    Ping,
    Pong,
    Refused,
    Services,
    Ticket,
    TicketRequest,
    Welcome,
)
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed
from fxtunnel.model import GatewayId, InstanceId, RelayId

logger = logging.getLogger(__name__)

CAPS: Final = ("resume",)
RETRY_AFTER_S: Final = 5.0
LEAVING_RETRY_S: Final = 30.0
"""Nothing can change for such a relay before it is restarted, and each attempt is a line in two logs."""
YIELDED_BEATS: Final = 1 / 3
"""How much longer than a relay the gateway waits before it pings, in heartbeats: with thousands of links it leaves that to relays."""


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """The timing that the gateway keeps, and announces to relays. Seconds. `process` tells one run of the gateway from the next."""

    heartbeat_s: float = 3.0
    dead_after_s: float = 10.0
    hold_s: float = 30.0
    hello_timeout_s: float = 5.0
    process: str = ""


@dataclass(frozen=True, slots=True)
class AuthenticatedRelay:
    """Who opened a control link, as an assertion has proved. `is_trusted` says whether the key is still good; `on_welcome` is called once
    the relay has been welcomed.
    """

    relay_id: RelayId
    remote_address: str
    is_trusted: Callable[[], bool]
    on_welcome: Callable[[], None] = lambda: None


class ControlLink:
    """The handle the registry holds; see `ControlHandle`."""

    def __init__(self, channel: Channel, remote_address: str) -> None:
        self._channel = channel
        self.remote_address = remote_address
        self.connected_at = trio.current_time()

    def drain(self, deadline_s: float) -> None:
        """See `ControlHandle`."""
        self._tell(Drain(deadline_s=deadline_s))

    def relieve(self) -> None:
        """See `ControlHandle`."""
        self._tell(Drain(deadline_s=0, relieved=True))

    def close(self, code: Code, text: str, retry_after_s: float = 0) -> None:
        """Tell the relay why, then end the link, soon. Never blocks; only the first call counts."""
        self._channel.end_soon(Closing(code=code, message=text[:TEXT_CHARS], retry_after_s=retry_after_s))

    def _tell(self, message: Drain) -> None:
        try:
            self._channel.send_nowait(message)
        except TunnelClosed:
            logger.debug("the link ended before its relay could be told of the drain")


class ControlLinkAcceptor:
    """Serves control links, any number at once."""

    def __init__(
        self, gateway_id: GatewayId, registry: RegistryPort, tickets: TicketBook, config: ControlConfig, peer_processes: PeerProcesses
    ) -> None:
        self._gateway_id = gateway_id
        self._registry = registry
        self._tickets = tickets
        self._config = config
        self._peer_processes = peer_processes

    def check_room(self, relay_id: RelayId, instance: InstanceId | None = None) -> None:
        """Check that the gateway takes this relay. One that is here already has room even while the gateway drains: it may resume sessions.

        Before the hello the instance is not known yet; then any instance of the relay counts as being here.

        Raises:
            PeerRefused: there is no room for this relay now; it may try again.
        """
        if self._registry.knows(relay_id, instance):
            return
        if self._registry.is_draining:
            raise PeerRefused(Refusal.DRAINING, "the gateway is going away", retry_after_s=RETRY_AFTER_S)
        if self._registry.is_full(relay_id):
            raise PeerRefused(Refusal.TOO_MANY, "the gateway has no room for another relay", retry_after_s=RETRY_AFTER_S)

    async def serve(self, ws: WebSocketConnection, relay: AuthenticatedRelay) -> None:
        """Serve an upgraded link until it ends; peers' faults end up in the log. Cancelling says goodbye, within 1 s.

        Closes the WebSocket; the stream beneath it is the caller's.
        """
        channel = Channel(ws)
        try:
            hello = await self._hello(channel, relay)
            # A relay that drains keeps its sessions here but does not claim its name again: its successor may hold it, at another process.
            epoch = 0 if CAP_LEAVING in hello.caps else await self._peer_processes.claim(relay.relay_id, hello.instance, _departures(hello))
            _check_trusted(relay)  # from here to `enter` there is no checkpoint; after it the registry ends revoked relays
            self.check_room(relay.relay_id, hello.instance)
        except PeerRefused as exc:
            logger.warning("control link of %s from %s refused: %s", relay.relay_id, relay.remote_address, exc)
            await channel.goodbye(Refused(code=exc.refusal, message=str(exc)[:TEXT_CHARS], retry_after_s=exc.retry_after_s))
            return
        except TunnelClosed as exc:
            logger.warning("control link of %s from %s ended before its welcome: %s", relay.relay_id, relay.remote_address, exc)
            await channel.goodbye(Closing(code=exc.code, message=str(exc)[:TEXT_CHARS]))
            return
        await self._serve_known(channel, relay, hello, epoch)

    async def _hello(self, channel: Channel, relay: AuthenticatedRelay) -> Hello:
        try:
            with trio.fail_after(self._config.hello_timeout_s):
                hello = await channel.receive()
        except trio.TooSlowError:
            # TOO_MANY, since that is not final: a slow path may recover.
            raise PeerRefused(Refusal.TOO_MANY, f"no hello within {self._config.hello_timeout_s:g} s") from None
        except RemoteProtocolError as exc:
            raise PeerRefused(Refusal.BAD_REQUEST, str(exc)) from exc
        if not isinstance(hello, Hello):
            raise PeerRefused(Refusal.BAD_REQUEST, "the first message is not a hello")
        if hello.v != PROTOCOL_VERSION:
            older = "relay" if hello.v < PROTOCOL_VERSION else "gateway"
            raise PeerRefused(
                Refusal.VERSION_MISMATCH,
                f"the relay ({hello.version}) speaks protocol {hello.v}, we ({__version__}) {PROTOCOL_VERSION}: update the {older}",
            )
        if unknown := set(hello.need) - set(CAPS):
            raise PeerRefused(Refusal.UNSUPPORTED, f"the relay needs {', '.join(sorted(unknown))}, which this gateway lacks")
        if self._peer_processes.worker and CAP_WORKERS not in hello.caps:
            raise PeerRefused(
                Refusal.VERSION_MISMATCH,
                f"this gateway has several processes (tunnel.workers), which the relay ({hello.version}) does not know: update the relay",
            )
        _check_trusted(relay)  # before its name is claimed over all processes
        if CAP_LEAVING in hello.caps and not self._registry.knows(relay.relay_id, hello.instance):
            # It has no sessions to resume here, and must not push its successor out.
            raise PeerRefused(Refusal.DRAINING, "this relay drains, and has no sessions here", retry_after_s=LEAVING_RETRY_S)
        self.check_room(relay.relay_id, hello.instance)
        return hello

    async def _serve_known(self, channel: Channel, relay: AuthenticatedRelay, hello: Hello, epoch: int) -> None:
        config, relay_id = self._config, relay.relay_id
        link = ControlLink(channel, relay.remote_address)
        for instance, departure in _departures(hello).items():
            self._registry.mark_draining(relay_id, instance, departure)
        epoch = self._registry.enter(relay_id, hello.instance, hello.services, link, epoch)
        try:
            logger.info("relay %s is here from %s, epoch %d, version %s", relay_id, relay.remote_address, epoch, hello.version)
            channel.send_nowait(
                Welcome(
                    version=__version__,
                    gateway_id=self._gateway_id,
                    epoch=epoch,
                    heartbeat_s=config.heartbeat_s,
                    dead_after_s=config.dead_after_s,
                    hold_s=config.hold_s,
                    caps=(*CAPS, CAP_NAMED) if self._peer_processes.is_named else CAPS,
                    process=config.process,
                    earlier=self._peer_processes.earlier[-MAX_EARLIER:],
                    worker=self._peer_processes.worker,
                )
            )
            relay.on_welcome()
            await channel.run(
                lambda message: self._take(channel, relay_id, hello.instance, message),
                heartbeat_s=config.heartbeat_s,
                dead_after_s=config.dead_after_s,
                yield_s=config.heartbeat_s * YIELDED_BEATS,
                is_vouched_for=lambda: self._registry.is_up(relay_id, hello.instance),
            )
        except TunnelClosed as exc:
            lasted_s = trio.current_time() - link.connected_at
            by = "by the relay" if exc.by_peer else "by the gateway"
            logger.info("control link of %s ended %s after %.0f s: %s (%s)", relay_id, by, lasted_s, exc.code.label, exc)
        finally:
            self._registry.leave(relay_id, link)
            # Has an effect only if `run` did not end the link: it was cancelled because the gateway stops, or a bug of ours is propagating.
            is_stopping = trio.current_effective_deadline() == -math.inf
            await channel.goodbye(Closing(code=Code.SHUTDOWN if is_stopping else Code.INTERNAL_ERROR, retry_after_s=1.0))

    def _take(self, channel: Channel, relay_id: RelayId, instance: InstanceId, message: Message) -> None:
        match message:
            case TicketRequest(request=request, session=session, sessions=kept):
                if kept is not None:
                    self._registry.note_sessions(relay_id, instance, kept)
                text = self._tickets.issue(relay_id, instance, session, trio.current_time())
                channel.send_nowait(Ticket(request=request, ticket=text, expires_s=LIFETIME_S))
            case Services(services=services):
                self._registry.update_services(relay_id, instance, services)
            case Load(reluctant=reluctant):
                self._registry.note_reluctance(relay_id, instance, reluctant=reluctant)
            case Drain(deadline_s=deadline_s, handover=handover):
                logger.info("relay %s is draining", relay_id)
                self._registry.mark_draining(relay_id, instance, Departure(deadline_s, handover))
            case Closing() | Ping() | Pong():
                pass
            case Hello() | Welcome() | Refused() | Ticket():
                raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"a {message.type} message out of place")
            case _:
                assert_never(message)


def _departures(hello: Hello) -> Departures:
    """The instances that have made way for this one: they are not fenced off, also where their own word is lost on a dead path."""
    return {earlier.instance: Departure(earlier.deadline_s, earlier.handover) for earlier in hello.earlier}


def _check_trusted(relay: AuthenticatedRelay) -> None:
    """Raise PeerRefused if the relay has been revoked since its assertion was verified."""
    if not relay.is_trusted():
        raise PeerRefused(Refusal.REVOKED, f"relay {relay.relay_id} was revoked by the gateway's administrator")
