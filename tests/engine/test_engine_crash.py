"""A bug in one callback, injected here, ends one connection, and never its session, the daemon or anybody else."""

import os
import socket
from collections.abc import Callable

import pytest
import trio
from peers import connect, echo, exchange, receive_exactly, refused, until_reset
from plane import Contexts, open_plane

from fxgateway.doors.client import Client
from fxrelay.delivery.delivery import Delivery, DeliveryDesk
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.engine.session import Session
from fxtunnel.engine.splice import Splice
from fxtunnel.protocol.mux import Mux
from fxtunnel.protocol.stream import Stream

ERRORS = [RecursionError, UnicodeError, MemoryError, OSError]
Bug = Callable[..., None]


def once(owner: type, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The next call of the method raises. Returns who was hit."""
    original = getattr(owner, name)
    hit: list[object] = []

    def failing(self: object, *args: object) -> object:
        if not hit:
            hit.append(self)
            raise error("injected")
        return original(self, *args)

    monkeypatch.setattr(owner, name, failing)
    return hit


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("owner", [Client, Delivery])
async def test_bug_in_a_sockets_callback_ends_its_stream(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch, error: type[Exception], owner: type[Splice]
) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        async with await connect(port) as bystander, await connect(port) as victim:
            for stream in (bystander, victim):
                await stream.send_all(b"x")
                await receive_exactly(stream, 1)
            hit = once(owner, "on_event", error, monkeypatch)
            await victim.send_all(b"y")
            assert await until_reset(victim) == b""
            assert len(hit) == 1
            await bystander.send_all(b"still")
            assert await receive_exactly(bystander, 5) == b"still"
        assert relay.session.state is State.UP
        assert await exchange(port, b"new") == b"new"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((Client, "on_data"), (Delivery, "on_data"), (Delivery, "on_last_data"), (Delivery, "on_fin"), (Client, "on_accept")),
        *((Splice, "read_turn"), (Stream, "consumed"), (DeliveryDesk, "_deliver")),
    ],
)
async def test_bug_in_a_streams_callback_ends_its_stream(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch, error: type[Exception], owner: type, name: str
) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        bystander = await connect(port)
        await bystander.send_all(b"x")
        await receive_exactly(bystander, 1)
        hit = once(owner, name, error, monkeypatch)
        victim = None
        try:
            victim = await connect(port)
            if name == "on_last_data":  # no checkpoint between the byte and the FIN: they go on together
                os.write(victim.socket.fileno(), b"y")
                victim.socket.shutdown(socket.SHUT_WR)
            else:
                await victim.send_all(b"y")
                await victim.send_eof()
            await until_reset(victim, 2)
        except (trio.BrokenResourceError, OSError):
            pass  # it was reset while it was still speaking, or before we heard that it was let in
        assert hit
        if victim is not None:
            await victim.aclose()
        await bystander.send_all(b"still")
        assert await receive_exactly(bystander, 5) == b"still"
        await bystander.aclose()
        assert relay.session.state is State.UP
        assert relay.far_session.state is State.UP
        assert relay.dialled == 1
        assert await exchange(port, b"new") == b"new"


async def test_bug_at_the_end_of_one_stream_leaves_no_other_open(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        streams = [await connect(port) for _ in range(4)]
        for stream in streams:
            await stream.send_all(b"x")
            await receive_exactly(stream, 1)
        hit = once(Client, "on_reset", MemoryError, monkeypatch)
        plane.reactor.call_later(0, lambda: relay.far_session.close(Code.INTERNAL_ERROR))
        for stream in streams:
            await until_reset(stream)
            await stream.aclose()
        assert len(hit) == 1
        assert relay.far_session.id not in [key for live in plane.registry.relays() for key in live.sessions]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("owner", "name"), [(Session, "open_stream"), (Session, "want_turn"), (Stream, "replay")])
async def test_bug_while_a_client_comes_in_ends_that_client(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch, error: type[Exception], owner: type, name: str
) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        hit = once(owner, name, error, monkeypatch)
        await refused(port)
        assert hit
        await plane.quiet()
        assert await exchange(port, b"next") == b"next"


@pytest.mark.parametrize(("owner", "name"), [(Session, "open_stream"), (Stream, "replay")])
async def test_bug_while_a_client_goes_on_to_another_relay_ends_that_client(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    async with open_plane(contexts) as plane:
        refuses = await plane.add_relay(await plane.serve(echo), name="a")
        await plane.add_relay(await plane.serve(echo), name="b")
        port = plane.add_door()
        hit: list[object] = []

        def refuse(session: object, stream: Stream, *_: object) -> None:
            stream.refuse(Code.BUSY)
            hit.append(once(owner, name, MemoryError, monkeypatch))

        with monkeypatch.context() as patch:
            patch.setattr(refuses.desk, "_deliver", refuse)
            await refused(port)
        assert len(hit) == 1
        assert hit[0]
        await plane.quiet()
        assert await exchange(port, b"next") == b"next"


@pytest.mark.parametrize("owner", [Client, Delivery])
async def test_bug_in_a_timer_does_not_stop_the_sweep(contexts: Contexts, monkeypatch: pytest.MonkeyPatch, owner: type) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        port = plane.add_door()
        door = plane.doors[0]
        hits = 0

        def sweep_fails(*_: object) -> list[object]:
            nonlocal hits
            hits += 1
            raise MemoryError("injected")

        with monkeypatch.context() as patch:
            if owner is Client:
                patch.setattr("fxgateway.doors.door.overdue", sweep_fails)
            else:
                patch.setattr(type(relay.desk), "limits", property(sweep_fails), raising=False)
            with trio.fail_after(10):
                while hits < 2:
                    await trio.sleep(0.02)
        assert door.clients == set()
        assert await exchange(port, b"x") == b"x"


async def test_failed_heartbeat_is_followed_by_another(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_plane(contexts, SessionConfig(heartbeat_s=0.1, dead_after_s=2)) as plane:
        await plane.add_relay(await plane.serve(echo))
        tick, ticked = Mux.tick, []

        def failing(mux: Mux, now: float) -> None:
            ticked.append(mux)
            if len(ticked) == 1:
                raise MemoryError
            tick(mux, now)

        monkeypatch.setattr(Mux, "tick", failing)
        with trio.fail_after(10):
            while ticked.count(ticked[0] if ticked else None) < 2:
                await trio.sleep(0.01)
