"""System: a relay that is enrolled and lies. It may harm its own clients; not the gateway, and not the clients of others."""

import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from fxrelay.uplink.datalink import open_data_link
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.messages import Load, Services, TicketRequest, encode
from fxtunnel.errors import PeerRefused, TunnelError
from fxtunnel.model import Offer, ServiceName, SessionId
from fxtunnel.protocol import frames
from fxtunnel.protocol.hello import Hello
from tests.system.liars import PATIENCE_S, Liar, enrolled_liar, until
from tests.system.peers import Service, dial, is_served, say
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("liars")]

MIB = 1 << 20
KEPT_BYTES = 16 * MIB
"""What the gateway may grow by, whatever a liar says: two sessions' replay memory (2 MiB each) and what four clients have on their way
are 4 MiB; a client kept whole would be 30."""
TURNS = 10
TURN_LOOPS = 3_500_000
"""What an echo may cost the gateway of its processor's time, on average, in turns of an empty loop: seconds would be those of one machine.
It is 0.05 to 1.5 million; without the small pieces in which dear bytes are read 4 to 19, on a machine that is not busy otherwise."""
GONE = (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed, TunnelError)


def memory_bytes(stack: Stack) -> int:
    return psutil.Process(stack.gateway.pid).memory_info().rss


def cpu_s(stack: Stack) -> float:
    times = psutil.Process(stack.gateway.pid).cpu_times()
    return times.user + times.system


def push(client: socket.socket, size_bytes: int) -> threading.Thread:
    """A client that sends as much as anyone takes."""

    def run() -> None:
        with contextlib.suppress(OSError):
            client.sendall(bytes(size_bytes))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def stack(make_shared_stack: Callable[..., Stack], echo_service: Service) -> Stack:
    """An honest relay with two services; liars offer one of them as well. What a session may keep is little beside `KEPT_BYTES`."""
    stack = make_shared_stack("echo", "shared", extra="[resume]\nreplay_bytes = 2097152\n")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target, "shared": echo_service.target})
    return stack


async def test_a_relay_cannot_make_the_gateway_keep_more_for_a_replay(stack: Stack) -> None:
    """CREDIT before ACCEPT, and then REFUSE: what was sent until then would go to the honest relay, in a frame that none may send."""
    liar = await enrolled_liar(stack, "greedy", "shared")
    with dial(stack.doors["echo"]) as bystander, contextlib.ExitStack() as crowd:
        say(bystander)
        async with liar.control() as control, liar.data_link(control) as line:
            before = memory_bytes(stack)
            for _ in range(4):
                push(crowd.enter_context(dial(stack.doors["shared"])), 30 * MIB)
            _, stream_id, _ = await line.wait_for(frames.OPEN)
            await line.send(frames.encode_credit(stream_id, 1 << 30))
            with contextlib.suppress(trio.BrokenResourceError):
                for _ in range(25):  # the client sends what it may, and what came is acknowledged
                    await trio.sleep(0.02)
                    await line.send(frames.encode_u64(frames.ACK, line.received_bytes))
                await line.send(frames.encode_refuse(stream_id, Code.BUSY, "elsewhere, please"))
            assert await line.wait_closed() == Code.PROTOCOL_ERROR
            assert memory_bytes(stack) - before < KEPT_BYTES
            say(bystander, b"still here")
            await until(lambda: is_served(stack.doors["shared"]), "the honest relay serving alone")


async def test_what_belongs_to_others_is_not_had(stack: Stack) -> None:
    """Sessions of other relays, tickets that were used, counters that cannot be, and names that are somebody's."""
    liar = await enrolled_liar(stack, "thief", "shared")
    (theirs,) = sessions_of(stack, "node-a")
    with dial(stack.doors["echo"]) as bystander:
        say(bystander)
        async with liar.control() as control:
            await refused(liar, await control.ticket(theirs), theirs, 0, Refusal.UNKNOWN_SESSION)
            ticket = await control.ticket(None)
            sock, welcome = await open_data_link(liar.dialler, liar.url, Hello(ticket, None, 0))
            await refused(liar, ticket, None, 0, Refusal.BAD_TICKET)
            await refused(liar, await control.ticket(None), welcome.session, 0, Refusal.BAD_TICKET)
            await refused(liar, await control.ticket(theirs), welcome.session, 0, Refusal.BAD_TICKET)
            for received in (1 << 40, 2**63):
                await refused(liar, await control.ticket(welcome.session), welcome.session, received, Refusal.BAD_RESUME)
            sock.close()
        with pytest.raises(PeerRefused) as caught:
            await enrolled_liar(stack, "node-a", "shared")
        assert caught.value.refusal is Refusal.NAME_TAKEN
        say(bystander, b"still here")
        assert sessions_of(stack, "node-a") == [theirs]


async def test_floods_leave_a_bystander_its_turns(stack: Stack) -> None:
    """Frames and messages that are lawful one by one, as many as go through: nothing grows, the log is quiet, others are served."""
    liar = await enrolled_liar(stack, "flooder", "shared")
    services = encode(Services(services=tuple(Offer(ServiceName(f"s{number}")) for number in range(300))))
    flood = {
        "pings that are answered": frames.encode_u64(frames.PING, 1),
        "frames of later versions": frames.encode(0x80, 0),
        "acknowledgements of nothing": frames.encode_u64(frames.ACK, 0),
    }
    with dial(stack.doors["echo"]) as bystander:
        say(bystander)
        before, lines = memory_bytes(stack), stack.logs().count("\n")
        for name, frame in flood.items():
            async with liar.control() as control, liar.data_link(control) as line:
                flood_of = Flood(line.send, frame * 4_096)
                with contextlib.suppress(trio.BrokenResourceError):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(flood_of.run)
                        await trio.to_thread.run_sync(talk, stack, bystander, flood_of, name)
                        nursery.cancel_scope.cancel()
        for text in (services, encode(TicketRequest(request=1)), encode(Load(streams=1)), '{"type":"later"}'):
            async with liar.raw_control() as (websocket, _):
                flood_of = Flood(websocket.send_message, text)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(take_all, websocket)
                    nursery.start_soon(flood_of.run)
                    await trio.to_thread.run_sync(talk, stack, bystander, flood_of, text[:30])
                    nursery.cancel_scope.cancel()
        assert memory_bytes(stack) - before < KEPT_BYTES
        assert stack.logs().count("\n") - lines < 100


async def test_a_relay_revoked_while_it_resumes_stays_out(stack: Stack) -> None:
    """Whatever it holds at that moment: a session without a link, a fresh ticket, an open control link."""
    liar = await enrolled_liar(stack, "revoked", "shared")
    told = ""
    try:
        async with liar.control() as control:
            async with liar.data_link(control) as line:
                session = line.welcome.session
            ticket = await control.ticket(session)
            await trio.to_thread.run_sync(stack.gateway_cli, "revoke", "revoked")
            await until(lambda: "revoked" not in stack.live_relays(), "the revoked relay gone")
            with trio.fail_after(10):
                await trio.sleep_forever()  # what it is told ends this
    except* TunnelError as ended:
        told = str(ended.exceptions)
    assert "the administrator revoked this relay" in told
    await refused(liar, ticket, session, 0, Refusal.UNKNOWN_SESSION)
    with pytest.raises(PeerRefused) as caught:
        async with liar.control():
            pass
    assert caught.value.refusal is Refusal.REVOKED
    assert is_served(stack.doors["echo"])


def sessions_of(stack: Stack, name: str) -> list[SessionId]:
    """A relay's sessions as the gateway's status page names them."""
    return [SessionId(link["session"]) for link in stack.live_relays()[name]["links"]]


async def refused(liar: Liar, ticket: str, session: SessionId | None, received: int, why: Refusal) -> None:
    with pytest.raises(PeerRefused) as caught:
        await open_data_link(liar.dialler, liar.url, Hello(ticket, session, received))
    assert caught.value.refusal is why


class Flood:
    """The same again and again, until cancelled, or until nobody takes it any more."""

    def __init__(self, send: Callable[[object], Awaitable[None]], what: object) -> None:
        self.sent = 0
        self._send = send
        self._what = what

    async def run(self) -> None:
        with contextlib.suppress(*GONE):
            while True:
                await self._send(self._what)
                self.sent += 1
                await trio.lowlevel.checkpoint()


async def take_all(websocket: WebSocketConnection) -> None:
    with contextlib.suppress(*GONE):
        while True:
            await websocket.get_message()


def talk(stack: Stack, client: socket.socket, flood: Flood, what: str) -> None:
    """Echoes that have their turns in the gateway, between those of the flood."""
    before, sent, turns = cpu_s(stack), flood.sent, 0
    gives_up_at = time.monotonic() + PATIENCE_S
    while turns < TURNS or flood.sent - sent < TURNS:
        assert time.monotonic() < gives_up_at, f"{what}: no flood"
        say(client)
        turns += 1
    loops = (cpu_s(stack) - before) / turns / loop_s()
    assert loops < TURN_LOOPS, f"{what}: {loops:.0f}"


def loop_s(turns: int = 1_000_000) -> float:
    """What a turn of an empty loop costs here."""
    before = time.thread_time()
    for _ in range(turns):
        pass
    return (time.thread_time() - before) / turns
