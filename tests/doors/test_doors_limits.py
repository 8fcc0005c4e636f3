"""Who is turned away at the door, and that the counts go back to nothing."""

import errno
import ipaddress
import os
import socket
from dataclasses import replace

import pytest
import trio
from peers import LOOPBACK, connect, echo, exchange, hanging_port, receive_all, receive_exactly, refused, reset, until_reset
from plane import SERVICE, Contexts, open_plane

from fxgateway.doors import door, service_outages
from fxgateway.doors.client import Client
from fxgateway.routing.admission import AdmissionLimits
from fxgateway.routing.hosts import HostTable
from fxgateway.routing.preread_router import DoorKind, PrereadRouter
from fxtunnel.engine.reactor import STREAM_EVENTS, AnySocket, Handler
from fxtunnel.protocol.opening import Opening, encode_tags

EXEMPT = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        (AdmissionLimits(connections_per_door=3, exempt=EXEMPT), "door-full"),
        (AdmissionLimits(connections_per_source=3), "source-full"),
        (AdmissionLimits(open_burst_per_source=3, open_rate_per_source_per_s=0.5), "too-fast"),
    ],
)
async def test_a_client_above_a_limit_is_refused_and_counted(contexts: Contexts, limits: AdmissionLimits, verdict: str) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(limits)
        streams = [await connect(port) for _ in range(3)]
        for stream in streams:
            await stream.send_all(b"x")
            await receive_exactly(stream, 1)
        await refused(port)
        door = plane.doors[0]
        assert door.counters.refused == {verdict: 1}
        assert door.admission.connections == 3
        for stream in streams:
            await stream.aclose()
        await plane.quiet()
        if verdict != "too-fast":
            assert await exchange(port, b"x") == b"x"


async def test_a_service_without_a_relay_is_two_lines_however_many_come(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        port = plane.add_door()
        name = plane.doors[0].name
        for _ in range(3):
            await refused(port)
        lines = [record.getMessage() for record in caplog.records if record.name == service_outages.__name__]
        assert lines == [f"door {name}: no relay offers {SERVICE} now; its clients are turned away"]
        caplog.clear()
        await plane.add_relay(service)
        with trio.fail_after(10):
            while not caplog.records or "again" not in caplog.text:
                await trio.sleep(0.01)
        assert f"door {name}: {SERVICE} has a relay again; clients turned away meanwhile: 3" in caplog.text
        assert await exchange(port, b"x") == b"x"


async def test_a_door_that_has_paused_goes_on_where_the_kernel_has_no_room_for_more_registrations(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(AdmissionLimits(connections=1, exempt=EXEMPT))
        stream = await connect(port)
        await refused(port)
        register, failures = plane.reactor.register, [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))] * 2

        def fail(sock: AnySocket, handler: Handler, events: int = STREAM_EVENTS) -> None:
            if failures and handler is plane.doors[0]:
                raise failures.pop()
            register(sock, handler, events)

        monkeypatch.setattr(plane.reactor, "register", fail)
        await trio.sleep(2 * door.PAUSE_S)
        await stream.aclose()
        await plane.quiet()
        with trio.fail_after(5):
            assert await exchange(port, b"x") == b"x"


async def test_where_the_kernel_registers_no_client_the_door_pauses(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        register, failures = plane.reactor.register, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

        def fail(sock: AnySocket, handler: Handler, events: int = STREAM_EVENTS) -> None:
            if failures and isinstance(handler, Client):
                raise failures.pop()
            register(sock, handler, events)

        monkeypatch.setattr(plane.reactor, "register", fail)
        await refused(port)
        assert "pauses: No space left on device" in caplog.text
        assert "Traceback" not in caplog.text
        assert await exchange(port, b"x") == b"x"
        await plane.quiet()


async def test_full_gateway_pauses_and_goes_on(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PAUSE_S", 2.0)  # who comes before it is over, while the door is full, is not turned away
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(AdmissionLimits(connections=2, exempt=EXEMPT))
        streams = [await connect(port) for _ in range(2)]
        for stream in streams:
            await stream.send_all(b"x")
            await receive_exactly(stream, 1)
        await refused(port)
        async with await connect(port) as waiting:
            await waiting.send_all(b"w")
            with trio.move_on_after(0.1):
                assert not await waiting.receive_some(1)
            for stream in streams:
                await stream.aclose()
            with trio.fail_after(20):
                assert await receive_exactly(waiting, 1) == b"w"


async def test_reload_that_renames_a_door_keeps_the_counts_right(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        door = plane.doors[0]
        async with await connect(port) as stream:
            await stream.send_all(b"x")
            await receive_exactly(stream, 1)
            door.reconfigure(replace(door.config, name="renamed"))
        await plane.quiet()
        assert door.admission._doors == {}
        assert await exchange(port, b"x") == b"x"


async def test_a_door_that_is_renamed_keeps_to_its_limit(contexts: Contexts) -> None:
    """It is the same door: who came in by it before counts on, and who is still to say what he wants is given back where he was counted."""
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        preread_router = PrereadRouter(DoorKind.HTTP, HostTable(), SERVICE)
        port = plane.add_door(AdmissionLimits(connections_per_door=2, exempt=EXEMPT), preread_router=preread_router)
        door = plane.doors[0]
        async with await connect(port) as slow, await connect(port) as gone:
            for stream in (slow, gone):
                await stream.send_all(b"GET / HTTP/1.1\r\n")
            with trio.fail_after(5):
                while len(door.pending.clients) < 2:
                    await trio.sleep(0.01)
            door.reconfigure(replace(door.config, name="renamed"))
            async with await connect(port) as third:
                await third.send_all(b"GET / HTTP/1.1\r\n\r\n")
                assert (await receive_all(third)).startswith(b"HTTP/1.1 429 ")
            await gone.send_all(b"no head\r\n\r\n")
            assert (await receive_all(gone)).startswith(b"HTTP/1.1 400 ")
            await slow.send_all(b"Host: a\r\n\r\n")
            assert (await receive_exactly(slow, 5)) == b"GET /"
            assert door.admission._doors == {str(door.config.listen): 1}
        await plane.quiet()
        assert door.admission._doors == {}


async def test_closed_door_lets_its_clients_finish_and_then_rests(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        door = plane.doors[0]
        async with await connect(port) as stream:
            await stream.send_all(b"x")
            await receive_exactly(stream, 1)
            door.close()
            door.close()
            with pytest.raises(OSError, match=f"{port}"):
                await connect(port)
            await stream.send_all(b"y")
            assert await receive_exactly(stream, 1) == b"y"
        await plane.quiet()
        await trio.sleep(0.6)  # the last sweep is over
        armed = door._sweep
        await trio.sleep(0.6)  # another would be, if there were one
        assert door._sweep is armed


@pytest.mark.parametrize("pauses_first", [True, False])
async def test_a_door_that_pauses_may_wait_as_well(contexts: Contexts, pauses_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It takes clients when both are over, whichever ends first."""
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        door, deadline = plane.doors[0], plane.reactor.now + (0.1 if pauses_first else 0.6)
        if pauses_first:
            door._pause("the test")
        door.hold_until(lambda: False, deadline)
        if not pauses_first:
            door._pause("the test")
        assert door.is_waiting
        assert await exchange(port, b"x") == b"x"
        assert plane.reactor.now >= deadline
        with trio.fail_after(10):
            while door._paused or door.is_waiting:
                await trio.sleep(0.01)
        await trio.sleep(0.3)  # a pause that was forgotten would end now
        assert await exchange(port, b"y") == b"y"
    assert "timer failed" not in caplog.text


async def test_door_closed_while_it_pauses(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        plane.add_door()
        door = plane.doors[0]
        door._pause("the test")
        door._pause("the test")
        door.close()
        await trio.sleep(0.3)  # the pause would be over
        assert door._listener is None


async def test_door_that_is_emptied_tells_the_relay(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        stream = await connect(port)
        await stream.send_all(b"x")
        await receive_exactly(stream, 1)
        plane.doors[0].abort_all()
        assert await until_reset(stream) == b""
        await plane.quiet()
        assert not relay.desk.deliveries


async def test_idle_clients_end(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(idle_timeout_s=0.1)
        door = plane.doors[0]
        stream = await connect(port)
        await stream.send_all(b"x")
        await receive_exactly(stream, 1)
        door.end_idle()
        assert door.clients
        await trio.sleep(0.2)
        door.end_idle()
        assert await until_reset(stream) == b""
        assert door.counters.refused == {"idle-timeout": 1}


async def test_open_timeouts_keep_to_the_time_after_a_second_try(contexts: Contexts) -> None:
    """A client that is tried again enters the queue anew: those who came after it are not kept waiting behind it."""
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo), name="a", linked=False)
        port = plane.add_door(open_timeout_s=0.5)
        door = plane.doors[0]
        relay = plane.relays[0]
        await relay.link_up()
        assert relay.wire is not None
        relay.wire.silence()
        first, second = await connect(port), await connect(port)
        with trio.fail_after(10):
            while len(door.opening) < 2:
                await trio.sleep(0.01)
        earlier, later = list(door.opening)
        other = await plane.add_relay(await plane.serve(echo), name="b")
        assert other.wire is not None
        other.wire.silence()
        earlier.open_timed_out()
        assert list(door.opening) == [later, earlier]
        reset(first)
        reset(second)


async def test_a_client_passed_on_to_a_door_that_is_closed_has_its_time_all_the_same(contexts: Contexts) -> None:
    """As in a restart, whoever was still saying what he wants: the door of the process that has his relay may have been empty for long."""
    async with open_plane(contexts) as plane:
        with hanging_port() as nowhere:
            await plane.add_relay(nowhere)
            plane.add_door(open_timeout_s=0.5)
            (closed,) = plane.doors
            with socket.create_server((LOOPBACK, 0)) as other:
                stream = await connect(other.getsockname()[1])
                sock = other.accept()[0]
            sock.setblocking(False)
            closed.release()
            await trio.sleep(3 * door.SWEEP_S)
            client = Client(closed, sock, LOOPBACK, SERVICE, encode_tags(Opening(SERVICE)))
            closed.admission.admit(closed.listen_address, client.address, plane.reactor.now)
            closed.adopt(client)
            client.begin(client.peer())
            assert await until_reset(stream, 5) == b""
        assert closed.counters.refused == {"all-refused": 1}
