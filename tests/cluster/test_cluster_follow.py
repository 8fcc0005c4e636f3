"""Following the cluster: live messages, the store now and then, and what happens when either fails."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from cluster_fakes import FakeStore, FakeTransporter, NoThreads, Told, server_text

from fxrelay.cluster.follow import FETCH, FollowConfig, Follower
from fxrelay.cluster.members import Ages, Control, MemberState
from fxrelay.cluster.ports import CONTROLS, SERVERS, Message
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView, encode_control
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.model import RelayId

CONFIG = FollowConfig(resync_s=60.0, min_backoff_s=0.25, max_backoff_s=3.0)


class Cluster:
    def __init__(self) -> None:
        self.store = FakeStore()
        self.transporter = FakeTransporter()
        told = Told()
        self.view = ClusterView(Ages(30, 90), trio.current_time, told)
        self.follower = told.follower = Follower(self.store, self.transporter, self.view, NoThreads(), CONFIG)

    def seq(self, server_id: str = "a") -> int:
        member = self.view.members.get(RelayId(server_id), self.view.now)
        return member.server.seq if member is not None else 0

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.follower.run)
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
async def cluster(autojump_clock: trio.testing.MockClock) -> Cluster:
    return Cluster()


async def test_it_starts_with_everything_in_the_store(autojump_clock: object, cluster: Cluster) -> None:
    for number in range(FETCH * 2 + 3):
        cluster.store.put(SERVERS, f"n{number}", server_text(f"n{number}"))
    cluster.store.put(SERVERS, "broken", "{")
    cluster.store.put(CONTROLS, "n1", Control(True).encode())
    async with cluster.followed():
        assert len(cluster.view.members) == FETCH * 2 + 3
        assert cluster.view.health().synced
        member = cluster.view.members.get(RelayId("n1"), cluster.view.now)
        assert member is not None
        assert member.is_drained


async def test_messages_are_heard_between_readings(autojump_clock: object, cluster: Cluster) -> None:
    async with cluster.followed():
        await trio.sleep(1)
        assert cluster.view.health().live
        reads = cluster.store.reads
        for number in range(1, 41):
            cluster.transporter.publish(SERVERS, server_text(seq=number))
        cluster.transporter.publish("servers", "{")
        await trio.sleep(1)
        assert cluster.seq() == 40
        assert cluster.store.reads == reads
    assert all(subscription.is_closed for subscription in cluster.transporter.subscriptions)


async def test_what_was_missed_is_found_at_the_next_reading(autojump_clock: object, cluster: Cluster) -> None:
    async with cluster.followed():
        await trio.sleep(1)
        cluster.store.put(SERVERS, "a", server_text())
        await trio.sleep(50)
        assert cluster.seq() == 0
        await trio.sleep(11)
        assert cluster.seq() == 1


async def test_what_was_said_before_it_listened_is_read(autojump_clock: object, cluster: Cluster) -> None:
    async with cluster.followed():
        cluster.store.put(SERVERS, "a", server_text())  # after the first reading, before anything is heard
        await trio.sleep(1)
        assert cluster.seq() == 1


async def test_it_starts_and_goes_on_without_a_store(autojump_clock: object, cluster: Cluster) -> None:
    cluster.store.error = "no store"
    cluster.transporter.error = "no transporter"
    async with cluster.followed():
        await trio.sleep(20)
        health = cluster.view.health()
        assert (health.synced, health.live) == (False, False)
        assert health.store_down_s >= 20
        cluster.store.error = cluster.transporter.error = ""
        await trio.sleep(7)
        health = cluster.view.health()
        assert (health.synced, health.live, health.store_down_s) == (True, True, 0.0)


async def test_after_an_interruption_the_store_is_read_again(autojump_clock: object, cluster: Cluster) -> None:
    cluster.store.put(SERVERS, "a", server_text())
    async with cluster.followed():
        await trio.sleep(2)
        cluster.transporter.break_off("reset by peer")
        await trio.sleep(2)
        assert not cluster.view.health().live
        cluster.store.put(SERVERS, "a", server_text(seq=7))
        cluster.transporter.error = ""
        await trio.sleep(7)
        assert cluster.view.health().live
        assert cluster.seq() == 7
        cluster.transporter.publish(SERVERS, server_text(seq=8))
        await trio.sleep(1)
        assert cluster.seq() == 8
    assert all(subscription.is_closed for subscription in cluster.transporter.subscriptions)


async def test_nobody_becomes_stale_because_live_updates_are_down_for_long(autojump_clock: object, cluster: Cluster) -> None:
    async with cluster.followed():
        await trio.sleep(2)
        cluster.transporter.break_off("no one hears")
        reads = cluster.store.reads
        for number in range(1, 31):  # five minutes, in which the store answers as ever
            cluster.store.put(SERVERS, "a", server_text(seq=number))
            await trio.sleep(10)
            member = cluster.view.members.get(RelayId("a"), cluster.view.now)
            assert number == 1 or (member is not None and member.state is MemberState.UP)
        assert cluster.store.reads - reads < 60, "no more than its own updates write"
        cluster.transporter.error = ""
        await trio.sleep(10)
        assert cluster.view.health().live
        reads = cluster.store.reads
        await trio.sleep(170)
        assert cluster.store.reads - reads < 4


async def test_a_transporter_that_drops_everyone_at_once_does_not_make_the_store_be_read_all_the_time(
    autojump_clock: object, cluster: Cluster
) -> None:
    subscribe = cluster.transporter.subscribe

    def subscribe_in_vain(topics: tuple[str, ...]) -> object:
        subscription = subscribe(topics)
        subscription.error = "dropped: too slow"
        subscription.news.set()
        return subscription

    cluster.transporter.subscribe = subscribe_in_vain
    async with cluster.followed():
        await trio.sleep(60)
    assert len(cluster.transporter.subscriptions) < 100, "waits up to 3 s, on average 1.5 s"


async def test_a_control_heard_during_a_reading_is_not_undone_by_it(autojump_clock: object, cluster: Cluster) -> None:
    cluster.store.put(SERVERS, "a", server_text())
    async with cluster.followed():
        await trio.sleep(1)

        def drained_meanwhile(collection: str) -> None:
            if collection == CONTROLS:
                cluster.store.on_read = lambda _: None
                cluster.store.put(CONTROLS, "a", Control(True).encode())
                cluster.view.hear(message)

        message = Message(CONTROLS, encode_control("a", Control(True)))
        cluster.store.on_read = drained_meanwhile
        await trio.sleep(62)
        member = cluster.view.members.get(RelayId("a"), cluster.view.now)
        assert member is not None
        assert member.is_drained


async def test_a_server_deleted_from_the_store_is_forgotten_when_it_is_down(autojump_clock: object, cluster: Cluster) -> None:
    cluster.store.put(SERVERS, "a", server_text())
    async with cluster.followed():
        cluster.store.delete(SERVERS, "a")
        await trio.sleep(65)
        assert cluster.seq() == 1
        await trio.sleep(60)
        assert cluster.seq() == 0


async def test_the_first_failed_use_of_the_store_tells_that_it_is_away(autojump_clock: object, cluster: Cluster) -> None:
    async with cluster.followed():
        await trio.sleep(5)
        cluster.store.error = "away"
        await trio.sleep(5)
        assert cluster.view.health().store_down_s == 0, "nobody has used it"
        cluster.view.store_doubted()
        await trio.sleep(1)
        assert cluster.view.health().store_down_s == 1
        assert cluster.view.health().last_error == "away"
        cluster.store.error = ""
        await trio.sleep(CONFIG.max_backoff_s + 0.1)
        assert cluster.view.health().store_down_s == 0


async def test_a_subscription_that_breaks_has_the_store_asked_at_once(autojump_clock: object, cluster: Cluster) -> None:
    async with cluster.followed():
        await trio.sleep(5)
        cluster.store.error = "away"
        cluster.transporter.break_off("away too")
        await trio.sleep(1)
        assert cluster.view.health().store_down_s == 1


async def test_a_use_that_fails_because_of_what_is_in_the_store_takes_nobody_out(
    autojump_clock: object, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster.followed():
        await trio.sleep(5)
        reads = cluster.store.reads
        caplog.clear()
        for _ in range(5):
            cluster.view.store_doubted()
            await trio.sleep(0.3)
            assert cluster.view.health().store_down_s == 0
        assert (cluster.store.reads, caplog.records) == (reads, [])


async def test_a_store_that_hangs_counts_as_away_from_the_use_that_failed(autojump_clock: object) -> None:
    threads = NoThreads()
    cluster = Cluster()
    cluster.follower = Follower(cluster.store, cluster.transporter, cluster.view, threads, CONFIG)
    async with cluster.followed():
        await trio.sleep(5)
        threads.slow_s = 4.0
        cluster.store.error = "no answer"
        cluster.view.store_doubted()
        for second in range(1, 8):
            await trio.sleep(1)
            assert cluster.view.health().store_down_s == second


async def test_threads_tell_of_every_use_of_the_store_that_failed() -> None:
    failed: list[str] = []
    threads = Threads(lambda: failed.append("once"))

    def fails(error: Exception) -> None:
        raise error

    for error, count in ((StoreError("away"), 1), (TransporterError("away"), 1), (StoreError("away"), 2)):
        with pytest.raises(type(error)):
            await threads.run(partial(fails, error))
        assert len(failed) == count
    await threads.run(lambda: None)
    assert len(failed) == 2
