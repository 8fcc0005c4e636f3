"""Pump: the other workers: the lines to them, and the clients that go that way."""

import logging

from fxgateway.doors.client import Client
from fxgateway.workers.bridge import Bridge, plain_pair
from fxgateway.workers.channel import Channel
from fxgateway.workers.parcels import pack
from fxtunnel.engine.reactor import READ, Reactor
from fxtunnel.engine.splice import abort
from fxtunnel.engine.tls_socket import TlsSocket

logger = logging.getLogger(__name__)


class Peers:
    """By their numbers. Who hears what they say, and puts them in here, is the `Crew`."""

    def __init__(self, reactor: Reactor) -> None:
        self.channels: dict[int, Channel] = {}
        self.heard_of: set[int] = set()
        """Workers that have said something: before that, a process is still on its way to serve."""
        self._bridges: set[Bridge] = set()
        self._reactor = reactor
        self._is_catching_up = False

    @property
    def bridges(self) -> int:
        """Clients whose TLS ends here and whose relay is elsewhere."""
        return len(self._bridges)

    def serves(self, worker: int) -> bool:
        """Whether another worker is known to take what it is sent."""
        return worker in self.channels and worker in self.heard_of

    def pass_on(self, worker: int, client: Client, early: bytes) -> bool:
        """See `FarRelay`."""
        channel = self.channels.get(worker)
        if channel is None or not channel.has_room:
            return False
        if isinstance(client.sock, TlsSocket):
            try:
                ours, theirs = plain_pair()
            except OSError as exc:  # descriptors: another relay may have its tunnel here, and else the client is told
                logger.warning("a client cannot be passed on to worker %d: %s", worker, exc.strerror)
                return False
            if not channel.send(pack(client, early, client.named or client.peer()) | {"is_bridged": True}, [theirs]):
                ours.close()
                theirs.close()
                return False
            secure = client.sock
            client.give_away()
            self._bridges.add(Bridge(self._reactor, secure, ours, self._bridges.discard))
            return True
        message = pack(client, early, client.named) | {"is_bridged": False}
        sock = client.give_away()
        if not channel.send(message, [sock]):
            abort(sock)
        return True

    def catch_up(self) -> None:
        """Read what the others have said just now."""
        if not self._is_catching_up:  # what is read may be a client that nobody serves either
            self._is_catching_up = True
            try:
                for channel in list(self.channels.values()):
                    channel.on_event(READ)
            finally:
                self._is_catching_up = False

    def forget(self, channel: Channel) -> None:
        """That process is gone."""
        if self.channels.get(channel.number) is channel:
            del self.channels[channel.number]
        self.heard_of.discard(channel.number)

    def end_bridges(self) -> None:
        """RST to clients whose TLS ends here and whose relay is elsewhere."""
        for bridge in list(self._bridges):
            bridge.fail()

    def close(self) -> None:
        """Hang up on them."""
        for channel in self.channels.values():
            channel.close()
