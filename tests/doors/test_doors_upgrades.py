"""Two instances of a relay: the one that makes way and its successor; and doors that wait for their relays."""

import pytest
import trio
from peers import connect, echo, exchange, receive_exactly, refused, until_reset
from plane import OPEN_LIMITS, Contexts, ControlLink, open_plane

from fxgateway.doors.door import DoorConfig
from fxgateway.doors.doors import Doors
from fxgateway.routing.admission import Admission
from fxgateway.routing.offers import Readiness
from fxgateway.tunnels import registry as registry_module
from fxgateway.tunnels.live_relay import NO_INSTANCE
from fxgateway.tunnels.ports import Departure
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.kit.settings import Address
from fxtunnel.model import InstanceId, ServiceName
from tests.ports import free_port

SERVICE = ServiceName("s")
MAKES_WAY = Departure(60.0, hands_over=True)


async def say(stream: trio.SocketStream) -> None:
    await stream.send_all(b"x")
    assert await receive_exactly(stream, 1) == b"x"


async def test_who_makes_way_serves_until_its_successor_does_and_keeps_its_streams(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        old = await plane.add_relay(service)
        port = plane.add_door()
        async with await connect(port) as kept:
            await say(kept)
            plane.registry.mark_draining(old.id, old.instance, MAKES_WAY)
            assert await exchange(port, b"alone") == b"alone"
            new = await plane.add_relay(service, linked=False, run=2)
            assert old.control.closed == []
            assert await exchange(port, b"not yet") == b"not yet"
            assert old.control.relieved == 0
            await new.link_up()
            assert old.control.relieved == 1
            opened = old.far_session.mux.opened
            assert await exchange(port, b"there") == b"there"
            assert (old.far_session.mux.opened, new.far_session.mux.opened) == (opened, 1)
            await say(kept)
            assert [relay.instance for relay in plane.registry.leaving(old.id)] == [old.instance]
        await plane.quiet()
        old.session.close(Code.SHUTDOWN)
        plane.registry.leave(old.id, old.control)
        with trio.fail_after(10):
            while plane.registry.leaving(old.id):
                await trio.sleep(0.01)
        assert await exchange(port, b"y") == b"y"


async def test_who_has_yielded_to_another_process_serves_until_that_one_does(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        old = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with await connect(port) as kept:
            await say(kept)
            plane.registry.relieve(old.id)
            assert await exchange(port, b"it has not yielded") == b"it has not yielded"
            plane.registry.mark_draining(old.id, old.instance, MAKES_WAY)
            plane.registry.yield_name(old.id, old.instance, 2, InstanceId("successor"))
            assert await exchange(port, b"not yet") == b"not yet"
            assert old.control.relieved == 0
            plane.registry.relieve(old.id)
            assert (old.control.relieved, old.control.closed) == (1, [])
            await refused(port)
            await say(kept)
            assert [relay.instance for relay in plane.registry.leaving(old.id)] == [old.instance]
            assert plane.registry.relays() == ()


async def test_who_drains_steps_aside_at_once_for_a_successor_at_another_process(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        old = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with await connect(port) as kept:
            await say(kept)
            plane.registry.mark_draining(old.id, old.instance, Departure(60.0))
            plane.registry.yield_name(old.id, old.instance, 2, InstanceId("successor"))
            assert (old.control.relieved, old.control.closed) == (0, [])
            await say(kept)
            assert [relay.instance for relay in plane.registry.leaving(old.id)] == [old.instance]


@pytest.mark.parametrize(("departure", "successor", "code"), [(None, "b-1", Code.FENCED), (MAKES_WAY, "a-1", Code.LINK_LOST)])
async def test_who_does_not_go_away_or_is_elsewhere_itself_loses_its_streams(
    contexts: Contexts, departure: Departure | None, successor: str, code: Code
) -> None:
    async with open_plane(contexts) as plane:
        old = await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as kept:
            await say(kept)
            if departure is not None:
                plane.registry.mark_draining(old.id, old.instance, departure)
            plane.registry.yield_name(old.id, old.instance, 2, InstanceId(successor))
            await until_reset(kept)
            assert old.control.closed == [code]
            assert [relay.instance for relay in plane.registry.relays()] == ([NO_INSTANCE] if code is Code.FENCED else [])
            assert plane.registry.leaving(old.id) == ()


@pytest.mark.parametrize("comes", ["here", "elsewhere", "never"])
async def test_who_waits_for_a_dead_one_waits_on_when_its_name_is_at_another_process(contexts: Contexts, comes: str) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=2.0 if comes == "never" else 25.0, heartbeat_s=0.1, dead_after_s=0.5)) as plane:
        service = await plane.serve(echo)
        old = await plane.add_relay(service)
        old.redials = False
        assert old.wire is not None
        old.wire.cut()
        with trio.fail_after(10):
            while old.far_session.is_up:
                await trio.sleep(0.005)
        port = plane.add_door(open_timeout_s=25.0)
        async with await connect(port) as before, await connect(port) as later:
            await before.send_all(b"early")
            plane.registry.yield_name(old.id, old.instance, 2, InstanceId("successor"))
            assert old.control.closed == [Code.FENCED]
            assert plane.registry.new_session(old.id, old.instance) is None
            await later.send_all(b"later")
            with trio.fail_after(10):
                while sum(client.waits_for_link for client in plane.doors[0].opening) < 2:
                    await trio.sleep(0.005)
            if comes == "here":
                await plane.add_relay(service, run=2)
                assert await receive_exactly(before, 5) == b"early"
                assert await receive_exactly(later, 5) == b"later"
                return
            if comes == "elsewhere":
                plane.registry.relieve(old.id)
            assert (await until_reset(before), await until_reset(later)) == (b"", b"")
            assert sum(plane.doors[0].counters.refused.values()) == 2
            assert plane.registry.relays() == ()


async def test_others_go_before_one_that_makes_way(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        old = await plane.add_relay(service)
        other = await plane.add_relay(service, name="b")
        plane.registry.mark_draining(old.id, old.instance, MAKES_WAY)
        port = plane.add_door()
        for _ in range(3):
            assert await exchange(port, b"x") == b"x"
        assert (old.far_session.mux.opened, other.far_session.mux.opened) == (0, 3)


async def test_who_drains_without_a_successor_gets_nothing(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        plane.registry.mark_draining(relay.id, relay.instance, Departure(60.0))
        await refused(port)


async def test_one_that_makes_way_may_resume_and_does_not_push_its_successor_out(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        old = await plane.add_relay(service)
        port = plane.add_door()
        async with await connect(port) as kept:
            await say(kept)
            plane.registry.mark_draining(old.id, old.instance, MAKES_WAY)
            new = await plane.add_relay(service, run=2)
            again = ControlLink()
            assert plane.registry.enter(old.id, old.instance, (), again) == 1
            assert (old.control.closed, new.control.closed) == ([Code.NORMAL], [])
            assert plane.registry.knows(old.id, old.instance)
            assert plane.registry.find_session(old.id, old.instance, old.far_session.id) is old.far_session
            old.wire.cut()
            await say(kept)
            assert old.dialled == 2
            assert await exchange(port, b"y") == b"y"
            assert new.far_session.mux.opened == 1


async def test_one_that_does_not_end_in_time_is_fenced_off(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "DEPARTURE_GRACE_S", -1.0)
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        old = await plane.add_relay(service)
        port = plane.add_door()
        kept = await connect(port)
        await say(kept)
        plane.registry.mark_draining(old.id, old.instance, Departure(0.0, hands_over=True))
        await plane.add_relay(service, run=2)
        plane.registry.sweep()
        assert old.control.closed == [Code.FENCED]
        assert await until_reset(kept) == b""
        assert await exchange(port, b"y") == b"y"


async def test_revoking_ends_both(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        old = await plane.add_relay(service)
        plane.registry.mark_draining(old.id, old.instance, MAKES_WAY)
        new = await plane.add_relay(service, run=2)
        plane.registry.revoke(old.id)
        assert (old.control.closed, new.control.closed) == ([Code.REVOKED], [Code.REVOKED])
        assert plane.registry.leaving(old.id) == plane.registry.relays() == ()


async def test_only_so_many_instances_drain_at_once(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        relays = []
        for run in range(registry_module.MAX_LEAVING + 2):
            relays.append(await plane.add_relay(service, run=run))
            plane.registry.mark_draining(relays[-1].id, relays[-1].instance, MAKES_WAY)
        assert [relay.control.closed for relay in relays[:2]] == [[Code.FENCED], []]
        assert len(plane.registry.leaving(relays[0].id)) == registry_module.MAX_LEAVING
        assert await exchange(plane.add_door(), b"x") == b"x"


async def test_a_relay_that_an_administrator_drains_gets_nothing_new_in_any_instance(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        relay = await plane.add_relay(service)
        port = plane.add_door()
        async with await connect(port) as kept:
            await say(kept)
            plane.registry.drain(relay.id)
            await refused(port)
            await say(kept)
            plane.registry.mark_draining(relay.id, relay.instance, MAKES_WAY)
            await plane.add_relay(service, run=2)
            await refused(port)
            plane.registry.undrain(relay.id)
            assert await exchange(port, b"y") == b"y"


async def test_a_door_lets_clients_in_when_its_relay_is_there(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        doors = Doors(plane.reactor, plane.registry, Admission(OPEN_LIMITS))
        port = free_port()
        doors.apply([DoorConfig("d", Address.parse(f"127.0.0.1:{port}"), SERVICE)])
        doors.hold_until_served(20.0)
        try:
            async with await connect(port) as early:
                await early.send_all(b"x")
                await trio.sleep(0.1)
                assert doors.clients == 0
                await plane.add_relay(await plane.serve(echo))
                assert await receive_exactly(early, 1) == b"x"
            await plane.quiet()
        finally:
            doors.close()
            doors.abort_all()


async def test_a_door_that_is_held_lets_nobody_in(contexts: Contexts) -> None:
    """Whoever has a relay, and however long it takes."""
    async with open_plane(contexts) as plane:
        doors = Doors(plane.reactor, plane.registry, Admission(OPEN_LIMITS))
        port = free_port()
        doors.apply([DoorConfig("d", Address.parse(f"127.0.0.1:{port}"), SERVICE)])
        doors.hold()
        await plane.add_relay(await plane.serve(echo))
        try:
            async with await connect(port) as early:
                await early.send_all(b"x")
                await trio.sleep(0.1)
                assert (doors.clients, doors.is_waiting) == (0, True)
                doors.hold_until_served(0.0)
                assert await receive_exactly(early, 1) == b"x"
            await plane.quiet()
        finally:
            doors.close()
            doors.abort_all()


async def test_a_door_waits_only_so_long(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        doors = Doors(plane.reactor, plane.registry, Admission(OPEN_LIMITS))
        port = free_port()
        doors.apply([DoorConfig("d", Address.parse(f"127.0.0.1:{port}"), SERVICE)])
        doors.hold_until_served(0.2)
        try:
            assert await until_reset(await connect(port)) == b""
            (door,) = doors.open_doors()
            assert door.counters.refused == {"no-relay": 1}
            doors.hold_until_served(20.0)
        finally:
            doors.close()


async def test_what_doors_have_let_in_is_counted_when_they_are_gone(contexts: Contexts) -> None:
    """What only rises must not fall with a reload: a monitor would take that for a restart, and count everybody again."""
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        doors = Doors(plane.reactor, plane.registry, Admission(OPEN_LIMITS))
        one, other = (DoorConfig(name, Address.parse(f"127.0.0.1:{free_port()}"), SERVICE) for name in ("one", "other"))
        doors.apply([one, other])
        try:
            for config in (one, one, other):
                assert await exchange(config.listen.port or 0, b"x") == b"x"
            while doors.clients:
                await trio.sleep(0.01)
            for configs in ([other], [other], []):
                doors.apply(configs)
                assert doors.accepted == 3
        finally:
            doors.close()


def test_making_way_is_better_than_waiting_for_a_link() -> None:
    assert Readiness.UP < Readiness.RELUCTANT < Readiness.LEAVING < Readiness.HELD < Readiness.NONE
