"""Clients behind a proxy of the administrator's: who they are counts, and nobody else can say who he is."""

import ipaddress
import struct

import pytest
import trio
from peers import Serve, connect, echo, exchange, receive_all, receive_exactly, refused, reset, until_reset
from plane import Contexts, Plane, open_plane

from fxgateway.doors import door as door_module
from fxgateway.routing.admission import AdmissionLimits
from fxgateway.settings import DoorSettings
from fxtunnel.kit.sources import is_within
from fxtunnel.protocol.opening import Opening

PROXY = (ipaddress.ip_network("127.0.0.0/30"),)
ELSEWHERE = (ipaddress.ip_network("10.0.0.5"), ipaddress.ip_network("2001:db8::/32"))
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.2 5000 443\r\n"
V2 = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c") + bytes((192, 0, 2, 7, 198, 51, 100, 2)) + struct.pack(">HH", 5_000, 443)
LOCAL = bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0000")


def noting(openings: list[Opening], plane: Plane) -> None:
    """Write down what the relays' desks are asked for."""
    for relay in plane.relays:
        inner = relay.desk._deliver

        def note(session, stream, service, opening, inner=inner):
            openings.append(opening)
            inner(session, stream, service, opening)

        relay.desk._deliver = note


def collector(got: list[bytes]) -> Serve:
    async def serve(stream: trio.SocketStream) -> None:
        got.append(await receive_all(stream))
        await stream.send_all(b"ok")

    return serve


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
async def test_the_header_says_who_the_client_is(contexts: Contexts, header: bytes) -> None:
    openings: list[Opening] = []
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        noting(openings, plane)
        port = plane.add_door(proxy_from=PROXY)
        assert (await exchange(port, header + b"hello")) == b"hello"
        async with await connect(port) as stream:
            await stream.send_all(header)
            await stream.send_all(b"later")
            assert await receive_exactly(stream, 5) == b"later"
            (client,) = plane.doors[0].clients
            assert client.address == "192.0.2.7"
            assert plane.doors[0].admission._sources["192.0.2.7"].count == 1
        assert {opening.client for opening in openings} == {"192.0.2.7:5000"}


async def test_a_relay_that_is_tried_next_hears_of_the_same_client(contexts: Contexts) -> None:
    openings: list[Opening] = []
    async with open_plane(contexts) as plane:
        first = await plane.add_relay(await plane.serve(echo), name="a")
        await plane.add_relay(await plane.serve(echo), name="b")
        noting(openings, plane)
        first.desk.is_draining = True
        assert await exchange(plane.add_door(proxy_from=PROXY), V1 + b"hello") == b"hello"
        assert [opening.client for opening in openings] == ["192.0.2.7:5000"]


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
async def test_a_header_in_two_pieces_cut_at_every_byte(contexts: Contexts, header: bytes) -> None:
    got: list[bytes] = []
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(collector(got)))
        port = plane.add_door(proxy_from=PROXY)
        streams = [await connect(port) for _ in range(len(header))]
        for cut, stream in enumerate(streams):
            await stream.send_all(header[:cut] or header[:1])
        with trio.fail_after(10):
            while len(plane.doors[0].proxied) < len(header):
                await trio.sleep(0.01)
        for cut, stream in enumerate(streams):
            await stream.send_all((header + b"data")[cut or 1 :])
            await stream.send_eof()
            assert await receive_all(stream) == b"ok"
            await stream.aclose()
        assert got == [b"data"] * len(header)


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
async def test_a_header_that_ends_at_any_byte_is_reset(contexts: Contexts, header: bytes) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(proxy_from=PROXY)
        for cut in range(len(header)):
            stream = await connect(port)
            await stream.send_all(header[:cut])
            await stream.send_eof()
            assert await until_reset(stream, 3) == b""
        assert plane.doors[0].counters.refused == {"bad-proxy-header": len(header)}
        assert plane.relays[0].far_session.mux.opened == 0


async def test_no_header_and_a_wrong_one_are_reset(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(proxy_from=PROXY, header_timeout_s=0.3)
        for wrong in (b"GET / HTTP/1.1\r\n", V1.replace(b"5000", b"99999"), V2[:12] + b"\x31" + V2[13:], V2[:14] + b"\xff\xff"):
            stream = await connect(port)
            await stream.send_all(wrong)
            assert await until_reset(stream, 3) == b""
        silent, slow, gone = await connect(port), await connect(port), await connect(port)
        await slow.send_all(V1[:-1])
        reset(gone)
        for stream in (silent, slow):
            assert await until_reset(stream, 3) == b""
        assert plane.doors[0].counters.refused == {"bad-proxy-header": 5, "proxy-header-timeout": 2}
        assert "no PROXY header from 127.0.0.1" in caplog.text
        assert "GET" not in caplog.text


async def test_a_header_from_anyone_else_is_data(contexts: Contexts) -> None:
    openings: list[Opening] = []
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        noting(openings, plane)
        for networks in ((), ELSEWHERE):
            port = plane.add_door(proxy_from=networks)
            for header in (V1, V2):
                assert await exchange(port, header + b"x") == header + b"x"
        assert all(opening.client.startswith("127.0.0.1:") for opening in openings)


async def test_a_header_without_a_client_leaves_the_proxy_as_the_client(contexts: Contexts) -> None:
    openings: list[Opening] = []
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        noting(openings, plane)
        port = plane.add_door(proxy_from=PROXY)
        for header in (LOCAL, b"PROXY UNKNOWN\r\n"):
            assert await exchange(port, header + b"x") == b"x"
        assert all(opening.client.startswith("127.0.0.1:") for opening in openings)


async def test_limits_count_the_client_and_not_the_proxy(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(AdmissionLimits(connections_per_source=1), proxy_from=PROXY)
        streams = []
        for address in (b"192.0.2.7", b"192.0.2.8"):
            stream = await connect(port)
            await stream.send_all(V1.replace(b"192.0.2.7", address) + b"x")
            assert await receive_exactly(stream, 1) == b"x"
            streams.append(stream)
        again = await connect(port)
        await again.send_all(V1 + b"x")
        assert await until_reset(again) == b""
        assert plane.doors[0].counters.refused == {"source-full": 1}
        assert plane.doors[0].admission.connections == 2
        for stream in streams:
            await stream.aclose()


async def test_those_who_owe_a_header_are_bounded(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "MAX_HEADERS_AWAITED", 2)
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(proxy_from=PROXY)
        door = plane.doors[0]
        waiting = [await connect(port) for _ in range(2)]
        with trio.fail_after(10):
            while len(door.proxied) < 2:
                await trio.sleep(0.01)
        assert door.admission.connections == 2
        await refused(port)
        assert door.counters.refused == {"proxy-headers-full": 1}
        door.close()
        for stream in waiting:
            assert await until_reset(stream) == b""
        assert door.admission.connections == 0


async def test_those_who_owe_a_header_count_as_connections(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = plane.add_door(AdmissionLimits(connections_per_door=1), proxy_from=PROXY)
        stream = await connect(port)
        await stream.send_all(V1[:5])
        with trio.fail_after(10):
            while not plane.doors[0].proxied:
                await trio.sleep(0.01)
        await refused(port)
        assert plane.doors[0].counters.refused == {"door-full": 1}
        await stream.send_all(V1[5:] + b"x")
        assert await receive_exactly(stream, 1) == b"x"
        await stream.aclose()


def test_the_option_takes_addresses_and_networks() -> None:
    door = DoorSettings.model_validate(
        {"listen": "127.0.0.1:1", "service": "s", "proxy_from": ["10.0.0.5", "10.0.1.0/24", "2001:db8::/32"]}
    )
    networks = door.proxy_from
    inside = ("10.0.0.5", "10.0.1.255", "::ffff:10.0.0.5", "2001:db8::1", "2001:db8::1%eth0")
    outside = ("", "10.0.0.4", "10.0.2.0", "127.0.0.1", "2001:db9::1")
    assert [is_within(address, networks) for address in inside + outside] == [True] * 5 + [False] * 5
    with pytest.raises(ValueError, match="proxy_from"):
        DoorSettings.model_validate({"listen": "127.0.0.1:1", "service": "s", "proxy_from": ["10.0.1.5/24"]})
