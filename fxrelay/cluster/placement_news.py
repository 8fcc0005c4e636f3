"""Task: tells the other relays about placements, so that they count what no server has reported yet."""

import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from fxrelay.cluster.inflight import Placement, PlacementId
from fxrelay.cluster.ports import PLACEMENTS, Transporter
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ENDED, encode_placement
from fxtunnel.errors import TransporterError

logger = logging.getLogger(__name__)

QUEUE: Final = 1_024
GATHER_S: Final = 0.05
"""Pause after placements were told: what changes meanwhile goes out together, each placement as it is then."""
AGAIN_S: Final = 1.0
"""Before ends of placements that could not be published are published again."""


class PlacementNews:
    """Queues news of placements for `run`, which publishes them. Without `run` only this relay knows of them."""

    def __init__(self, transporter: Transporter, threads: Threads) -> None:
        self._transporter = transporter
        self._threads = threads
        self._news_in, self._news_out = trio.open_memory_channel[tuple[str, Placement]](QUEUE)

    def tell(self, event: str, placement: Placement) -> None:
        """Queue what became of a placement. Dropped if the queue is full: the servers' own updates will tell."""
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            self._news_in.send_nowait((event, placement))

    async def run(self) -> None:
        """Tell the other relays about placements until cancelled. What they do not hear they learn from the servers' updates; but a server
        may make its next one when it has heard of an end, so ends are told again.
        """
        untold = dict[PlacementId, tuple[str, Placement]]()
        while True:
            latest = untold
            with trio.move_on_after(AGAIN_S if untold else math.inf):
                event, placement = await self._news_out.receive()
                latest[placement.placement_id] = event, placement
            latest |= {placement.placement_id: (event, placement) for event, placement in _waiting_in(self._news_out)}
            untold = {}
            try:
                told = [encode_placement(*each) for each in latest.values()]
                await self._threads.run(partial(self._transporter.publish, PLACEMENTS, *told))
            except TransporterError as exc:
                logger.debug("%d placements were not told: %s", len(latest), exc)
                untold = dict([each for each in latest.items() if each[1][0] == ENDED][-QUEUE:])
            await trio.sleep(GATHER_S)


def _waiting_in(channel: trio.MemoryReceiveChannel[tuple[str, Placement]]) -> Iterator[tuple[str, Placement]]:
    with suppress(trio.WouldBlock):
        while True:
            yield channel.receive_nowait()
