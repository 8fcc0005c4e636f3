"""Task: tells the other relays about placements, so that they count what no server has reported yet."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from fxrelay.cluster.inflight import Placement
from fxrelay.cluster.ports import PLACEMENTS, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import encode_placement
from fxtunnel.errors import TransporterError

logger = logging.getLogger(__name__)

QUEUE: Final = 1_024
GATHER_S: Final = 0.05
"""Pause after placements were told: what changes meanwhile goes out together, each placement as it is then."""


class PlacementNews:
    """What is told waits for `run`, which carries it to the others. Without `run` only this relay knows."""

    def __init__(self, transporter: Transporter, threads: Threads) -> None:
        self._transporter = transporter
        self._threads = threads
        self._news_in, self._news_out = trio.open_memory_channel[tuple[str, Placement]](QUEUE)

    def tell(self, event: str, placement: Placement) -> None:
        """What became of a placement. It is dropped while too much waits: then the servers' own updates tell."""
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            self._news_in.send_nowait((event, placement))

    async def run(self) -> None:
        """Tell the other relays about placements until cancelled. What they do not hear they learn from the servers' updates."""
        async for first in self._news_out:
            news = [first, *_waiting_in(self._news_out)]
            latest = {placement.placement_id: encode_placement(event, placement) for event, placement in news}
            try:
                await self._threads.run(partial(self._transporter.publish, PLACEMENTS, *latest.values()))
            except TransporterError as exc:
                logger.debug("%d placements were not told: %s", len(latest), exc)
            await trio.sleep(GATHER_S)


def _waiting_in(channel: trio.MemoryReceiveChannel[tuple[str, Placement]]) -> Iterator[tuple[str, Placement]]:
    with suppress(trio.WouldBlock):
        while True:
            yield channel.receive_nowait()
