"""A client was given a session whose link is lost: it need not wait for that one when it can be served now."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from peers import Serve, connect, echo, exchange, hanging_port, receive_all, receive_exactly, refused, until_reset
from plane import Contexts, Plane, RelaySide, open_plane

from fxgateway.routing.failover import MAX_ATTEMPTS
from fxgateway.tunnels.registry import RegistryLimits
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.engine.session import Session
from fxtunnel.model import SessionId
from fxtunnel.protocol.frames import MAX_STREAM_ID, WORN_STREAMS

LONG_HOLD = SessionConfig(hold_s=25.0, heartbeat_s=0.1, dead_after_s=0.5)
SOON_S = 4.0
"""Far less than anything else that could end the wait: OPEN's timeout, the hold."""


async def held_relay(plane: Plane, serve: Serve = echo, name: str = "a") -> RelaySide:
    """A relay that has lost its link and does not dial."""
    relay = await plane.add_relay(await plane.serve(serve), name=name)
    relay.redials = False
    assert relay.wire is not None
    relay.wire.cut()
    with trio.fail_after(10):
        while relay.far_session.is_up or relay.session.is_up:
            await trio.sleep(0.005)
    return relay


async def link_anew(relay: RelaySide) -> Session:
    """The relay has given its session up, and makes another one. Returns the gateway's end of the first."""
    old, relay.far = relay.far_session, None
    relay.session = Session(relay.plane.reactor, SessionId("anew"), relay, relay.plane.config, relay.budget, relay.desk.on_open)
    await relay.link_up()
    return old


@asynccontextmanager
async def waiting_client(plane: Plane) -> AsyncIterator[trio.SocketStream]:
    """A client of a new door that has said "early", and waits for a link."""
    async with await connect(plane.add_door(open_timeout_s=25.0)) as stream:
        await stream.send_all(b"early")
        with trio.fail_after(10):
            while not any(client.waits_for_link for client in plane.doors[-1].opening):
                await trio.sleep(0.005)
        yield stream


async def test_the_same_relay_by_a_new_session(contexts: Contexts) -> None:
    """As after a gateway has stood still for longer than sessions are held: the relay has given the old session up."""
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await held_relay(plane)
        async with waiting_client(plane) as stream:
            old = await link_anew(relay)
            with trio.fail_after(SOON_S):
                assert await receive_exactly(stream, 5) == b"early"
            assert not old.is_up
            assert not old.mux.streams


async def test_a_client_that_waits_for_a_lost_link_moves_to_another_relay(contexts: Contexts) -> None:
    async with open_plane(contexts, LONG_HOLD) as plane:
        first = await held_relay(plane)
        async with waiting_client(plane) as stream:
            await plane.add_relay(await plane.serve(echo), name="b")
            with trio.fail_after(SOON_S):
                assert await receive_exactly(stream, 5) == b"early"
            first.redials = True
            with trio.fail_after(10):
                while not first.far_session.is_up:
                    await trio.sleep(0.01)


async def test_whoever_may_have_heard_of_it_is_waited_for(contexts: Contexts) -> None:
    """The OPEN was sent before the link was lost: a service may have been reached, and must not be a second time."""
    reached: list[str] = []

    def service(name: str) -> Serve:
        async def serve(stream: trio.SocketStream) -> None:
            reached.append(name)
            await stream.send_all(await receive_all(stream))

        return serve

    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await plane.add_relay(await plane.serve(service("a")), name="a")
        port = plane.add_door(open_timeout_s=25.0)
        relay.redials = False
        assert relay.wire is not None
        relay.wire.silence()
        async with await connect(port) as stream:
            await stream.send_all(b"early")
            await stream.send_eof()
            with trio.fail_after(10):
                while relay.far_session.is_up or relay.session.is_up:  # found dead; the OPEN is on its way
                    await trio.sleep(0.005)
            await plane.add_relay(await plane.serve(service("b")), name="b")
            await trio.sleep(1.2)  # two sweeps of the door
            assert reached == []
            relay.redials = True
            assert await receive_all(stream) == b"early"
            assert reached == ["a"]


async def test_a_crowd_asks_once_whether_there_is_a_better_way(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await held_relay(plane)
        port = plane.add_door(open_timeout_s=25.0)
        streams = [await connect(port) for _ in range(20)]
        with trio.fail_after(10):
            while len(plane.doors[0].opening) < len(streams):
                await trio.sleep(0.01)
        asked = 0
        decide = plane.registry.offers.decide

        def counting(*args: object) -> object:
            nonlocal asked
            asked += 1
            return decide(*args)

        monkeypatch.setattr(plane.registry.offers, "decide", counting)
        await trio.sleep(1.2)
        assert 0 < asked <= 4
        monkeypatch.undo()
        await link_anew(relay)
        for stream in streams:
            await stream.send_all(b"x")
            with trio.fail_after(SOON_S):
                assert await receive_exactly(stream, 1) == b"x"
            await stream.aclose()


async def test_links_that_come_and_go_do_not_turn_a_client_away(contexts: Contexts) -> None:
    """It has been moved as often as it may be: then it stays where it is, and is served when the link is resumed."""
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await held_relay(plane)
        async with waiting_client(plane) as stream:
            (client,) = plane.doors[0].clients
            client.failover = client.failover._replace(attempts=MAX_ATTEMPTS)
            await plane.add_relay(await plane.serve(echo), name="b")
            await trio.sleep(1.2)
            assert plane.doors[0].counters.refused == {}
            relay.redials = True
            assert await receive_exactly(stream, 5) == b"early"


async def test_what_the_relay_has_given_up_ends_when_its_new_session_is_up(contexts: Contexts) -> None:
    """Not when the hold is over, which began anew when the gateway woke. Whom nobody has accepted yet is served by the new session."""
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        relay.redials = False
        port = plane.add_door(open_timeout_s=25.0)
        async with await connect(port) as old, await connect(port) as untouched:
            await old.send_all(b"x")
            assert await receive_exactly(old, 1) == b"x"
            with trio.fail_after(10):
                while plane.doors[0].opening:
                    await trio.sleep(0.005)
            assert relay.wire is not None
            relay.wire.silence()
            early = await connect(port)
            await early.send_all(b"SSH-2.0-early")  # its OPEN is sent: nobody knows yet that the link is dead
            with trio.fail_after(10):
                while relay.far_session.is_up or len(relay.far_session.mux.streams) < 3:
                    await trio.sleep(0.005)
            assert not any(client.waits_for_link for client in plane.doors[0].opening)
            relay.session.close(Code.LINK_LOST)
            plane.registry.note_sessions(relay.id, relay.instance, ())
            held = await link_anew(relay)
            assert held.state is State.HELD
            plane.registry.end_given_up(relay.id, relay.instance)
            assert held.state is State.CLOSED
            assert await until_reset(old, SOON_S) == b""
            async with early:
                with trio.fail_after(SOON_S):
                    assert await receive_exactly(early, 13) == b"SSH-2.0-early"
                    await untouched.send_all(b"y")
                    assert await receive_exactly(untouched, 1) == b"y"


async def test_only_what_is_held_and_not_named_counts_as_given_up(contexts: Contexts) -> None:
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        registry = plane.registry
        registry.apply(RegistryLimits(links_per_relay=4), plane.config)
        named, resumed, gone = (registry.new_session(relay.id, relay.instance) for _ in range(3))
        assert named is not None
        assert resumed is not None
        assert gone is not None
        assert registry.new_session(relay.id, relay.instance) is None
        registry.note_sessions(relay.id, relay.instance, (named.id,))
        assert registry.find_session(relay.id, relay.instance, resumed.id) is resumed
        another = registry.new_session(relay.id, relay.instance)  # for which there is room now
        assert another is not None
        assert [session.state for session in (named, resumed, gone)] == [State.HELD, State.HELD, State.CLOSED]
        registry.end_given_up(relay.id, relay.instance)
        assert (named.state, resumed.state, relay.far_session.state) == (State.HELD, State.HELD, State.UP)
        for session in (named, resumed, another):
            session.close(Code.NORMAL)


async def test_a_session_whose_stream_ids_are_used_up_is_followed_by_another(contexts: Contexts) -> None:
    """After four billion clients. It would be up, and take nobody any more, until its relay is restarted."""
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port, old = plane.add_door(), relay.far_session
        for mux, last in ((old.mux, "opened"), (old.mux, "_last_id"), (relay.session.mux, "_last_id")):
            setattr(mux, last, MAX_STREAM_ID - 1)
        assert await exchange(port, b"the last one") == b"the last one"
        await plane.quiet()
        await refused(port)
        assert old.state is State.CLOSED
        with trio.fail_after(10):
            while relay.closed_with is None:
                await trio.sleep(0.01)
        assert relay.closed_with[0] is Code.NORMAL
        await link_anew(relay)
        assert await exchange(port, b"the first one") == b"the first one"


@pytest.mark.parametrize("had", [WORN_STREAMS, MAX_STREAM_ID])
async def test_a_relay_with_two_sessions_goes_on_with_the_one_that_has_stream_ids(contexts: Contexts, had: int) -> None:
    async with open_plane(contexts, LONG_HOLD) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port, old = plane.add_door(), relay.far_session
        async with await connect(port) as stream:
            await stream.send_all(b"x")
            assert await receive_exactly(stream, 1) == b"x"
            old.mux.opened = old.mux._last_id = had
            session = relay.session
            await link_anew(relay)
            async with await connect(port) as beside:
                await beside.send_all(b"y")
                assert await receive_exactly(beside, 1) == b"y"
                assert await exchange(port, b"also the one with fewer streams") == b"also the one with fewer streams"
            await stream.send_all(b"z")
            assert await receive_exactly(stream, 1) == b"z"
        await plane.quiet()
        session.close(Code.NORMAL)


async def until_asked(plane: Plane, count: int) -> None:
    """So many clients of the last door have a stream that nobody has accepted."""
    with trio.fail_after(10):
        while len(plane.doors[-1].opening) < count:
            await trio.sleep(0.005)


@pytest.mark.parametrize("links", [1, 8])
async def test_clients_of_a_relay_that_was_killed_are_served_by_its_next_process(contexts: Contexts, links: int) -> None:
    """All of whom the dead one had not heard, whatever they have said, and who come before the next one has its first link."""
    async with open_plane(contexts, LONG_HOLD) as plane:
        plane.registry.apply(RegistryLimits(links_per_relay=links), plane.config)
        await held_relay(plane)
        async with waiting_client(plane) as before:
            fresh = await plane.add_relay(await plane.serve(echo), linked=False, run=2)
            async with await connect(plane.add_door(open_timeout_s=25.0)) as between:
                await between.send_all(b"INSERT")
                await until_asked(plane, 1)
                await fresh.link_up()
                plane.registry.end_given_up(fresh.id, fresh.instance)
                with trio.fail_after(SOON_S):
                    assert await receive_exactly(before, 5) == b"early"
                    assert await receive_exactly(between, 6) == b"INSERT"
        assert plane.registry.sessions() == [fresh.far_session]


@pytest.mark.parametrize(("said", "is_served"), [(b"INSERT", False), (b"SSH-2.0-x", True)])
@pytest.mark.parametrize("is_told_late", [False, True])
async def test_of_whom_a_killed_relay_may_have_heard_is_asked_again_what_may_be(
    contexts: Contexts, said: bytes, *, is_served: bool, is_told_late: bool
) -> None:
    async with open_plane(contexts, LONG_HOLD) as plane:
        with hanging_port() as nobody:
            relay = await plane.add_relay(nobody)
            port = plane.add_door(open_timeout_s=25.0)
            relay.redials = not is_told_late
            if is_told_late:  # while its link is lost and comes back
                assert relay.wire is not None
                relay.wire.cut()
                with trio.fail_after(10):
                    while relay.far_session.is_up or relay.session.is_up:
                        await trio.sleep(0.005)
            async with await connect(port) as stream:
                await stream.send_all(said)
                await until_asked(plane, 1)
                if is_told_late:
                    await relay.link_up()
                with trio.fail_after(10):
                    while len(relay.session.mux.streams) < 1:
                        await trio.sleep(0.005)
                relay.redials = False
                assert relay.wire is not None
                relay.wire.cut()
                with trio.fail_after(10):
                    while relay.far_session.is_up:
                        await trio.sleep(0.005)
                fresh = await plane.add_relay(await plane.serve(echo), linked=False, run=2)
                await fresh.link_up()
                plane.registry.end_given_up(fresh.id, fresh.instance)
                if is_served:
                    with trio.fail_after(SOON_S):
                        assert await receive_exactly(stream, len(said)) == said
                else:
                    assert await until_reset(stream, SOON_S) == b""
            assert plane.doors[0].counters.refused == ({} if is_served else {"unanswered": 1})


async def test_a_relay_that_takes_a_name_and_never_links_keeps_clients_no_longer_than_a_session(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig(hold_s=0.5, heartbeat_s=0.1, dead_after_s=0.5)) as plane:
        await held_relay(plane)
        await plane.add_relay(await plane.serve(echo), linked=False, run=2)
        await refused(plane.add_door(open_timeout_s=25.0))
        assert plane.doors[0].counters.refused == {"all-refused": 1}
        assert plane.registry.sessions() == []
