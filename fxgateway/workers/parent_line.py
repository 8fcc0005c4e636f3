"""Pump: a worker's line to the parent, which exists from the first moment of the process, before there is a gateway in it."""

import socket
from typing import Any, Final, Protocol

import trio

from fxgateway.steering import UNKNOWN
from fxgateway.workers.channel import Channel, Message
from fxgateway.workers.pending_calls import PendingCalls
from fxtunnel.engine.reactor import Reactor

MAX_ORDERS: Final = 1024
"""Orders of the parent that a task has not taken yet. A handful at most; more is a bug."""


class Serving(Protocol):
    """A worker that serves, as its line to the parent sees it."""

    def on_news(self, message: Message, sockets: list[socket.socket]) -> None:
        """The parent says or asks something that only a gateway can act on."""

    def close(self) -> None:
        """The worker ends: hang up on the other workers."""


class ParentLine:
    """Implements `ChannelOwner` for the line to the parent. Until the worker serves, messages are answered or kept here."""

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self.channel = Channel(reactor, sock, self)
        self.orders, self.received_orders = trio.open_memory_channel[tuple[Message, list[socket.socket]]](MAX_ORDERS)
        """The parent's orders that need a task, in order."""
        self.orphaned = trio.Event()
        self._calls = PendingCalls()
        self._serving: Serving | None = None
        self._peers: list[tuple[Message, list[socket.socket]]] = []
        """Lines to other workers, until there is somebody to use them."""

    async def ask(self, what: str, **fields: Any) -> Message:
        """The parent's answer.

        Raises:
            NoAnswer: there is none in time.
        """
        return await self._calls.ask(self.channel, what, **fields)

    def serve(self, serving: Serving) -> None:
        """There is a gateway now: give it what has been kept for it, and whatever comes from now on."""
        self._serving = serving
        peers, self._peers = self._peers, []
        for message, sockets in peers:
            serving.on_news(message, sockets)

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        """See `ChannelOwner`."""
        match message["op"]:
            case "answer":
                self._calls.answered(message)
            case "peer" | "fence" | "status" | "steer":
                if self._serving is not None:
                    self._serving.on_news(message, sockets)
                else:
                    self._on_early_news(message, sockets)
            case _:
                self.orders.send_nowait((message, sockets))

    def on_gone(self, channel: Channel) -> None:
        """See `ChannelOwner`."""
        self._calls.gone(channel)
        self.orphaned.set()

    def close(self) -> None:
        """Hang up, and have the worker hang up on the others."""
        if self._serving is not None:
            self._serving.close()
        self.channel.close()

    def _on_early_news(self, message: Message, sockets: list[socket.socket]) -> None:
        """News for a gateway that does not exist yet. Drains need not be kept: the parent repeats them when the worker is ready."""
        match message["op"]:
            case "peer":
                self._peers.append((message, sockets))
            case "status":
                self.channel.send({"op": "answer", "n": message["n"]})
            case "steer":
                self.channel.send({"op": "answer", "n": message["n"], "left": 0 if message["relay"] is None else UNKNOWN})
