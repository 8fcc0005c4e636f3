"""R10: an exception at every await of what a relay does for its cluster, and for one stream of a pool."""

import contextlib
import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
from cluster_fakes import FakeStore, FakeTransporter, NoThreads, Told, make_publisher, server_text
from delivery_rig import ScriptedChooser, Spec, add_pool_relay, serve_nodes
from peers import connect, receive_all
from plane import Contexts, open_plane
from sabotage import FAULTS, LIMIT, Fault, lines_about, sabotage

from fxrelay.cluster.follow import FollowConfig, Follower
from fxrelay.cluster.members import Ages
from fxrelay.cluster.ports import SERVERS
from fxrelay.cluster.view import ClusterView
from fxtunnel.model import RelayId

each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault()).__name__)
LOCAL = "127.0.0.11"


@each_fault
async def test_publishing_and_following_go_on(autojump_clock: object, caplog: pytest.LogCaptureFixture, fault: Fault) -> None:
    caplog.set_level(logging.WARNING)
    hits = 0
    for nth in range(1, 40):
        store, transporter, told = FakeStore(), FakeTransporter(), Told()
        view = ClusterView(Ages(30, 90), trio.current_time, told)
        for number in range(40):
            store.put(SERVERS, f"n{number}", server_text(f"n{number}"))

        async def measure() -> dict[str, object]:
            await trio.sleep(0.1)
            return {"hostname": "h"}

        publisher = make_publisher(store, transporter, view, NoThreads(), measure, publish_s=3)
        follower = told.follower = Follower(store, transporter, view, NoThreads(), FollowConfig(resync_s=2))
        with sabotage(nth, "keep_going", faults=[fault]) as done:
            async with trio.open_nursery() as nursery:
                await nursery.start(follower.run)
                await nursery.start(publisher.run)
                await trio.sleep(8)
                published, reads = publisher.published, store.reads
                await trio.sleep(14)
                assert publisher.published >= published + 2, [tree.where for tree in done.hit]
                assert store.reads >= reads + 2, [tree.where for tree in done.hit]
                transporter.publish(SERVERS, server_text("late", measuredAt=store.now_ms()))
                await trio.sleep(0.5)
                assert view.members.get(RelayId("late"), view.now) is not None
                assert len(transporter.subscriptions) - sum(s.is_closed for s in transporter.subscriptions) == 1
                nursery.cancel_scope.cancel()
        hits += len(done.hit)
        for tree in done.hit:
            (line,) = lines_about(tree.fault, caplog)
            assert "begins again" in line.getMessage()
        caplog.clear()
    assert hits > 90


async def test_a_stream_of_a_pool_fails_alone(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hits = 0
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, LOCAL)
        chooser = ScriptedChooser(Spec("a", is_local=True))
        relay = await add_pool_relay(plane, "a", chooser, nodes.port, host=LOCAL)
        port = plane.add_door()

        async def visit() -> bytes:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await connect(port) as stream:
                    await stream.send_all(b"x")
                    await stream.send_eof()
                    return await receive_all(stream)
            return b"reset"

        for nth in range(1, LIMIT):
            answers: list[bytes] = []
            with sabotage(nth, "Placer._serve") as done:
                async with trio.open_nursery() as nursery:
                    for _ in FAULTS:
                        nursery.start_soon(lambda answers=answers: into(answers, visit))
            assert len(answers) == len(FAULTS)
            assert answers.count(b"reset") <= len(done.hit)
            await plane.quiet()
            await chooser.settled()
            assert relay.desk.placer is not None
            assert not relay.desk.placer.placings
            assert all(len(lines_about(tree.fault, caplog)) == 1 for tree in done.hit)
            caplog.clear()
            hits += len(done.hit)
            assert await visit() == LOCAL.encode()
            if not done.hit:
                break
    assert hits >= 2 * len(FAULTS)


async def into(answers: list[bytes], visit: Callable[[], Awaitable[bytes]]) -> None:
    answers.append(await visit())
