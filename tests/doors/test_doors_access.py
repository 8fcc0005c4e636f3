"""What the access log says of clients whose relay was not the first, or did not serve them: the relay that was asked last."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from peers import connect, echo, exchange, refused, until_reset
from plane import Contexts, Plane, open_plane

from fxgateway.access_log import AccessLog
from fxgateway.routing.failover import FailoverState
from fxgateway.workers.client_transfer import pack, unpack
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.errors import ConfigError
from fxtunnel.model import RelayId
from tests.ports import free_port

SHORT_HOLD = SessionConfig(hold_s=0.2, heartbeat_s=0.1, dead_after_s=5.0)


class Sink:
    """An access log that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def put(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    @property
    def told(self) -> tuple[str, str]:
        """Relay and end of the one client."""
        (record,) = self.records
        return record["relay"], record["end"]


async def test_the_relay_that_serves_after_another_has_refused(contexts: Contexts) -> None:
    sink = Sink()
    async with open_plane(contexts) as plane:
        await plane.add_relay(free_port(), name="a")
        await plane.add_relay(await plane.serve(echo), name="b")
        assert await exchange(plane.add_door(access=sink), b"x") == b"x"  # as much of an access log as is used
        await plane.quiet()
    assert sink.told == ("b", "closed")


async def test_the_target_of_a_redirect_that_refused_after_the_other_one_went(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Sink()
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        second = await plane.add_relay(await plane.serve(echo), name="b")
        plane.registry.offers.remove(second.id)

        def go(session, stream, *_):
            first.far_session.close(Code.SHUTDOWN)
            stream.refuse(Code.CONNECT_FAILED, "no")

        monkeypatch.setattr(first.desk, "_deliver", lambda session, stream, *_: stream.redirect("b"))
        monkeypatch.setattr(second.desk, "_deliver", go)
        await refused(plane.add_door(access=sink))  # as much of an access log as is used
        await plane.quiet()
    assert sink.told == ("b", "gateway: all-refused")


async def test_a_relay_whose_link_was_lost_and_whom_nobody_replaces(contexts: Contexts) -> None:
    sink = Sink()
    async with open_plane(contexts, SHORT_HOLD) as plane:
        await plane.add_relay(free_port(), name="a")
        second = await plane.add_relay(await plane.serve(echo), name="b")
        second.redials = False
        async with await connect(plane.add_door(access=sink)) as stream:  # as much of an access log as is used
            await accepted(plane)
            assert second.wire is not None
            second.wire.cut()
            assert await until_reset(stream, 10) == b""
        await plane.quiet()
    assert sink.told == ("b", "gateway: all-refused")


async def test_a_relay_that_left_before_another_process_could_ask_it(contexts: Contexts) -> None:
    sink = Sink()
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        async with await connect(plane.add_door(access=sink)) as stream:  # as much of an access log as is used
            await accepted(plane)
            (door,) = plane.doors
            (client,) = door.clients
            client.failover = FailoverState((first.id, RelayId("far")), attempts=1, hops=1, asks_again=True)
            message = json.loads(json.dumps(pack(client, b"", "")))
            sock = client.give_away()
            first.far_session.close(Code.SHUTDOWN)
            door.admission.admit(door.listen_address, client.address, plane.reactor.now)
            moved, early = unpack(door, sock, message)
            door.clients.add(moved)
            moved.begin(moved.peer(), early)
            assert await until_reset(stream, 5) == b""
        await plane.quiet()
    assert sink.told == ("a", "gateway: all-refused")


async def accepted(plane: Plane) -> None:
    """The one client has a relay, and nothing has been sent."""
    with trio.fail_after(10):
        while not all(client.stream is not None and client.stream.accepted for door in plane.doors for client in door.clients):
            await trio.sleep(0.01)


def test_a_log_for_which_no_thread_could_be_started_is_begun_by_the_next_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    log, path = AccessLog(), tmp_path / "access.log"
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(ConfigError, match="can't start new thread"):
            log.open(str(path))
    log.open(str(path))
    log.put({"door": "d"})
    log.close()
    assert json.loads(path.read_text())["door"] == "d"
