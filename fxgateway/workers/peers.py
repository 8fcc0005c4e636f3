"""Pump: the lines to the other workers, and the clients that are passed on over them."""

import logging

from fxgateway.doors.client import Client
from fxgateway.routing.shared_admission import SharedAdmission
from fxgateway.workers.bridge import Bridge, PlainEnd, plain_pair
from fxgateway.workers.channel import Channel
from fxgateway.workers.client_transfer import pack
from fxtunnel.engine.reactor import READ, Reactor
from fxtunnel.engine.splice import abort
from fxtunnel.engine.tls_socket import TlsSocket

logger = logging.getLogger(__name__)


class Peers:
    """The other workers, by number. `WorkerPeering` enters them here, and handles what they say."""

    def __init__(self, reactor: Reactor, admission: SharedAdmission) -> None:
        self.channels: dict[int, Channel] = {}
        self.heard_of: set[int] = set()
        """Workers that have reported at least once: before that, a worker does not serve yet."""
        self._bridges: set[Bridge] = set()
        self._reactor = reactor
        self._admission = admission
        self._is_catching_up = False

    @property
    def bridges(self) -> int:
        """Clients whose TLS is terminated here and whose relay is connected to another worker."""
        return len(self._bridges)

    def serves(self, worker: int) -> bool:
        """Whether another worker is known to serve."""
        return worker in self.channels and worker in self.heard_of

    def pass_on(self, worker: int, client: Client, early: bytes) -> bool:
        """See `WorkerRelay`."""
        channel = self.channels.get(worker)
        if channel is None or not channel.has_room or not self._admission.has_room(worker):
            return False
        secure = client.sock
        if isinstance(secure, TlsSocket) or (isinstance(secure, PlainEnd) and secure.holds_some):
            try:
                ours, theirs = plain_pair()
            except OSError as exc:  # out of descriptors: the client is offered to the next relay, which may have its tunnel here
                logger.warning("a client cannot be passed on to worker %d: %s", worker, exc.strerror)
                return False
            if not channel.send(pack(client, early, client.named or client.peer()) | {"is_bridged": True}, [theirs]):
                ours.close()
                theirs.close()
                return False
            client.give_away()
            self._admission.passed_on(worker)
            self._bridges.add(Bridge(self._reactor, secure, ours, self._bridge_over))
            self._admission.bridge(len(self._bridges))
            return True
        message = pack(client, early, client.named) | {"is_bridged": isinstance(secure, PlainEnd)}
        sock = client.give_away()
        if channel.send(message, [sock]):
            self._admission.passed_on(worker)
        else:
            abort(sock)
        return True

    def catch_up(self) -> None:
        """Read what the others have sent but the reactor has not delivered yet."""
        if not self._is_catching_up:  # not again from within: what is read may be a client for whom no relay is found either
            self._is_catching_up = True
            try:
                for channel in list(self.channels.values()):
                    channel.on_event(READ)
            finally:
                self._is_catching_up = False

    def forget(self, channel: Channel) -> None:
        """The process at the other end of this line has ended."""
        if self.channels.get(channel.number) is channel:
            del self.channels[channel.number]
        self.heard_of.discard(channel.number)

    def end_bridges(self) -> None:
        """End all `bridges`, with RST to their clients."""
        for bridge in list(self._bridges):
            bridge.fail()

    def _bridge_over(self, bridge: Bridge) -> None:
        self._bridges.discard(bridge)
        self._admission.bridge(len(self._bridges))

    def close(self) -> None:
        """Hang up on all other workers."""
        for channel in self.channels.values():
            channel.close()
