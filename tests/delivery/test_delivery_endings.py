"""How streams of pools end, at every stage: the claim is given back exactly once, and nothing is left behind."""

import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
from delivery_rig import NOBODY, ScriptedChooser, Spec, add_pool_relay, listen_everywhere, serve_nodes, serve_on
from peers import Serve, connect, echo, hanging_port, pattern, receive_all, receive_exactly, refused, reset, until_reset
from plane import SERVICE, Contexts, Plane, RelaySide, open_plane

from fxrelay.delivery import placing as placing_module
from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.placing import Placer
from fxrelay.delivery.ports import NoNode
from fxrelay.delivery.services import Endpoint, Service
from fxtunnel.codes import Code
from fxtunnel.kit.proxy_header import ProxyHeader, ProxyVersion, parse_proxy_header
from fxtunnel.kit.settings import Address

A, B = "127.0.0.11", "127.0.0.12"


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)


def placer_of(relay: RelaySide) -> Placer:
    assert relay.desk.placer is not None
    return relay.desk.placer


async def served(plane: Plane, chooser: ScriptedChooser, handler: Serve) -> int:
    """A relay whose pool is at A, served by `handler`; returns the door's port."""
    listener = listen_everywhere(A)[A]
    serve_on(plane, listener, handler)
    await add_pool_relay(plane, "a", chooser, listener.getsockname()[1], host=A)
    return plane.add_door()


async def begun(port: int) -> trio.SocketStream:
    stream = await connect(port)
    await stream.send_all(b"x")
    assert await receive_exactly(stream, 1) == b"x"
    return stream


async def client_ends(plane: Plane, stream: trio.SocketStream) -> None:
    await stream.send_eof()
    assert await receive_all(stream) == b""


async def client_resets(plane: Plane, stream: trio.SocketStream) -> None:
    reset(stream)


async def session_ends(plane: Plane, stream: trio.SocketStream) -> None:
    plane.relays[0].session.close(Code.SHUTDOWN)
    await until_reset(stream)


async def relay_ends_all(plane: Plane, stream: trio.SocketStream) -> None:
    plane.relays[0].desk.abort_all()
    await until_reset(stream)


async def stream_idles(plane: Plane, stream: trio.SocketStream) -> None:
    plane.relays[0].desk.limits = DeliveryLimits(idle_timeout_s=0.01)
    plane.relays[0].desk.end_idle()
    await trio.sleep(0.1)
    plane.relays[0].desk.end_idle()
    await until_reset(stream)


async def callback_crashes(plane: Plane, stream: trio.SocketStream) -> None:
    (delivery,) = plane.relays[0].desk.deliveries
    delivery.on_crash()
    await until_reset(stream)


ENDINGS = [client_ends, client_resets, session_ends, relay_ends_all, stream_idles, callback_crashes]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
async def test_a_stream_that_was_served(contexts: Contexts, ending: Callable[[Plane, trio.SocketStream], Awaitable[None]]) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=True))
        stream = await begun(await served(plane, chooser, echo))
        (claim,) = chooser.claims
        assert (len(claim.connected_at), claim.released) == (1, 0)
        await ending(plane, stream)
        await chooser.settled()
        await stream.aclose()
        assert len(claim.connected_at) == 1


@pytest.mark.parametrize("path", ["local", "direct"])
async def test_a_service_that_resets(contexts: Contexts, path: str) -> None:
    async def resets(stream: trio.SocketStream) -> None:
        await receive_exactly(stream, 1)
        reset(stream)

    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=path == "local", address=A if path == "direct" else ""))
        stream = await connect(await served(plane, chooser, resets))
        await stream.send_all(b"x")
        assert await until_reset(stream) == b""
        await chooser.settled()


@pytest.mark.parametrize("path", ["local", "direct"])
async def test_a_client_that_resets_resets_the_service(contexts: Contexts, path: str) -> None:
    endings: list[str] = []

    async def notes(stream: trio.SocketStream) -> None:
        try:
            await echo(stream)
            endings.append("end")
        except trio.BrokenResourceError:
            endings.append("reset")

    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=path == "local", address=A if path == "direct" else ""))
        reset(await begun(await served(plane, chooser, notes)))
        await chooser.settled()
        await until(lambda: endings)
        assert endings == ["reset"]


async def test_a_service_that_is_silent_and_then_ends_lets_the_client_go_on(contexts: Contexts) -> None:
    got: list[bytes] = []

    async def ends_first(stream: trio.SocketStream) -> None:
        await stream.send_all(b"bye")
        await stream.send_eof()
        got.append(await receive_all(stream))

    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=True))
        async with await connect(await served(plane, chooser, ends_first)) as stream:
            assert await receive_all(stream) == b"bye"
            await stream.send_all(pattern(50_000))
            await stream.send_eof()
            await until(lambda: got)
        assert got == [pattern(50_000)]
        await chooser.settled()


async def test_client_gone_while_a_node_is_chosen(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=True))
        chooser.hangs = True
        relay = await add_pool_relay(plane, "a", chooser, 9)
        stream = await connect(plane.add_door())
        await stream.send_all(b"early")
        await until(lambda: any(placing.early for placing in placer_of(relay).placings))
        assert relay.desk.streams == 1
        plane.doors[0].abort_all()
        await until(lambda: chooser.cancelled and not placer_of(relay).placings)
        assert not chooser.claims
        await stream.aclose()


async def test_client_gone_at_the_moment_of_the_choice(contexts: Contexts) -> None:
    """The stream ends between the chooser's decision and the task's next step: no connection is begun, no redirect sent."""
    for spec in (Spec("a", is_local=True), Spec("b", address=B), Spec("b", can_redirect=True)):
        async with open_plane(contexts) as plane:
            chooser = ScriptedChooser(spec)
            chooser.is_instant = False
            nodes = serve_nodes(plane, A, B)
            relay = await add_pool_relay(plane, "a", chooser, nodes.port, host=A)
            chooser.on_choice = placer_of(relay).abort_all
            await refused(plane.add_door())
            await chooser.settled()
            assert not any(claim.connected_at for claim in chooser.claims)
            assert nodes.got == {A: [], B: []}
            assert relay.desk.counters.paths_by_service == {}


async def test_client_gone_while_the_node_is_connected(contexts: Contexts) -> None:
    with hanging_port() as hanging:
        async with open_plane(contexts) as plane:
            chooser = ScriptedChooser(Spec("a", is_local=True))
            relay = await add_pool_relay(plane, "a", chooser, hanging, host="127.0.0.1")
            stream = await connect(plane.add_door())
            await stream.send_all(b"early")
            await until(lambda: any(delivery._pending for delivery in relay.desk.deliveries))
            assert relay.desk.streams == 1
            (client,) = plane.doors[0].clients
            client.fail(Code.CANCELLED)
            await chooser.settled()
            await until(lambda: not relay.desk.streams)
            await stream.aclose()


async def test_a_chooser_that_takes_too_long(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, B)
        slow = ScriptedChooser()
        slow.hangs = True
        first = await add_pool_relay(plane, "a", slow, 9, limits=DeliveryLimits(place_timeout_s=1.0))
        port = plane.add_door()
        async with await connect(port) as stream:
            await stream.send_all(b"early")
            await until(lambda: slow.asked)
            await add_pool_relay(plane, "b", ScriptedChooser(Spec("b", is_local=True)), nodes.port, host=B)
            await stream.send_eof()
            assert await receive_all(stream) == B.encode()
        assert nodes.got[B] == [b"early"]
        assert first.desk.counters.refused_by_service == {SERVICE: {"connect-timeout": 1}}
        assert slow.cancelled == 1


async def test_a_node_that_takes_too_long(contexts: Contexts) -> None:
    with hanging_port() as hanging:
        async with open_plane(contexts) as plane:
            chooser = ScriptedChooser(Spec("b", address="127.0.0.1"))
            relay = await add_pool_relay(plane, "a", chooser, hanging, limits=DeliveryLimits(place_timeout_s=0.2))
            await refused(plane.add_door(), 3)
            assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-timeout": 1}}
            assert not relay.desk.deliveries
            await chooser.settled()


async def test_nobody_can_take_it(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser()
        relay = await add_pool_relay(plane, "a", chooser, 9)
        turn_down = relay.desk.turn_down

        def note(stream, service, code, text):
            texts.append(text)
            turn_down(stream, service, code, text)

        monkeypatch.setattr(relay.desk, "turn_down", note)
        await refused(plane.add_door())
        chooser.nodes = (Spec("b", address=NOBODY),)
        await refused(plane.add_door())
        traces = [wanted.trace_id for wanted, _ in chooser.asked]
        assert texts == [f"NoServerSelected (trace {traces[0]})", f"Connection refused (trace {traces[1]})"]
        assert all(len(trace) == 8 and int(trace, 16) >= 0 for trace in traces)


async def test_a_refusal_counts_also_after_a_node_that_could_not_be_reached(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=True))
        chooser.refusal = NoNode(Code.FORBIDDEN, "Closed")
        first = await add_pool_relay(plane, "a", chooser, 9)
        await refused(plane.add_door(), 3)
        assert len(chooser.asked) == 2
        assert first.desk.counters.refused_by_service == {SERVICE: {"forbidden": 1}}


async def test_a_bug_in_the_chooser_ends_one_stream(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        nodes = serve_nodes(plane, A)
        chooser = ScriptedChooser(Spec("a", is_local=True))
        chooser.fails = True
        await add_pool_relay(plane, "a", chooser, nodes.port, host=A)
        port = plane.add_door()
        await refused(port)
        assert "a bug of the chooser's" in caplog.text
        chooser.fails = False
        async with await connect(port) as stream:
            await stream.send_eof()
            assert await receive_all(stream) == A.encode()
        await chooser.settled()


async def test_too_many_wait_for_a_node(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing_module, "MAX_PLACINGS", 2)
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", is_local=True))
        chooser.hangs = True
        relay = await add_pool_relay(plane, "a", chooser, 9)
        port = plane.add_door()
        streams = [await connect(port) for _ in range(2)]
        await until(lambda: len(chooser.asked) == 2)
        await refused(port)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"busy": 1}}
        for stream in streams:
            reset(stream)
        plane.doors[0].abort_all()


async def test_the_queue_is_bounded_where_nobody_serves_it(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing_module, "MAX_PLACINGS", 2)
    async with open_plane(contexts) as plane:
        relay = await add_pool_relay(plane, "a", ScriptedChooser(), 9)
        relay.desk.placer = placer = Placer(ScriptedChooser())
        port = plane.add_door()
        streams = [await connect(port) for _ in range(2)]
        await until(lambda: len(placer.placings) == 2)
        for client in list(plane.doors[0].clients):
            client.fail(Code.CANCELLED)
        await until(lambda: all(placing.is_over for placing in placer.placings))
        placer.placings.clear()
        await refused(port)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"busy": 1}}
        for stream in streams:
            await stream.aclose()


async def test_streams_without_a_node_count_and_end_with_the_relay(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser()
        chooser.hangs = True
        relay = await add_pool_relay(plane, "a", chooser, 9, limits=DeliveryLimits(streams=2))
        port = plane.add_door()
        streams = [await connect(port) for _ in range(2)]
        await until(lambda: relay.desk.streams == 2)
        await refused(port)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"busy": 1}}
        relay.desk.abort_all()
        for stream in streams:
            assert await until_reset(stream) == b""
        await until(lambda: not relay.desk.streams)
        relay.desk.is_draining = True
        await refused(port)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"busy": 1, "draining": 1}}


async def test_the_placer_ends_what_it_has_not_placed(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser()
        relay = await add_pool_relay(plane, "a", chooser, 9)
        hanging = ScriptedChooser()
        hanging.hangs = True
        relay.desk.placer = placer = Placer(hanging)
        port = plane.add_door()
        async with trio.open_nursery() as nursery:
            await nursery.start(placer.run)
            stream = await connect(port)
            await until(lambda: hanging.asked)
            nursery.cancel_scope.cancel()
        assert await until_reset(stream) == b""
        assert (hanging.cancelled, placer.placings) == (1, set())
        await refused(port)
        assert relay.desk.counters.refused_by_service == {SERVICE: {"draining": 1}}


def greeted(got: list[tuple[ProxyHeader, bytes]]) -> Serve:
    async def serve(stream: trio.SocketStream) -> None:
        data = await receive_all(stream)
        header = parse_proxy_header(data)
        assert header is not None
        got.append((header, data[header.length :]))
        await stream.send_all(b"ok")

    return serve


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["target", "local", "direct"])
async def test_the_service_is_told_who_the_client_is(contexts: Contexts, kind: str, version: ProxyVersion) -> None:
    got: list[tuple[ProxyHeader, bytes]] = []
    async with open_plane(contexts) as plane:
        listener = listen_everywhere(A)[A]
        serve_on(plane, listener, greeted(got))
        service_port = listener.getsockname()[1]
        spec = Spec("a", is_local=kind == "local", address=A if kind == "direct" else "")
        host = A if kind == "local" else NOBODY
        relay = await add_pool_relay(plane, "a", ScriptedChooser(spec), service_port, host=host, proxy_protocol=version)
        if kind == "target":
            # The first address refuses: the header goes to the second one, whole.
            endpoints = tuple(Endpoint(socket.AF_INET, (at, service_port)) for at in (NOBODY, A))
            relay.table.replace([Service(SERVICE, Address(A, service_port), endpoints, proxy_protocol=version)])
        port = plane.add_door()
        for size in (0, 1, 100_000):
            async with await connect(port) as stream:
                own_port = stream.socket.getsockname()[1]
                await stream.send_all(pattern(size))
                await stream.send_eof()
                assert await receive_all(stream) == b"ok"
            header, data = got.pop()
            assert (header.address, header.port, data) == ("127.0.0.1", own_port, pattern(size))
        await plane.quiet()
        assert relay.desk.counters.bytes_in == 100_001, "the header is not counted"


async def test_a_stream_that_ends_as_its_node_is_chosen(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = ScriptedChooser(Spec("a", address=A))
        relay = await add_pool_relay(plane, "a", chooser, 1, wait_s=30.0)
        chooser.on_choice = placer_of(relay).abort_all
        async with await connect(plane.add_door()) as stream:
            await until_reset(stream)
        await until(lambda: chooser.claims)
        await chooser.settled()
