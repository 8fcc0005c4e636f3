"""R10: an exception at every await of what decides about streams and requests of guarded services. Whoever it hits fails alone."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from admitting_rig import RULES, ScriptedOwner, add_guarded_relay, mint
from cluster_fakes import NoThreads
from delivery_rig import NOBODY, ScriptedChooser, Spec, serve_nodes
from peers import connect, receive_all
from plane import SERVICE, Contexts, open_plane
from sabotage import FAULTS, LIMIT, lines_about, sabotage
from web_rig import Canned, add_web_relay, ask, statuses

from fxrelay.admitting.memory import SharedMemory
from fxrelay.admitting.quotas import StreamLimits
from fxrelay.admitting.stream_admission import EntryRules, StreamAdmission
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.web.passes import Passes
from fxrelay.web.ports import WebRules
from fxtunnel.model import RelayId

LOCAL = "127.0.0.11"
LIMITS = StreamLimits(per_user=100, per_address=len(FAULTS))
"""An address that has given nothing back is kept out by this one."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / "cluster.db")
    yield made
    made.close()


def porter_with(store: SqliteStore) -> StreamAdmission:
    """One that asks an owner, and the store."""
    admission = StreamAdmission(SharedMemory(store, NoThreads()), RelayId("a"))
    admission.reconfigure({SERVICE: EntryRules(RULES, ScriptedOwner(), LIMITS)})
    return admission


def fresh_ticket() -> str:
    return mint(now=time.time())


async def into(answers: list[bytes], port: int) -> None:
    """What a client gets who says something and ends."""
    answer = b"reset"
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        async with await connect(port) as stream:
            await stream.send_all(b"x")
            await stream.send_eof()
            answer = await receive_all(stream)
    answers.append(answer)


@pytest.mark.parametrize("finds", ["the second node", "no node", "the only node"])
async def test_a_guarded_stream_fails_alone(contexts: Contexts, caplog: pytest.LogCaptureFixture, store: SqliteStore, finds: str) -> None:
    caplog.set_level(logging.ERROR)
    hits = 0
    async with open_plane(contexts) as plane:
        admission, nodes = porter_with(store), serve_nodes(plane, LOCAL)
        second = Spec("b", address=LOCAL if finds == "the second node" else NOBODY)
        chooser = None if finds == "the only node" else ScriptedChooser(Spec("a", is_local=True), second)
        host = LOCAL if finds == "the only node" else NOBODY
        relay = await add_guarded_relay(plane, admission, nodes.port, fresh_ticket, chooser=chooser, host=host)
        port = plane.add_door()
        expected = b"reset" if finds == "no node" else LOCAL.encode()
        for nth in range(1, LIMIT):
            answers: list[bytes] = []
            with sabotage(nth, "Placer._serve") as done, trio.fail_after(20):
                async with trio.open_nursery() as victims:
                    for _ in FAULTS:
                        victims.start_soon(into, answers, port)
            where = [tree.where for tree in done.hit]
            assert answers.count(expected) >= len(FAULTS) - len(done.hit), where
            await plane.quiet()
            assert relay.desk.placer is not None
            assert not relay.desk.placer.placings, where
            assert not len(admission.quotas), where
            if chooser is not None:
                await chooser.settled()
            assert all(len(lines_about(tree.fault, caplog)) == 1 for tree in done.hit), where
            caplog.clear()
            hits += len(done.hit)
            answers.clear()
            await into(answers, port)
            assert answers == [expected], where
            if not done.hit:
                break
    assert hits >= 3 * len(FAULTS)


async def test_a_guarded_request_fails_alone(contexts: Contexts, caplog: pytest.LogCaptureFixture, store: SqliteStore) -> None:
    caplog.set_level(logging.ERROR)
    hits = 0
    rules = WebRules(SERVICE, is_guarded=True, passes=Passes(SERVICE, 3_600, b"k" * 32), takes_bearers=True)
    async with open_plane(contexts) as plane:
        admission = porter_with(store)
        _, web = await add_web_relay(plane, await plane.serve(Canned()), rules)
        web.admission = admission
        port = plane.add_door()

        def request() -> bytes:
            return f"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {fresh_ticket()}\r\n\r\n".encode()

        for nth in range(1, LIMIT):
            with sabotage(nth, "WebDesk._serve") as done:
                async with trio.open_nursery() as victims:
                    for _ in FAULTS:
                        victims.start_soon(ask, port, request())
                await plane.quiet()
            where = [tree.where for tree in done.hit]
            hits += len(done.hit)
            assert not web.connections, where
            assert not len(admission.quotas), where
            assert all(len(lines_about(tree.fault, caplog)) <= 1 for tree in done.hit), where
            caplog.clear()
            assert statuses(await ask(port, request())) == [200], where
            if not done.hit:
                break
    assert hits >= 5 * len(FAULTS)
