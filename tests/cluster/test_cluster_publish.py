"""Publishing this node's server object: when, with what, and what happens when it cannot be done."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
from cluster_fakes import FakeStore, FakeTransporter, NoThreads, Told, make_publisher, server_text

from fxrelay.cluster.inflight import Placement, PlacementId
from fxrelay.cluster.members import Ages
from fxrelay.cluster.ports import PLACEMENTS, SERVERS, Message
from fxrelay.cluster.publish import MAX_EARLY, Publisher
from fxrelay.cluster.view import ENDED, ClusterView, encode_placement
from fxtunnel.model import RelayId

ME = RelayId("me")


class Node:
    """A publisher that measures `facts`, which takes `measuring_s`."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.store.ahead_ms = 1_000_000
        self.transporter = FakeTransporter()
        self.told = Told()
        self.view = ClusterView(Ages(30, 90), trio.current_time, self.told)
        self.view.store_said(self.store.now_ms())
        self.facts: dict[str, Any] = {"hostname": "h", "sessions": 1}
        self.measuring_s = 0.0
        self.measured = 0
        self.publisher: Publisher = make_publisher(self.store, self.transporter, self.view, NoThreads(), self._measure)

    async def _measure(self) -> dict[str, Any]:
        self.measured += 1
        await trio.sleep(self.measuring_s)
        return self.facts

    @property
    def said(self) -> list[dict[str, Any]]:
        return [json.loads(text) for _, text in self.transporter.said]

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.publisher.run)
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
async def node(autojump_clock: trio.testing.MockClock) -> Node:
    return Node()


async def test_it_says_what_was_measured_and_who_it_is(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        (said,) = node.said
        began_ms = int(trio.current_time() * 1000) + 1_000_000
        assert said["serverId"] == "me"
        assert (said["hostname"], said["sessions"], said["seq"]) == ("h", 1, 1)
        assert said["agent"] == {"tunnels": [{"gatewayId": "gw"}], "version": "1.0", "instanceId": "i-me", "startedAt": said["measuredAt"]}
        assert abs(said["measuredAt"] - began_ms) <= 1
        document = node.store.get(SERVERS, "me")
        assert document is not None
        assert json.loads(document.text) == said
        member = node.view.members.get(ME, node.view.now)
        assert member is not None
        assert member.server.gateways == {"gw"}


async def test_it_publishes_every_period(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(50)
    assert [said["seq"] for said in node.said] == [1, 2, 3, 4, 5, 6]
    assert max(later - earlier for earlier, later in zip(node.transporter.at, node.transporter.at[1:], strict=False)) <= 10.3


async def test_who_makes_way_takes_its_successor_for_itself(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(1)
        node.publisher.hush()
        await trio.sleep(20)
        started_ms = node.view.now_ms
        await trio.sleep(15)
        assert (len(node.said), node.measured) == (1, 1)
        successor = server_text("me", instance="i-next", started=started_ms, measuredAt=node.view.now_ms)
        node.view.know(successor)
        member = node.view.members.get(ME, node.view.now)
        assert member is not None
        assert (member.server.instance, member.rivals) == ("i-next", ())


async def test_facts_cannot_change_who_it_is(autojump_clock: object, node: Node) -> None:
    node.facts = {"serverId": "other", "seq": 99, "agent": {"instanceId": "x"}}
    async with node.publishing():
        assert (node.said[0]["serverId"], node.said[0]["seq"], node.said[0]["agent"]["instanceId"]) == ("me", 1, "i-me")


async def test_a_change_is_told_at_once_but_many_are_told_together(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(5)
        for _ in range(100):
            node.publisher.changed()
            await trio.sleep(0.01)
        assert 4 <= len(node.said) <= 8


async def test_a_change_during_measuring_is_told_next(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(2)
        node.measuring_s = 1.0
        node.publisher.changed()
        await trio.sleep(0.5)
        node.publisher.changed()
        await trio.sleep(2.5)
        assert len(node.said) == 3, "not only after a whole period"


async def test_what_was_measured_is_as_old_as_the_beginning_of_the_measuring(autojump_clock: object, node: Node) -> None:
    node.measuring_s = 4.0
    began_ms = node.store.now_ms()
    async with node.publishing():
        assert node.store.now_ms() >= began_ms + 4_000
        assert node.said[0]["measuredAt"] == began_ms


async def test_leaving_is_said_at_once_and_does_not_wait_for_measuring(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(1)
        node.measuring_s = 5.0
        node.publisher.leave()
        await trio.sleep(0.1)
        assert len(node.said) == 2
        assert node.said[-1]["draining"] is True
        assert node.said[-1]["sessions"] == 1
        assert node.measured == 1
    assert node.said[-1]["draining"] is True


async def test_the_last_word_is_draining_and_keeps_what_was_measured(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        measured_ms = node.said[0]["measuredAt"]
        await trio.sleep(3)
    assert len(node.said) == 2
    assert (node.said[-1]["draining"], node.said[-1]["hostname"], node.said[-1]["measuredAt"]) == (True, "h", measured_ms)
    assert "ended" not in node.said[0]["agent"]
    assert node.said[-1]["agent"]["ended"] is True


async def test_a_store_that_is_away_does_not_keep_it_from_telling(autojump_clock: object, node: Node) -> None:
    node.store.error = "no store"
    async with node.publishing():
        assert len(node.said) == 1
        assert node.publisher.last_error == "no store"
        assert node.view.health().store_down_s == 0.0
        await trio.sleep(15)
        assert node.view.health().store_down_s == 15.0
        node.store.error = ""
        await trio.sleep(10)
        assert (node.publisher.published, node.publisher.last_error) == (1, "")
        assert node.view.health().store_down_s == 0.0


async def test_this_node_knows_itself_without_store_and_transporter(autojump_clock: object, node: Node) -> None:
    node.store.error = node.transporter.error = "away"
    async with node.publishing():
        member = node.view.members.get(ME, node.view.now)
        assert member is not None
        assert member.server.sessions == 1


@pytest.mark.parametrize(
    "fact", [{"sessions": -1}, {"staticData": {"x": float("nan")}}, {"staticData": {"x": "\ud800"}}, {"metrics": {"x": "y" * 70_000}}]
)
async def test_facts_that_others_would_refuse_are_not_published_and_the_log_says_so_once(
    autojump_clock: object, node: Node, fact: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    node.facts |= fact
    with caplog.at_level(logging.ERROR):
        async with node.publishing():
            await trio.sleep(35)
            assert node.said == []
            assert "own data" in node.publisher.last_error
            node.facts = {}
            await trio.sleep(10)
            assert len(node.said) == 1
    assert len(caplog.records) == 1


async def test_a_hanging_store_does_not_hold_up_the_end(autojump_clock: object, node: Node) -> None:
    threads = NoThreads()
    node.publisher = make_publisher(node.store, node.transporter, node.view, threads, node._measure)
    async with node.publishing():
        threads.slow_s = 1_000.0
        ended_at = trio.current_time()
    assert trio.current_time() - ended_at <= 2.1


async def test_a_twin_with_the_same_id_does_not_stop_it(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(1)
        node.view.hear(Message(SERVERS, server_text("me", instance="twin", started=9_000_000, measuredAt=9_000_001)))
        await trio.sleep(25)
    assert len(node.said) == 4


async def test_the_word_of_the_newer_twin_stays_in_the_store_until_it_falls_silent(autojump_clock: object, node: Node) -> None:
    def kept() -> str:
        document = node.store.get(SERVERS, "me")
        assert document is not None
        return str(json.loads(document.text)["agent"]["instanceId"])

    async with node.publishing():
        await trio.sleep(1)
        twin = server_text("me", instance="twin", started=9_000_000, measuredAt=9_000_001)
        node.view.hear(Message(SERVERS, twin))
        node.store.put(SERVERS, "me", twin)
        node.store.error = "no store"
        await trio.sleep(10)
        assert node.publisher.last_error == "no store"
        node.store.error = ""
        await trio.sleep(10)
        assert (kept(), node.publisher.last_error, node.view.health().store_down_s) == ("twin", "", 0.0)
        await trio.sleep(40)
        assert kept() == "i-me"


def sessions_told(node: Node) -> list[int]:
    return [said["sessions"] for said in node.said]


async def test_a_session_that_ends_is_told_within_a_second_and_many_are_told_together(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(3)
        node.facts = {"sessions": 0}
        for _ in range(50):
            node.publisher.session_ended()
        await trio.sleep(0.5)
        assert sessions_told(node) == [1, 0]
        node.facts = {"sessions": 7}
        node.publisher.session_ended()
        await trio.sleep(1)
        assert sessions_told(node) == [1, 0, 7]
        await trio.sleep(8)
        assert len(node.said) == 3, "the next regular one is a period later"


async def test_an_end_while_sessions_are_counted_is_told_next(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(3)
        node.measuring_s = 1.0
        node.publisher.changed()
        await trio.sleep(0.5)
        node.publisher.hear_end(ME, node.view.now_ms)
        await trio.sleep(4)
        assert len(node.said) == 3


async def test_where_sessions_end_all_the_time_the_store_is_written_to_no_more_often_than_else(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        for _ in range(10_000):
            node.publisher.session_ended()
            await trio.sleep(0.01)
        times = node.transporter.at
        assert min(later - earlier for earlier, later in pairwise(times)) >= 0.99
        assert len(times) <= 1 + MAX_EARLY + 10 + 1
        assert times[-1] >= 89


async def test_ends_that_no_update_counts_are_not_published(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        await trio.sleep(3)
        node.publisher.hear_end(RelayId("other"), 0)
        node.publisher.hear_end(ME, node.view.now_ms - 1_000)
        await trio.sleep(4)
        assert len(node.said) == 1
        node.view.hear(Message(PLACEMENTS, encode_placement(ENDED, Placement(PlacementId("p"), ME, node.view.now_ms - 9_000))))
        assert len(node.said) == 1
        node.told.publisher = node.publisher
        node.view.hear(Message(PLACEMENTS, encode_placement(ENDED, Placement(PlacementId("p"), ME, node.view.now_ms - 9_000))))
        await trio.sleep(1)
        assert len(node.said) == 2


async def test_who_comes_back_at_once_is_not_counted_twice_for_long(autojump_clock: object, node: Node) -> None:
    """The update that tells the end may already count the session that follows: then another one is soon measured late enough."""
    async with node.publishing():
        await trio.sleep(3)
        node.publisher.session_ended()
        await trio.sleep(0.1)
        node.view.in_flight.add(Placement(PlacementId("back"), ME, node.view.now_ms), node.view.now)
        await trio.sleep(0.4)
        assert (len(node.said), len(node.view.in_flight)) == (2, 1)
        await trio.sleep(1.5)
        assert (len(node.said), len(node.view.in_flight)) == (3, 0)
        await trio.sleep(5)
        assert len(node.said) == 3


async def test_an_end_that_may_have_been_missed_is_looked_for(autojump_clock: object, node: Node) -> None:
    async with node.publishing():
        node.told.publisher = node.publisher
        node.view.live_updates_heard()
        await trio.sleep(3)
        assert len(node.said) == 1
        node.view.live_updates_lost("too slow")
        node.view.live_updates_heard()
        await trio.sleep(1)
        assert len(node.said) == 2


async def test_an_update_that_fails_in_the_middle_is_made_again(
    autojump_clock: object, node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.publishing():
        await trio.sleep(3)
        node.facts = {"sessions": object()}  # what is no JSON is an error of ours
        node.publisher.session_ended()
        await trio.sleep(1)
        node.facts = {"sessions": 0}
        await trio.sleep(2)
        assert sessions_told(node) == [1, 0]
    assert "begins again" in caplog.text
