"""Task: the clients of a daemon's pages: how many there may be, who makes room for whom, and how long one may take over an answer."""

from typing import Final

import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

MAX_CONNECTIONS: Final = 64
"""Scrapers and commands need a few; more would take descriptors from the tunnels."""
ANSWER_S: Final = 60.0
"""For a client to take its answer. hypercorn waits for ever for one that does not read."""
LOOK_S: Final = 5.0
"""Between two looks at who has taken longer."""


class PageClient(TCPServer):
    """One connection, served by `run`. `scope` is what that is called in."""

    def __init__(
        self,
        clients: "PageClients",
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
        scope: trio.CancelScope,
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]  # takes both streams
        self._clients = clients
        self._socket = stream.socket
        self._scope = scope

    async def protocol_send(self, event: Event) -> None:
        """From hypercorn: bytes to send, or whether a request is open."""
        if isinstance(event, Updated):
            self._clients.note(self, is_idle=event.idle)
        await super().protocol_send(event)

    def hang_up(self) -> None:
        """Close the connection, whose descriptor is free at once. May be repeated."""
        # hypercorn shields what it sends; only closing the socket under it ends a send that nobody receives.
        self._socket.close()
        self._scope.cancel()


class PageClients:
    """Those who are connected, MAX_CONNECTIONS at most.

    When there is no room for a newcomer, one who has no request open makes it: who has had none for the longest time. So nobody is kept out
    by idle connections, however many there are, and no answer is cut off for a newcomer.
    """

    def __init__(self) -> None:
        self._idle: dict[PageClient, None] = {}
        self._asking: dict[PageClient, float] = {}

    def enter(self, client: PageClient) -> bool:
        """Whether there is room for it."""
        if len(self._idle) + len(self._asking) >= MAX_CONNECTIONS and not self.make_room():
            return False
        self._idle[client] = None
        return True

    def leave(self, client: PageClient) -> None:
        """It is gone, or was never let in."""
        self._idle.pop(client, None)
        self._asking.pop(client, None)

    def make_room(self) -> bool:
        """Hang up on one who has no request open; whether there was one."""
        client = next(iter(self._idle), None)
        if client is None:
            return False
        self.leave(client)
        client.hang_up()
        return True

    def note(self, client: PageClient, *, is_idle: bool) -> None:
        """A request of this client has come, or its last one is answered."""
        if client in self._idle and not is_idle:
            del self._idle[client]
            self._asking[client] = trio.current_time()
        elif client in self._asking and is_idle:
            del self._asking[client]
            self._idle[client] = None

    async def run(self) -> None:
        """Hang up on who takes more than ANSWER_S over an answer. Until cancelled, which hangs up on everybody."""
        try:
            while True:
                await trio.sleep(LOOK_S)
                overdue = trio.current_time() - ANSWER_S
                for client in [client for client, began in self._asking.items() if began <= overdue]:
                    client.hang_up()
        finally:
            for client in (*self._idle, *self._asking):
                client.hang_up()
