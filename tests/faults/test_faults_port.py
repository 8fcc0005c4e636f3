"""R10: an exception at every await of a relay's connection. The port, the other relays and their links do not notice."""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from sabotage import FAULTS, LIMIT, Fault, Sabotage, lines_about, sabotage
from tunnels_rig import NODE, Rig, hello, reply, running, until

from fxgateway.tunnels.control import ControlConfig
from fxgateway.tunnels.port import PortLimits
from fxtunnel.codes import Code
from fxtunnel.control import channel
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import Closing, Load, Ping, Services, TicketRequest, encode
from fxtunnel.control.upgrade import CONTROL_PATH, open_websocket
from fxtunnel.errors import TunnelError
from fxtunnel.kit import process
from fxtunnel.kit.tokens import new_key
from fxtunnel.model import Offer, RelayId, ServiceName
from fxtunnel.protocol import hello as wire

ROOT = "TunnelPort._serve"
KEY = new_key()

Scenario = Callable[[Rig, RelayId], Awaitable[None]]


async def enrols(rig: Rig, relay_id: RelayId) -> None:
    await rig.enrol(RelayId(f"new-{relay_id}"), new_key())


async def uses_a_control_link(rig: Rig, relay_id: RelayId) -> None:
    stream = await rig.dial()
    try:
        async with trio.open_nursery() as nursery:
            headers = {"Authorization": f"Bearer {rig.assertion(relay_id=relay_id, key=KEY)(stream)}"}
            ws = await open_websocket(nursery, stream, "gw.example", CONTROL_PATH, headers)
            await ws.send_message(encode(hello()))
            await Channel(ws).receive()
            await ws.send_message(encode(TicketRequest(request=1)))
            await ws.send_message(encode(Services(services=(Offer(ServiceName("web")),))))
            await ws.send_message(encode(Load(streams=3)))
            await ws.send_message(encode(Ping(n=1)))
            heard = 0
            while heard < 3:  # the ticket, a ping and a pong
                await ws.get_message()
                heard += 1
            await ws.send_message(encode(Closing(code=Code.NORMAL)))
            with contextlib.suppress(Exception):
                await ws.get_message()
            nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)


async def is_turned_away(rig: Rig, relay_id: RelayId) -> None:
    async with rig.websocket(lambda _: "not.a.token"):
        pass


async def opens_a_data_link(rig: Rig, relay_id: RelayId) -> None:
    ticket = rig.port._data._tickets.issue(NODE, hello().instance, None, trio.current_time())
    stream = await rig.dial("fx-data/1")
    try:
        raw = wire.encode_hello(wire.Hello(ticket))
        await stream.send_all(raw[:5])
        await stream.send_all(raw[5:])
        await reply(stream)
    finally:
        await trio.aclose_forcefully(stream)


async def brings_a_bad_ticket(rig: Rig, relay_id: RelayId) -> None:
    stream = await rig.dial("fx-data/1")
    try:
        await stream.send_all(wire.encode_hello(wire.Hello("fxt_nothing")))
        await reply(stream)
    finally:
        await trio.aclose_forcefully(stream)


SCENARIOS: tuple[Scenario, ...] = (enrols, uses_a_control_link, is_turned_away, opens_a_data_link, brings_a_bad_ticket)


@pytest.mark.parametrize(
    ("scenario", "at_once"),
    [*((scenario, 32) for scenario in SCENARIOS), (opens_a_data_link, 1)],
    ids=lambda value: getattr(value, "__name__", f"{value} at once"),
)
async def test_a_fault_at_every_await_of_a_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, at_once: int
) -> None:
    caplog.set_level(logging.WARNING)
    victims = [RelayId(f"victim-{number}") for number in range(len(FAULTS))]
    limits = PortLimits(hello_timeout_s=2.0, pending=256, pending_per_source=64, at_once=at_once)
    monkeypatch.setattr(channel, "GOODBYE_S", 0.02)
    hits = told = 0
    async with running(tmp_path, limits, ControlConfig(heartbeat_s=0.03, dead_after_s=30.0, hello_timeout_s=2.0)) as rig:
        for victim in (NODE, *victims):
            rig.identities.enrol(victim, (rig.key if victim == NODE else KEY).public_key(), rig.token)
        async with rig.websocket() as bystander:
            await bystander.send_message(encode(hello()))
            nth = 0
            while True:
                nth += 1
                assert nth < LIMIT
                with sabotage(nth, ROOT) as done:
                    await everyone(rig, scenario, victims)
                    await until(lambda done=done: done.is_over)
                    await until(lambda: rig.port.pending == 0 and set(rig.registry.here) == {NODE})
                told += judge(done, caplog)
                hits += len(done.hit)
                caplog.clear()
                if not done.hit:
                    break
                await bystander.send_message(encode(TicketRequest(request=nth)))
                with trio.fail_after(20):
                    while f'"request":{nth},"ticket"' not in str(await bystander.get_message()).replace(" ", ""):
                        pass
                for session in rig.registry.sessions.values():
                    for link, _ in session.links:
                        link.close()
                rig.registry.sessions.clear()
    assert hits > 5 * len(FAULTS)
    assert told > hits / 2


async def everyone(rig: Rig, scenario: Scenario, victims: list[RelayId]) -> None:
    """Each victim goes through the scenario; how it ends for it is of no interest."""

    async def one(victim: RelayId) -> None:
        with trio.move_on_after(10), contextlib.suppress(Exception):
            await scenario(rig, victim)

    async with trio.open_nursery() as nursery:
        for victim in victims:
            nursery.start_soon(one, victim)


def judge(done: Sabotage, caplog: pytest.LogCaptureFixture) -> int:
    """No fault is told twice. Returns how many are in the log with their tracebacks; the others were taken for the peer's (in the
    handshake), or met a WebSocket that was closing anyway."""
    told = 0
    for tree in done.hit:
        lines = lines_about(tree.fault, caplog)
        assert len(lines) <= 1, (tree.where, [line.getMessage() for line in lines])
        assert all(line.levelno == logging.ERROR and "internal error" in line.getMessage() for line in lines)
        told += len(lines)
    return told


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault()).__name__)
async def test_the_port_goes_on_accepting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(process, "PAUSE_S", 0.01)
    hits = 0
    for nth in range(1, 8):
        path = tmp_path / str(nth)
        path.mkdir()
        with sabotage(nth, "TunnelPort._accept", "keep_going", faults=[fault]) as done:
            async with running(path, PortLimits(hello_timeout_s=2.0, at_once=1)) as rig:
                for number in range(8):
                    with contextlib.suppress(OSError, TunnelError, trio.BrokenResourceError):  # nobody has it who was just accepted
                        await rig.enrol(RelayId(f"new-{number}"), new_key())
                assert (await rig.enrol())[0] == 200, [tree.where for tree in done.hit]
        hits += len(done.hit)
    assert hits >= 7
