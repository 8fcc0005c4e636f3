"""A WebSocket server that sends back each message, in a thread."""

import contextlib
import threading
from functools import partial
from typing import Final

import trio
import trio_websocket

from tests.ports import free_port

MAX_MESSAGE_BYTES: Final = 32 << 20


class WebSocketEcho:
    """From its making until `close`; turns down a handshake at /no with 403."""

    def __init__(self) -> None:
        self.port = free_port()
        self._token: trio.lowlevel.TrioToken | None = None
        self._ready = threading.Event()
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(10)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                serve = partial(trio_websocket.serve_websocket, max_message_size=MAX_MESSAGE_BYTES)
                await nursery.start(serve, self._serve, "127.0.0.1", self.port, None)
                self._ready.set()

    async def _serve(self, request: trio_websocket.WebSocketRequest) -> None:
        if request.path == "/no":
            await request.reject(403, body=b"no\n")
            return
        link = await request.accept()
        with contextlib.suppress(trio_websocket.ConnectionClosed):
            while True:
                await link.send_message(await link.get_message())
