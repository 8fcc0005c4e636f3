"""A client gets another relay as long as it can have lost nothing, and RST after that."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from peers import Serve, connect, echo, exchange, hanging_port, pattern, receive_all, receive_exactly, refused, until_reset
from plane import SERVICE, Contexts, Plane, open_plane

from fxgateway.access_log import AccessLog
from fxgateway.doors import redispatch
from fxgateway.doors.web_client import WebClient, Words
from fxgateway.routing.failover import MAX_ATTEMPTS, FailoverState
from fxgateway.routing.hosts import HostTable
from fxgateway.routing.preread_router import STREAM_PATH, SWITCHING, DoorKind, PrereadRouter
from fxgateway.workers.client_transfer import pack, unpack
from fxrelay.delivery.delivery import DeliveryLimits
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.model import ServiceName
from fxtunnel.protocol.stream import Stream
from tests.ports import free_port

UPGRADE = b"Connection: Upgrade\r\nUpgrade: fx-stream\r\n\r\n"
SHORT_HOLD = SessionConfig(hold_s=1.0, heartbeat_s=0.1, dead_after_s=0.5)
"""As long as a busy machine needs for another relay to come."""


def collector(got: list[bytes]) -> Serve:
    """A service that takes everything and answers `ok`."""

    async def serve(stream: trio.SocketStream) -> None:
        got.append(await receive_all(stream))
        await stream.send_all(b"ok")

    return serve


async def test_next_relay_gets_the_early_bytes_exactly_once(contexts: Contexts) -> None:
    got: list[bytes] = []
    async with open_plane(contexts) as plane:
        await plane.add_relay(free_port(), name="a")
        await plane.add_relay(await plane.serve(collector(got)), name="b")
        port = plane.add_door()
        sizes = (0, 1, 4_095, 4_096, 4_097, 100_000)
        for size in sizes:
            async with await connect(port) as stream:
                await stream.send_all(pattern(size))
                await stream.send_eof()
                assert await receive_all(stream) == b"ok"
        assert got == [pattern(size) for size in sizes]
        assert plane.relays[0].desk.counters.refused_by_service[ServiceName("s")]["connect-failed"] > 0


async def test_a_client_that_all_relays_refuse_is_turned_away(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        for name in "abc":
            await plane.add_relay(free_port(), name=name)
        await refused(plane.add_door())
        assert plane.doors[0].counters.refused == {"all-refused": 1}


async def test_a_client_of_a_service_without_a_relay_is_turned_away(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await refused(plane.add_door())
        assert plane.doors[0].counters.refused == {"no-relay": 1}


async def test_a_client_is_turned_away_when_its_only_relay_does_not_know_the_service(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        relay.table.replace([])
        await refused(plane.add_door())
        assert plane.doors[0].counters.refused == {"all-refused": 1}


async def test_no_more_than_so_many_relays_are_tried(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nowhere = free_port()
        for number in range(MAX_ATTEMPTS + 2):
            await plane.add_relay(nowhere, name=f"n{number}")
        await refused(plane.add_door())
        assert plane.doors[0].counters.refused == {"too-many-attempts": 1}
        assert sum(relay.far_session.mux.opened for relay in plane.relays) == MAX_ATTEMPTS


async def test_connect_timeout_fails_over_and_delivers_once(contexts: Contexts) -> None:
    got: list[bytes] = []
    async with open_plane(contexts) as plane:
        with hanging_port() as nowhere:
            await plane.add_relay(nowhere, name="a", limits=DeliveryLimits(connect_timeout_s=0.2))
            await plane.add_relay(await plane.serve(collector(got)), name="b")
            async with await connect(plane.add_door()) as stream:
                await stream.send_all(b"early")
                await stream.send_eof()
                assert await receive_all(stream) == b"ok"
        assert got == [b"early"]


async def test_open_timeout_fails_over(contexts: Contexts) -> None:
    got: list[bytes] = []
    async with open_plane(contexts) as plane:
        with hanging_port() as nowhere:
            await plane.add_relay(nowhere, name="a")
            await plane.add_relay(await plane.serve(collector(got)), name="b")
            port = plane.add_door(open_timeout_s=0.5)
            async with await connect(port) as stream:
                await stream.send_all(b"early")
                await stream.send_eof()
                with trio.fail_after(4):
                    assert await receive_all(stream) == b"ok"
        assert got == [b"early"]


async def test_bytes_of_an_opening_that_was_given_up_are_not_delivered_late(contexts: Contexts) -> None:
    """The opener is gone before the service answers: what it had sent belongs to another service by then."""
    async with open_plane(contexts) as plane:
        with hanging_port() as nowhere:
            relay = await plane.add_relay(nowhere)
            port = plane.add_door()
            stream = await connect(port)
            await stream.send_all(b"early")
            with trio.fail_after(10):
                while not any(delivery._pending for delivery in relay.desk.deliveries):
                    await trio.sleep(0.01)
            (client,) = plane.doors[0].clients
            client.fail(Code.CANCELLED)
            with trio.fail_after(4):  # less than the connect timeout, which would end it in any case
                while relay.desk.deliveries:
                    await trio.sleep(0.01)
            await stream.aclose()


async def silent_relay(plane: Plane, name: str) -> None:
    """A relay whose link swallows everything."""
    relay = await plane.add_relay(await plane.serve(echo), name=name)
    relay.redials = False
    assert relay.wire is not None
    relay.wire.silence()


async def test_relay_lost_before_it_accepted(contexts: Contexts) -> None:
    """Nobody knows what it has done with what clients had sent: another relay gets that only where it may act on it twice."""
    got: list[bytes] = []
    async with open_plane(contexts, SHORT_HOLD) as plane:
        await silent_relay(plane, "a")
        port = plane.add_door()
        said = [b"SSH-2.0-early\r\n", b"GET / HTTP/1.0\r\n\r\n", b"POST / HTTP/1.0\r\n\r\n", b"early", b""]
        streams = [await connect(port) for _ in said]
        for stream, words in zip(streams, said, strict=True):
            await stream.send_all(words)
            if words:
                await stream.send_eof()
        await trio.sleep(0.02)
        await plane.add_relay(await plane.serve(collector(got)), name="b")
        await streams[-1].send_eof()
        for stream, is_served in zip(streams, [True, True, False, False, True], strict=True):
            if is_served:
                with trio.fail_after(4):
                    assert await receive_all(stream) == b"ok"
                await stream.aclose()
            else:
                assert await until_reset(stream, 4) == b""
        assert sorted(got) == [b"", *sorted(said[:2])]
        assert plane.doors[0].counters.refused == {"unanswered": 2}


async def test_an_accept_that_crosses_the_timeout_has_been_acted_upon(contexts: Contexts) -> None:
    """The gateway takes the opening back, and hears first that it was accepted: no other relay gets what the client had sent."""
    got: list[bytes] = []
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(collector(got)), name="a")
        port = plane.add_door()
        accept = Stream.accept
        held: list[Stream] = []
        with pytest.MonkeyPatch.context() as late:
            late.setattr(Stream, "accept", lambda stream: held.append(stream))
            async with await connect(port) as stream:
                await stream.send_all(b"early")
                with trio.fail_after(10):
                    while not held:
                        await trio.sleep(0.005)
                await plane.add_relay(await plane.serve(collector(got)), name="b")
                (client,) = plane.doors[0].clients
                assert client.stream is not None
                accept(held[0])
                client.open_timed_out()
                assert plane.doors[0].taken_back
                assert await until_reset(stream, 4) == b""
        with trio.fail_after(4):
            while first.desk.deliveries:
                await trio.sleep(0.01)
        assert not plane.doors[0].taken_back
        assert not first.far_session.mux.streams
        assert plane.relays[1].far_session.mux.opened == 0
        assert plane.doors[0].counters.refused == {"unanswered": 1}


async def test_a_relay_that_confirms_nothing_ends_the_client(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redispatch, "CONFIRM_S", 0.1)
    async with open_plane(contexts) as plane:
        await silent_relay(plane, "a")
        port = plane.add_door(open_timeout_s=0.2)
        async with await connect(port) as stream:
            await stream.send_all(b"early")
            await plane.add_relay(await plane.serve(echo), name="b")
            assert await until_reset(stream, 4) == b""
        assert not plane.doors[0].taken_back
        assert not plane.relays[0].far_session.mux.streams
        assert plane.relays[1].far_session.mux.opened == 0


async def test_client_that_speaks_while_its_relay_is_held_is_heard_by_the_next(contexts: Contexts) -> None:
    """Its socket waits for a turn of the old session when that one ends: the turn must be asked for anew."""
    async with open_plane(contexts, SHORT_HOLD) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        first.redials = False
        port = plane.add_door()
        assert first.wire is not None
        first.wire.cut()
        with trio.fail_after(10):
            while first.far_session.is_up:
                await trio.sleep(0.005)
        async with await connect(port) as stream:
            await stream.send_all(b"x" * 100)
            await trio.sleep(0.02)
            await plane.add_relay(await plane.serve(echo), name="b")
            with trio.fail_after(4):
                assert await receive_exactly(stream, 100) == b"x" * 100


async def test_turn_with_the_old_session_is_not_taken_on_behalf_of_the_new_one(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        first.redials = False
        port = plane.add_door(open_timeout_s=1.0)
        assert first.wire is not None
        first.wire.cut()
        with trio.fail_after(10):
            while first.far_session.is_up:
                await trio.sleep(0.005)
        async with await connect(port) as stream:
            await stream.send_all(b"x" * 100)
            await trio.sleep(0.02)
            assert first.far_session._scheduler.waiting
            await plane.add_relay(await plane.serve(echo), name="b")
            with trio.fail_after(4):
                assert await receive_exactly(stream, 100) == b"x" * 100
            assert not first.far_session._scheduler.waiting
            first.redials = True


@pytest.mark.parametrize("sent", [b"", b"x"])
async def test_relay_lost_after_it_accepted(contexts: Contexts, sent: bytes) -> None:
    """Untouched streams move over; others end in RST."""
    async with open_plane(contexts, SHORT_HOLD) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        port = plane.add_door()
        stream = await connect(port)
        await stream.send_all(sent)
        assert await receive_exactly(stream, len(sent)) == sent
        await trio.sleep(0.05)
        await plane.add_relay(await plane.serve(echo), name="b")
        first.redials = False
        assert first.wire is not None
        first.wire.cut()
        if sent:
            assert await until_reset(stream, 5) == b""
        else:
            with trio.fail_after(10):
                while first.far_session.state is not State.CLOSED:
                    await trio.sleep(0.01)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
        await stream.aclose()


async def test_who_has_been_greeted_is_told_nothing_in_http_any_more(contexts: Contexts) -> None:
    """It speaks another protocol since its 101, also on its next relay's stream, which is refused."""
    async with open_plane(contexts, SHORT_HOLD) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        preread_router = PrereadRouter(DoorKind.HTTP, HostTable(), None, streams=frozenset({SERVICE}))
        port = plane.add_door(preread_router=preread_router)
        stream = await connect(port)
        await stream.send_all(f"GET {STREAM_PATH}{SERVICE} HTTP/1.1\r\nHost: a\r\n".encode() + UPGRADE)
        assert await receive_exactly(stream, len(SWITCHING)) == SWITCHING
        (client,) = plane.doors[0].clients
        packed = json.loads(json.dumps(pack(client, b"", "192.0.2.1:1")))
        near, far = socket.socketpair()
        with near, far:
            moved, _ = unpack(plane.doors[0], near, packed)
            assert isinstance(moved, WebClient)
            assert moved.failover == client.failover == FailoverState((first.id,), attempts=1)
            assert moved.words == Words(b"", b"", b"", is_greeted=True)
        second = await plane.add_relay(free_port(), name="b")
        first.far_session.close(Code.SHUTDOWN)
        assert await until_reset(stream, 5) == b""
        assert second.far_session.mux.opened == 1
        await stream.aclose()


async def test_who_came_before_there_was_an_access_log_moves_without_a_diary(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(b"x")
            assert await receive_exactly(stream, 1) == b"x"
            door = plane.doors[0]
            door.reconfigure(replace(door.config, access=AccessLog()))
            (client,) = door.clients
            assert pack(client, b"", "")["diary"] is None


async def test_stream_whose_service_has_ended_is_not_begun_again(contexts: Contexts) -> None:
    """Not a byte moved, but the client has seen an end of file: that cannot be taken back."""
    ended = trio.Event()

    async def ends(stream: trio.SocketStream) -> None:
        await stream.send_eof()
        ended.set()
        await trio.sleep_forever()

    async with open_plane(contexts, SHORT_HOLD) as plane:
        first = await plane.add_relay(await plane.serve(ends), name="a")
        port = plane.add_door()
        stream = await connect(port)
        assert await stream.receive_some() == b""
        second = await plane.add_relay(await plane.serve(echo), name="b")
        first.far_session.close(Code.SHUTDOWN)
        await plane.quiet(4.0)
        assert second.far_session.mux.opened == 0
        await stream.aclose()


async def test_a_redirect_leads_to_the_relay_that_it_names_with_the_early_bytes(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        second = await plane.add_relay(await plane.serve(echo), name="b")
        third = await plane.add_relay(await plane.serve(echo), name="c")
        monkeypatch.setattr(first.desk, "_deliver", lambda session, stream, *_: stream.redirect("c"))
        port = plane.add_door()
        async with await connect(port) as stream:
            await stream.send_all(b"early")
            assert await receive_exactly(stream, 5) == b"early"
        assert second.far_session.mux.opened == 0
        assert third.far_session.mux.opened == 1


async def test_redirect_to_nobody_goes_on_by_the_routes(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        await plane.add_relay(await plane.serve(echo), name="b")
        monkeypatch.setattr(first.desk, "_deliver", lambda session, stream, *_: stream.redirect("nobody"))
        assert await exchange(plane.add_door(), b"x") == b"x"


async def test_relays_that_redirect_in_circles(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_plane(contexts) as plane:
        for name, other in (("a", "b"), ("b", "a")):
            relay = await plane.add_relay(await plane.serve(echo), name=name)
            monkeypatch.setattr(relay.desk, "_deliver", lambda session, stream, *_, other=other: stream.redirect(other))
        await refused(plane.add_door())
        assert plane.doors[0].counters.refused == {"all-refused": 1}
        # Each is asked, its redirect is followed once, and it is asked once more for another way.
        assert sum(relay.far_session.mux.opened for relay in plane.relays) == 6


async def test_drained_relay_is_passed_over(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        second = await plane.add_relay(await plane.serve(echo), name="b")
        first.desk.is_draining = True
        assert await exchange(plane.add_door(), b"x") == b"x"
        plane.registry.mark_draining(second.id, second.instance)
        await refused(plane.add_door())


async def test_service_with_several_addresses(contexts: Contexts, tmp_path: Path) -> None:
    async with open_plane(contexts) as plane:
        working = await plane.serve(echo)
        # Refused at once, refused after a while, and one that works.
        await plane.add_relay(free_port(), str(tmp_path / "nobody"), free_port(), str(tmp_path / "nobody either"), working)
        port = plane.add_door()
        assert await exchange(port, pattern(10_000)) == pattern(10_000)
        plane.relays[0].serves(free_port(), str(tmp_path / "nobody"))
        await refused(port)
        await plane.quiet()
