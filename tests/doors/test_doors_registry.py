"""Who holds a relay's name."""

import trio
from peers import AT_ONCE_S, connect, echo, exchange, receive_exactly, refused, until_reset
from plane import Contexts, ControlLink, RelaySide, open_plane

from fxgateway.tunnels.ports import Departure
from fxgateway.tunnels.registry import RegistryLimits
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.model import InstanceId, Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol.frames import WORN_STREAMS
from fxtunnel.protocol.heartbeats import BULK_BYTES

OFFERS = (Offer(ServiceName("s")),)


async def used_stream(port: int) -> trio.SocketStream:
    stream = await connect(port)
    await stream.send_all(b"x")
    assert await receive_exactly(stream, 1) == b"x"
    return stream


async def ended(relay: RelaySide) -> Code:
    """What the relay hears about its session's end."""
    with trio.fail_after(10):
        while relay.closed_with is None:
            await trio.sleep(0.01)
    return relay.closed_with[0]


async def test_another_instance_takes_over_at_once(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        zombie = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        stream = await used_stream(port)
        fresh = RelaySide(plane, "a", zombie.desk.limits, plane.config)
        fresh.instance = InstanceId("a-2")
        fresh.table.replace(zombie.table.services())
        plane.relays.append(fresh)
        assert plane.registry.enter(fresh.id, fresh.instance, OFFERS, fresh.control) == 2
        assert zombie.control.closed == [Code.FENCED]
        assert await until_reset(stream) == b""
        assert await ended(zombie) is Code.FENCED
        assert plane.registry.new_session(zombie.id, zombie.instance) is None
        assert plane.registry.find_session(zombie.id, zombie.instance, zombie.far_session.id) is None
        async with await connect(port) as early:
            await early.send_all(b"said before there is a link")
            await fresh.link_up()
            plane.registry.end_given_up(fresh.id, fresh.instance)
            with trio.fail_after(AT_ONCE_S):
                assert await receive_exactly(early, 27) == b"said before there is a link"
        assert await exchange(port, b"y") == b"y"
        plane.registry.leave(zombie.id, zombie.control)
        assert plane.registry.named(fresh.id) is not None


async def test_same_instance_keeps_its_sessions(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        async with await used_stream(plane.add_door()) as stream:
            newer = ControlLink()
            assert plane.registry.enter(relay.id, relay.instance, OFFERS, newer) == 1
            assert relay.control.closed == [Code.NORMAL]
            assert newer.closed == []
            plane.registry.leave(relay.id, relay.control)
            await stream.send_all(b"y")
            assert await receive_exactly(stream, 1) == b"y"


async def test_relay_is_forgotten_when_link_and_sessions_are_gone(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        plane.registry.leave(relay.id, relay.control)
        assert await exchange(port, b"x") == b"x", "a data link outlives the control link"
        relay.session.close(Code.SHUTDOWN)
        with trio.fail_after(10):
            while plane.registry.relays():
                await trio.sleep(0.01)
        assert plane.registry.offers.services() == {}
        await refused(port)


async def test_a_revoked_relay_loses_its_links_and_its_streams(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        stream = await used_stream(port)
        plane.registry.revoke(relay.id)
        plane.registry.revoke(relay.id)
        assert relay.control.closed == [Code.REVOKED]
        assert await until_reset(stream) == b""
        assert await ended(relay) is Code.REVOKED
        assert plane.registry.relays() == ()
        await refused(port)


async def test_sessions_and_relays_are_bounded(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        registry = plane.registry
        registry.apply(RegistryLimits(links_per_relay=2, relays=1), plane.config)
        spare = registry.new_session(relay.id, relay.instance)
        assert spare is not None
        assert registry.new_session(relay.id, relay.instance) is None
        assert registry.find_session(relay.id, relay.instance, spare.id) is spare
        assert registry.find_session(relay.id, relay.instance, SessionId("other")) is None
        assert not registry.is_full(relay.id)
        assert registry.is_full(RelayId("b"))
        spare.close(Code.NORMAL)
        assert spare.state is State.CLOSED
        again = registry.new_session(relay.id, relay.instance)
        assert again is not None
        again.mux.opened = WORN_STREAMS
        successor = registry.new_session(relay.id, relay.instance)
        assert successor is not None, "what makes way is not in the way"
        assert registry.new_session(relay.id, relay.instance) is None
        for session in (again, successor):
            session.close(Code.NORMAL)


async def test_a_session_that_takes_the_place_of_one_given_up_is_the_relays(contexts: Contexts) -> None:
    """Its control link was lost behind the ticket: with no session in between, it would be forgotten, and this one would serve nobody."""
    async with open_plane(contexts) as plane:
        registry, name, instance, link = plane.registry, RelayId("a"), InstanceId("a-1"), ControlLink()
        registry.apply(RegistryLimits(links_per_relay=1), plane.config)
        registry.enter(name, instance, OFFERS, link)
        given_up = registry.new_session(name, instance)
        assert given_up is not None
        registry.note_sessions(name, instance, ())
        registry.leave(name, link)
        session = registry.new_session(name, instance)
        assert session is not None
        assert given_up.state is State.CLOSED
        assert registry.sessions() == [session]
        session.close(Code.NORMAL)
        assert not registry.knows(name)


async def test_instances_of_a_relay_share_what_a_hand_over_needs(contexts: Contexts) -> None:
    """Each says that it drains for a day, and keeps its links: the present one gets its own, at the expense of the oldest."""
    async with open_plane(contexts) as plane:
        registry, name = plane.registry, RelayId("a")
        registry.apply(RegistryLimits(links_per_relay=2), plane.config)
        links, sessions = [], []
        for number in range(6):
            link, instance = ControlLink(), InstanceId(f"a-{number}")
            registry.enter(name, instance, OFFERS, link)
            links.append(link)
            sessions.append([registry.new_session(name, instance) for _ in range(2)])
            registry.mark_draining(name, instance, Departure(86_400.0))
            assert all(sessions[-1]), "who comes gets its links"
        open_now = [[session is not None and session.state is not State.CLOSED for session in pair] for pair in sessions]
        assert open_now == [[False, False]] * 4 + [[True, True]] * 2
        assert [link.closed for link in links] == [[Code.FENCED]] * 4 + [[]] * 2
        earlier = InstanceId("a-4")
        for session in sessions[4]:
            assert session is not None
            session.close(Code.NORMAL)
        kept = registry.new_session(name, earlier)
        assert kept is not None, "one that drains may link up again"
        registry.apply(RegistryLimits(links_per_relay=1), plane.config)
        kept.close(Code.NORMAL)
        assert registry.new_session(name, earlier) is None
        assert [instance.instance for instance in registry.leaving(name)] == [earlier], "and drives nobody out"
        registry.close_all(Code.SHUTDOWN, "", 0.0)


async def test_streams_go_to_the_session_that_is_up(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        held = plane.registry.new_session(relay.id, relay.instance)
        assert held is not None
        for _ in range(3):
            assert await exchange(plane.add_door(), b"x") == b"x"
        assert held.mux.opened == 0
        held.close(Code.NORMAL)


async def test_streams_keep_away_from_bulk(contexts: Contexts) -> None:
    """Of two sessions, the one that carries bulk gets no new stream, however few it has."""
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        first, second = relay.far_session, plane.registry.new_session(relay.id, relay.instance)
        assert second is not None
        second.state = State.UP
        chosen = plane.registry.relays()[0].session_for_stream
        assert chosen() is first
        first.mux.bytes_in += BULK_BYTES
        assert first.is_bulk
        assert chosen() is second
        with trio.fail_after(10):
            while first.is_bulk:  # two heartbeats later
                await trio.sleep(0.02)
        assert chosen() is first
        second.state = State.HELD
        second.close(Code.NORMAL)


async def test_least_loaded_relay_gets_the_client(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        service = await plane.serve(echo)
        relays = [await plane.add_relay(service, name=name) for name in "abc"]
        port = plane.add_door()
        streams = [await used_stream(port) for _ in range(9)]
        assert [len(relay.far_session.mux.streams) for relay in relays] == [3, 3, 3]
        for stream in streams:
            await stream.aclose()


async def test_end_of_the_gateway(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=20)) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        stream = await used_stream(plane.add_door())
        plane.registry.close_all(Code.SHUTDOWN, "the gateway is stopping", 5.0)
        assert await until_reset(stream) == b""
        assert await ended(relay) is Code.SHUTDOWN
        assert relay.control.closed == [Code.SHUTDOWN]
