"""Services whose name has several addresses: one that lets connections time out keeps nobody from the others."""

import socket

import pytest
import trio
from peers import LOOPBACK, connect, echo, hanging_port, receive_all, receive_exactly
from plane import SERVICE, Contexts, RelaySide, open_plane
from web_rig import OK, Canned, add_web_relay, ask, statuses

from fxrelay.delivery import delivery as delivery_module
from fxrelay.delivery.addresses import AVOIDED_S, Addresses
from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.services import Endpoint, Service
from fxrelay.web import link as link_module
from fxtunnel.kit.settings import Address

QUICK = DeliveryLimits(connect_timeout_s=2.0)
A, B, C = (Endpoint(socket.AF_INET, (LOOPBACK, port)) for port in (1, 2, 3))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ports that were connected to, in their order."""
    found: list[int] = []
    connect_to = delivery_module.connect

    def noting(endpoint: Endpoint) -> socket.socket | str:
        assert isinstance(endpoint.address, tuple)
        found.append(endpoint.address[1])
        return connect_to(endpoint)

    monkeypatch.setattr(delivery_module, "connect", noting)
    monkeypatch.setattr(link_module, "connect", noting)
    return found


def serve_http_at(relay: RelaySide, *ports: int) -> None:
    endpoints = tuple(Endpoint(socket.AF_INET, (LOOPBACK, port)) for port in ports)
    relay.table.replace([Service(SERVICE, Address.parse("127.0.0.1:1"), endpoints, "http")])


async def test_an_address_that_does_not_answer_leaves_time_for_the_next(contexts: Contexts, tried: list[int]) -> None:
    with hanging_port() as hanging:
        async with open_plane(contexts) as plane:
            relay = await plane.add_relay(limits=QUICK)
            port = await plane.serve(echo)
            relay.serves(hanging, port)
            door = plane.add_door()
            for _ in range(2):
                async with await connect(door) as stream:
                    await stream.send_all(b"x")
                    with trio.fail_after(8):
                        assert await receive_exactly(stream, 1) == b"x"
                    await stream.send_eof()
                    assert await receive_all(stream) == b""
            assert tried == [hanging, port, port], "who comes next is not made to wait for it"
            assert relay.desk.counters.refused_by_service == {}


async def test_addresses_that_none_answer_take_their_time_together(contexts: Contexts, tried: list[int]) -> None:
    with hanging_port() as one, hanging_port() as other:
        async with open_plane(contexts) as plane:
            relay = await plane.add_relay(limits=QUICK)
            relay.serves(one, other)
            async with await connect(plane.add_door()) as stream:
                await stream.send_all(b"x")
                with trio.fail_after(8), pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            assert tried[:2] == [one, other]
            assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-timeout": 1}}


async def test_a_request_goes_to_the_next_address_as_well(contexts: Contexts, tried: list[int]) -> None:
    with hanging_port() as hanging:
        async with open_plane(contexts) as plane:
            port = await plane.serve(Canned())
            relay, _ = await add_web_relay(plane, port, delivery=QUICK)
            serve_http_at(relay, hanging, port)
            door = plane.add_door()
            for _ in range(2):
                answer = await ask(door, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                assert statuses(answer) == statuses(OK)
            assert tried == [hanging, port, port]


def test_addresses_that_were_late_come_last_for_a_while() -> None:
    addresses = Addresses()
    assert addresses.in_order((A, B, C), 0.0) == (A, B, C)
    addresses.was_late(A, 0.0)
    assert addresses.in_order((A, B, C), 1.0) == (B, C, A)
    addresses.was_late(B, 10.0)
    assert addresses.in_order((A, B, C), 11.0) == (C, A, B)
    assert addresses.in_order((A,), 11.0) == (A,)
    assert addresses.in_order((A, B, C), AVOIDED_S) == (A, C, B)
    assert addresses.in_order((A, B, C), 10.0 + AVOIDED_S) == (A, B, C)
