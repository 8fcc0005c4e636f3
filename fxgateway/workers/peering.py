"""Pump: a serving worker among the others: what it tells them, what it hears, and the clients that they pass on to it."""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fxgateway.doors.doors import Doors
from fxgateway.routing.shared_admission import Counts, SharedAdmission
from fxgateway.tunnels.ports import Departure
from fxgateway.tunnels.registry import Registry
from fxgateway.workers.bridge import adopt
from fxgateway.workers.channel import Channel, Message
from fxgateway.workers.client_transfer import unpack
from fxgateway.workers.parent_line import ParentLine
from fxgateway.workers.peers import Peers
from fxgateway.workers.relay_dispatch import RelayDispatch
from fxgateway.workers.worker_relays import AllRelays, News, moves
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.splice import abort
from fxtunnel.model import InstanceId, RelayId

logger = logging.getLogger(__name__)

PAUSE_S: Final = 0.005
"""Pause between two reports to the others. Shared limits can be exceeded by what comes in meanwhile."""
PAUSE_SHARE: Final = 20
"""A report that took long to make, with thousands of relays, is followed by a pause of this many times that."""
BEHIND_S: Final = 0.05
"""Before the next attempt to tell workers that have not taken the last report."""
BEAT_S: Final = 1.0
"""Between two signs of life for the parent, which waits for ten of them (child.SILENT_S)."""
DOOR_LOOK_S: Final = 0.05
DOOR_LOOKS: Final = 40
"""How often to look for the door of a client that was passed on to us: a reload opens a new door in one worker after the other."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The parts of this worker's gateway that the other processes hear of, or ask. For `steer` see `Steering.act`."""

    registry: Registry
    relays: AllRelays
    admission: SharedAdmission
    doors: Doors
    relay_dispatch: RelayDispatch
    status: Callable[[], Message]
    steer: Callable[[str, RelayId | None], int]


class WorkerPeering:
    """A worker's relations to the others, once it serves. Implements `Serving`, and `ChannelOwner` for the lines to the others."""

    def __init__(self, reactor: Reactor, line: ParentLine, peers: Peers, parts: WorkerParts) -> None:
        self._reactor = reactor
        self._line = line
        self._peers = peers
        self._parts = parts
        self._is_open = True
        self._is_stirred = False
        self._told_until = 0.0
        self._behind: set[int] = set()
        """Workers that have missed a report because their line was full: they get a complete one next."""

    def begin(self) -> None:
        """Tell the others of this worker, so that they pass clients on to it. Call once."""
        self._line.serve(self)
        self._parts.registry.on_change = self._parts.admission.on_change = self.stir
        self.stir()
        self._beat()

    def on_news(self, message: Message, sockets: list[socket.socket]) -> None:
        """See `Serving`."""
        match message["op"]:
            case "peer":
                self._peer(int(message["worker"]), sockets)
            case "fence":
                self._fence(message)
            case "status":
                self._line.channel.send({"op": "answer", "n": message["n"], **self._parts.status()})
            case "steer":
                left = self._parts.steer(message["method"], None if message["relay"] is None else RelayId(message["relay"]))
                self._line.channel.send({"op": "answer", "n": message["n"], "left": left})

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        """See `ChannelOwner`."""
        match message["op"]:
            case "told":
                self._hear(channel.number, message)
            case "client":
                self._arrive(message, sockets)
            case "guest":
                self._parts.relay_dispatch.welcome(message, sockets)

    def on_gone(self, channel: Channel) -> None:
        """See `ChannelOwner`."""
        self._peers.forget(channel)
        self._behind.discard(channel.number)
        if self._is_open:
            self._parts.relays.forget(channel.number)
            self._parts.admission.forget(channel.number, self._reactor.now)

    def close(self) -> None:
        """See `Serving`: hang up on the others."""
        self._is_open = False
        self._peers.close()

    def _peer(self, number: int, sockets: list[socket.socket]) -> None:
        if not sockets:
            logger.error("no line to worker %d: this process may open no more files", number)
            return
        before = self._peers.channels.get(number)
        if before is not None:
            before.close()
            self.on_gone(before)
        channel = self._peers.channels[number] = Channel(self._reactor, sockets[0], self, number)
        self._tell_everything(channel)

    def _fence(self, message: Message) -> None:
        relay_id, instance, successor = RelayId(message["relay"]), InstanceId(message["instance"]), InstanceId(message["successor"])
        if message["departure"] is not None:
            self._parts.registry.mark_draining(relay_id, instance, Departure(*message["departure"]))
        self._parts.relays.yield_name(relay_id, instance, int(message["epoch"]), successor)

    def _hear(self, worker: int, message: Message) -> None:
        now = self._reactor.now
        self._peers.heard_of.add(worker)
        if message["is_all"]:
            self._parts.relays.forget(worker)
            self._parts.admission.forget(worker, now)
        self._parts.relays.note(worker, message["news"])
        if message["counts"] is not None:
            self._parts.admission.note(worker, Counts(*message["counts"]), now)

    def _arrive(self, message: Message, sockets: list[socket.socket]) -> None:
        if not sockets:
            logger.warning("a client was lost on its way here: this process may open no more files")
            return
        sockets[0].setblocking(False)
        self._let_in(message, sockets[0], DOOR_LOOKS)

    def _let_in(self, message: Message, sock: socket.socket, looks: int) -> None:
        door = self._parts.doors.leading_in(message["door"]) if self._is_open else None
        if door is None:
            # A reload may have reached the other worker a moment earlier.
            if looks and self._is_open:
                self._reactor.call_later(DOOR_LOOK_S, lambda: self._let_in(message, sock, looks - 1))
            else:
                abort(sock)
            return
        client, early = unpack(door, adopt(sock) if message["is_bridged"] else sock, message)
        self._parts.admission.adopt(door.listen_address, client.address, self._reactor.now)
        door.adopt(client)
        try:
            client.begin(client.named or client.peer(), early)
        except BaseException:
            client.fail(Code.INTERNAL_ERROR)
            raise

    def stir(self) -> None:
        """Something has changed that the others should know: tell them at the end of this turn, or after the pause."""
        if not self._is_stirred and self._is_open:
            self._is_stirred = True
            pause_s = self._told_until - self._reactor.now
            if pause_s <= 0:
                self._reactor.flush_later(self)
            else:
                self._reactor.call_later(pause_s, self.flush)

    def flush(self) -> None:
        """From the reactor, at the end of a turn."""
        self._is_stirred = False
        if self._is_open:
            took_s = self._tell()
            self._told_until = self._reactor.now + max(PAUSE_S, PAUSE_SHARE * took_s)

    def on_crash(self) -> None:
        """From the reactor: a bug of ours; the others are told the next time."""

    def _tell(self) -> float:
        """Tell the others what has changed; returns the seconds that took."""
        began = time.monotonic()
        news, counts = self._parts.relays.news(), self._parts.admission.changes()
        message = _told(news, counts, is_all=False) if news or counts is not None else None
        if moved := moves(news):
            self._line.channel.send({"op": "told", "news": moved})
        for number, channel in list(self._peers.channels.items()):
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
        channel.send(_told(self._parts.relays.everything(), self._parts.admission.counts(), is_all=True))

    def _beat(self) -> None:
        if self._is_open:
            self._line.channel.send({"op": "beat"})
            self.stir()
            self._reactor.call_later(BEAT_S, self._beat)


def _told(news: News, counts: Counts | None, *, is_all: bool) -> Message:
    facts = None if counts is None else [counts.connections, counts.doors, counts.sources, counts.taken, counts.files]
    return {"op": "told", "is_all": is_all, "news": news, "counts": facts}
