"""What relays tell each other of placements, while that cannot be told."""

from typing import Any

import trio
from cluster_fakes import FakeTransporter, NoThreads

from fxrelay.cluster.inflight import Placement, PlacementId
from fxrelay.cluster.placement_news import QUEUE, PlacementNews
from fxrelay.cluster.ports import PLACEMENTS
from fxrelay.cluster.view import ENDED, PLACED, encode_placement
from fxtunnel.model import RelayId


def placement(name: str) -> Placement:
    return Placement(PlacementId(name), RelayId("node"), 1_000)


async def test_ends_that_could_not_be_told_are_told_later(autojump_clock: Any) -> None:
    transporter = FakeTransporter()
    news = PlacementNews(transporter, NoThreads())  # as much of it as is used
    async with trio.open_nursery() as nursery:
        nursery.start_soon(news.run)
        transporter.error = "locked"
        news.tell(PLACED, placement("p"))
        news.tell(ENDED, placement("e"))
        await trio.sleep(3)
        news.tell(ENDED, placement("f"))
        await trio.sleep(3)
        assert transporter.said == []
        transporter.error = ""
        await trio.sleep(2)
        assert transporter.said == [(PLACEMENTS, encode_placement(ENDED, placement(name))) for name in "ef"]
        news.tell(PLACED, placement("g"))
        await trio.sleep(5)
        assert transporter.said[2:] == [(PLACEMENTS, encode_placement(PLACED, placement("g")))]
        nursery.cancel_scope.cancel()


async def test_ends_that_cannot_be_told_are_so_many_at_most(autojump_clock: Any) -> None:
    transporter = FakeTransporter()
    news = PlacementNews(transporter, NoThreads())  # as above
    transporter.error = "away"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(news.run)
        for number in range(3 * QUEUE):
            news.tell(ENDED, placement(f"p{number}"))
            await trio.sleep(0.01)
        transporter.error = ""
        await trio.sleep(2)
        assert len(transporter.said) < QUEUE * 1.1
        assert transporter.said[-1] == (PLACEMENTS, encode_placement(ENDED, placement(f"p{3 * QUEUE - 1}")))
        nursery.cancel_scope.cancel()
