"""Pump: a worker's line to the parent: there from the first moment of the process on, before there is a gateway in it."""

import socket
from typing import Any, Final, Protocol

import trio

from fxgateway.steering import UNKNOWN
from fxgateway.workers.asking import Asking
from fxgateway.workers.channel import Channel, Message
from fxtunnel.engine.reactor import Reactor

MAX_ORDERS: Final = 1024


class Serving(Protocol):
    """A worker that serves, as its line to the parent sees it."""

    def on_news(self, message: Message, sockets: list[socket.socket]) -> None:
        """The parent says or asks something that only a gateway can act on."""

    def close(self) -> None:
        """The worker ends."""


class Line:
    """Implements `ChannelOwner` for the line to the parent. What comes before the worker serves is answered, or kept, here."""

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self.channel = Channel(reactor, sock, self)
        self.orders, self.received_orders = trio.open_memory_channel[tuple[Message, list[socket.socket]]](MAX_ORDERS)
        """What the parent wants done by a task, in order."""
        self.orphaned = trio.Event()
        self._asking = Asking()
        self._serving: Serving | None = None
        self._peers: list[tuple[Message, list[socket.socket]]] = []
        """Lines to other workers, until there is somebody to use them."""

    async def ask(self, what: str, **fields: Any) -> Message:
        """The parent's answer.

        Raises:
            NoAnswer: there is none in time.
        """
        return await self._asking.ask(self.channel, what, **fields)

    def serve(self, serving: Serving) -> None:
        """There is a gateway now, which hears what has come for it, and what comes from now on."""
        self._serving = serving
        peers, self._peers = self._peers, []
        for message, sockets in peers:
            serving.on_news(message, sockets)

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        """See `ChannelOwner`."""
        match message["op"]:
            case "answer":
                self._asking.answered(message)
            case "peer" | "fence" | "status" | "steer":
                if self._serving is not None:
                    self._serving.on_news(message, sockets)
                else:
                    self._on_early_news(message, sockets)
            case _:
                self.orders.send_nowait((message, sockets))

    def on_gone(self, channel: Channel) -> None:
        """See `ChannelOwner`."""
        self._asking.gone(channel)
        self.orders.send_nowait(({"op": "orphaned"}, []))
        self.orphaned.set()

    def close(self) -> None:
        """Hang up, and have the worker hang up on the others."""
        if self._serving is not None:
            self._serving.close()
        self.channel.close()

    def _on_early_news(self, message: Message, sockets: list[socket.socket]) -> None:
        """When the worker is ready the parent says again what is wished."""
        match message["op"]:
            case "peer":
                self._peers.append((message, sockets))
            case "status":
                self.channel.send({"op": "answer", "n": message["n"]})
            case "steer":
                self.channel.send({"op": "answer", "n": message["n"], "left": 0 if message["relay"] is None else UNKNOWN})
