"""Pump: a worker's lines to the parent and to the other workers: what it hears, what it says, and the clients that go to and fro."""

import logging
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import trio

from fxgateway.doors.client import Client
from fxgateway.doors.doors import Doors
from fxgateway.routing.shared_admission import Counts, SharedAdmission
from fxgateway.steering import UNKNOWN
from fxgateway.tunnels.colleagues import Passed
from fxgateway.tunnels.registry import Registry
from fxgateway.workers.asking import Asking
from fxgateway.workers.bridge import Bridge, adopt, plain_pair
from fxgateway.workers.channel import Channel, Message
from fxgateway.workers.far_relays import AllRelays, News, moves
from fxgateway.workers.parcels import pack, unpack
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import READ, Reactor
from fxtunnel.engine.splice import abort
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.errors import TunnelClosed
from fxtunnel.model import InstanceId, RelayId

logger = logging.getLogger(__name__)

PAUSE_S: Final = 0.005
"""Between two times that the others are told something. Their share of a limit can be exceeded by what comes in within it."""
PAUSE_SHARE: Final = 20
"""Telling that took long, with thousands of relays, is followed by a pause of so many times that."""
BEHIND_S: Final = 0.05
BEAT_S: Final = 1.0
DOOR_LOOK_S: Final = 0.05
DOOR_LOOKS: Final = 40
"""How often a client is looked for a door that is not open here yet; in all the time that workers may take to open it one after another."""
MAX_PASSED: Final = 256
"""Connections of relays that others have accepted and that wait to be served here."""


class Crew:
    """A worker's place among the others. `join` makes it complete, once the gateway's parts are there."""

    def __init__(self, reactor: Reactor, parent: socket.socket) -> None:
        self.parent = Channel(reactor, parent, self)
        self.asking = Asking()
        self.orders, self.received_orders = trio.open_memory_channel[tuple[Message, list[socket.socket]]](1024)
        """What the parent wants done by a task, in order."""
        self.orphaned = trio.Event()
        self.peers: dict[int, Channel] = {}
        self.passed, self.received_passed = trio.open_memory_channel[Passed](MAX_PASSED)
        self.status: Callable[[], Message] = dict
        self.steer: Callable[[str, RelayId | None], int] = _nothing_to_steer
        """See `Steering.act`."""
        self._bridges: set[Bridge] = set()
        self._reactor = reactor
        self._number = 0
        self._relays: AllRelays
        self._registry: Registry
        self._doors: Doors
        self._admission: SharedAdmission
        self._is_complete = False
        self._is_stirred = False
        self._is_catching_up = False
        self._told_until = 0.0
        self._behind: set[int] = set()
        """Workers that have not taken what was told them: they are told everything again."""
        self._heard_of: set[int] = set()
        """Workers that have said something: before that, a process is still on its way to serve."""
        self._waiting_peers: list[tuple[int, socket.socket]] = []

    @property
    def bridges(self) -> int:
        """Clients whose TLS ends here and whose relay is elsewhere."""
        return len(self._bridges)

    def join(self, number: int, registry: Registry, relays: AllRelays, admission: SharedAdmission, doors: Doors) -> None:
        """The parts are there: from now on the others are told of them."""
        self._number, self._registry, self._relays, self._admission, self._doors = number, registry, relays, admission, doors
        self._is_complete = True
        for peer, sock in self._waiting_peers:
            self._meet(peer, sock)
        self._waiting_peers.clear()
        registry.on_change = admission.on_change = self.stir
        self.stir()
        self._beat()

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        """See `ChannelOwner`."""
        match message["op"]:
            case "answer":
                self.asking.answered(message)
            case "peer":
                self._peer(int(message["worker"]), sockets)
            case "fence":
                self._fence(message)
            case "status":
                channel.send({"op": "answer", "n": message["n"], **self.status()})
            case "steer":
                left = self.steer(message["method"], None if message["relay"] is None else RelayId(message["relay"]))
                channel.send({"op": "answer", "n": message["n"], "left": left})
            case "told":
                self._hear(channel.number, message)
            case "client":
                self._arrive(message, sockets)
            case "guest":
                self._guest(message, sockets)
            case _:
                self.orders.send_nowait((message, sockets))

    def on_gone(self, channel: Channel) -> None:
        """See `ChannelOwner`."""
        self.asking.gone(channel)
        if channel is self.parent:
            self.orphaned.set()
            return
        if self.peers.get(channel.number) is channel:
            del self.peers[channel.number]
        self._behind.discard(channel.number)
        self._heard_of.discard(channel.number)
        if self._is_complete:
            self._relays.forget(channel.number)
            self._admission.forget(channel.number, self._reactor.now)

    async def claim(self, relay_id: RelayId, instance: InstanceId) -> int:
        """The epoch under which this worker has the relay's name; 0: there is no room.

        The caller enters it without a checkpoint in between: from here on a fence finds the instance in the registry.

        Raises:
            NoAnswer: there is none in time.
            TunnelClosed: the name has been given on since the parent answered.
        """
        try:
            epoch = int((await self.ask("claim", relay=relay_id, instance=instance))["epoch"])
        except BaseException:
            self._relays.expect(relay_id)  # the parent may give it the name all the same, and is told that it did not come
            self.stir()
            raise
        if epoch:
            if (gone := self._registry.overtaken(relay_id, instance, epoch)) is not None:
                raise TunnelClosed(*gone)
            self._relays.expect(relay_id)
        return epoch

    async def ask(self, what: str, **fields: Any) -> Message:
        """The parent's answer.

        Raises:
            NoAnswer: there is none in time.
        """
        return await self.asking.ask(self.parent, what, **fields)

    def pass_on(self, worker: int, client: Client, early: bytes) -> bool:
        """See `FarRelay`."""
        channel = self.peers.get(worker)
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

    def serves(self, worker: int) -> bool:
        """Whether another worker is known to take what it is sent."""
        return worker in self.peers and worker in self._heard_of

    def end_bridges(self) -> None:
        """RST to clients whose TLS ends here and whose relay is elsewhere."""
        for bridge in list(self._bridges):
            bridge.fail()

    def close(self) -> None:
        """Hang up on everyone."""
        self._is_complete = False
        for channel in (self.parent, *self.peers.values()):
            channel.close()

    def _peer(self, number: int, sockets: list[socket.socket]) -> None:
        if not sockets:
            logger.error("no line to worker %d: this process may open no more files", number)
        elif self._is_complete:
            self._meet(number, sockets[0])
        else:
            self._waiting_peers.append((number, sockets[0]))

    def _meet(self, number: int, sock: socket.socket) -> None:
        before = self.peers.get(number)
        if before is not None:
            before.close()
            self.on_gone(before)
        channel = self.peers[number] = Channel(self._reactor, sock, self, number)
        self._tell_everything(channel)

    def _fence(self, message: Message) -> None:
        if self._is_complete:
            relay_id, instance, successor = RelayId(message["relay"]), InstanceId(message["instance"]), InstanceId(message["successor"])
            self._relays.yield_name(relay_id, instance, int(message["epoch"]), successor)

    def _hear(self, worker: int, message: Message) -> None:
        now = self._reactor.now
        self._heard_of.add(worker)
        if message["is_all"]:
            self._relays.forget(worker)
            self._admission.forget(worker, now)
        self._relays.note(worker, message["news"])
        if message["counts"] is not None:
            self._admission.note(worker, Counts(*message["counts"]), now)

    def _arrive(self, message: Message, sockets: list[socket.socket]) -> None:
        if not sockets:
            logger.warning("a client was lost on its way here: this process may open no more files")
            return
        sockets[0].setblocking(False)
        self._let_in(message, sockets[0], DOOR_LOOKS)

    def _let_in(self, message: Message, sock: socket.socket, looks: int) -> None:
        door = self._doors.leading_in(message["door"]) if self._is_complete else None
        if door is None:
            # A reload reaches one worker a moment before the other.
            if looks and self._is_complete:
                self._reactor.call_later(DOOR_LOOK_S, lambda: self._let_in(message, sock, looks - 1))
            else:
                abort(sock)
            return
        client, early = unpack(door, adopt(sock) if message["is_bridged"] else sock, message)
        self._admission.adopt(door.listen_address, client.address, self._reactor.now)
        door.clients.add(client)
        try:
            client.begin(client.named or client.peer(), early)
        except BaseException:
            client.fail(Code.INTERNAL_ERROR)
            raise

    def _guest(self, message: Message, sockets: list[socket.socket]) -> None:
        for sock in sockets[:1]:
            try:
                self.passed.send_nowait(Passed(sock, message["ip"], message["address"], counts_as_relay=message["counts_as_relay"]))
            except trio.WouldBlock:
                sock.close()

    def stir(self) -> None:
        """Something has changed that the others are to know: they are told at the end of this turn, or after the pause."""
        if not self._is_stirred and self._is_complete:
            self._is_stirred = True
            pause_s = self._told_until - self._reactor.now
            if pause_s <= 0:
                self._reactor.flush_later(self)
            else:
                self._reactor.call_later(pause_s, self.flush)

    def flush(self) -> None:
        """From the reactor, at the end of a turn."""
        self._is_stirred = False
        if self._is_complete:
            took_s = self._tell()
            self._told_until = self._reactor.now + max(PAUSE_S, PAUSE_SHARE * took_s)

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; the others are told the next time."""

    def catch_up(self) -> None:
        """Read what the others have said just now."""
        if not self._is_catching_up:  # what is read may be a client that nobody serves either
            self._is_catching_up = True
            try:
                for channel in list(self.peers.values()):
                    channel.on_event(READ)
            finally:
                self._is_catching_up = False

    def _tell(self) -> float:
        """Say what has changed; the seconds it took."""
        began = time.monotonic()
        news, counts = self._relays.news(), self._admission.changes()
        message = _told(news, counts, is_all=False) if news or counts is not None else None
        if moved := moves(news):
            self.parent.send({"op": "told", "news": moved})
        for number, channel in list(self.peers.items()):
            if not channel.is_clear:
                if message is not None:
                    self._behind.add(number)
            elif number in self._behind:
                self._behind.discard(number)
                self._tell_everything(channel)
            elif message is not None:
                channel.send(message)
        if self._behind:
            self._reactor.call_later(BEHIND_S, self.stir)
        return time.monotonic() - began

    def _tell_everything(self, channel: Channel) -> None:
        channel.send(_told(self._relays.everything(), self._admission.counts(), is_all=True))

    def _beat(self) -> None:
        if self._is_complete:
            self.parent.send({"op": "beat"})
            self.stir()
            self._reactor.call_later(BEAT_S, self._beat)


def _nothing_to_steer(method: str, relay_id: RelayId | None) -> int:
    """Of a worker that is still on its way; when it is ready the parent says again what is wished."""
    return 0 if relay_id is None else UNKNOWN


def _told(news: News, counts: Counts | None, *, is_all: bool) -> Message:
    facts = None if counts is None else [counts.connections, counts.doors, counts.sources, counts.taken]
    return {"op": "told", "is_all": is_all, "news": news, "counts": facts}
