"""Doors and clients that take their time: the kernel waits for the first word, and a crowd that took too long is not dealt with at once."""

import socket
from dataclasses import replace

import pytest
import trio
from peers import connect, receive_all
from plane import SERVICE, Contexts, Plane, open_plane

from fxgateway.doors.pending_clients import LATE_AT_ONCE
from fxgateway.doors.preread import Preread
from fxgateway.routing.hosts import HostTable
from fxgateway.routing.preread_router import DoorKind, PrereadRouter, TurnAway

ROUTES = HostTable()


async def one_service(plane: Plane) -> None:
    """SERVICE answers a first message with it."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"one:" + await stream.receive_some())
        await stream.send_eof()

    (await plane.add_relay()).serves(await plane.serve(serve))


def door(plane: Plane, kind: DoorKind, **changes: float) -> int:
    return plane.add_door(service=SERVICE, preread_router=PrereadRouter(kind, ROUTES, SERVICE), **changes)


async def test_where_clients_speak_first_the_kernel_waits_for_it(contexts: Contexts) -> None:
    """Only there: at the other doors it may be the server who does."""
    async with open_plane(contexts) as plane:
        for kind, speaks_first in ((DoorKind.SNI, True), (DoorKind.HTTP, True), (DoorKind.AUTO, False), (None, False)):
            door(plane, kind) if kind is not None else plane.add_door()
            one = plane.doors[-1]
            listener = one._listener
            assert listener is not None
            assert bool(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)) is speaks_first
            other = PrereadRouter(DoorKind.AUTO if speaks_first else DoorKind.HTTP, ROUTES, SERVICE)
            one.reconfigure(replace(one.config, preread_router=other))
            assert bool(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)) is not speaks_first


async def test_who_says_nothing_at_first_is_served_all_the_same(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await one_service(plane)
        async with await connect(door(plane, DoorKind.HTTP)) as stream:
            await trio.sleep(1.5)  # longer than the kernel keeps it back
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await receive_all(stream)).startswith(b"one:GET / HTTP/1.1")


async def test_a_crowd_that_took_too_long_is_turned_away_bit_by_bit(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the loop would stand still for everybody else, for a third of a millisecond for each of them."""
    async with open_plane(contexts) as plane:
        port = door(plane, DoorKind.HTTP, header_timeout_s=0.3)
        pending, turns = plane.doors[0].pending, []
        inner = pending.preread_turned_away

        def note(preread: Preread, away: TurnAway) -> None:
            turns.append(plane.reactor.now)
            inner(preread, away)

        monkeypatch.setattr(pending, "preread_turned_away", note)
        streams = [await connect(port) for _ in range(20)]
        for stream in streams:
            await stream.send_all(b"GET / HT")
        with trio.fail_after(10):
            for stream in streams:
                assert (await receive_all(stream)).startswith(b"HTTP/1.1 408 ")
                await stream.aclose()
        assert plane.doors[0].counters.refused == {"first-words-timeout": 20}
        assert max(turns.count(now) for now in turns) <= LATE_AT_ONCE
