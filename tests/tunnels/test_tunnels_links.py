"""Control and data links through the port, with real TLS on loopback: the way in, resuming, what is denied."""

import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from tunnels_rig import GATEWAY, NODE, SSH, ended, exactly, hello, reply, running, until

from fxgateway.tunnels.control import ControlConfig
from fxgateway.tunnels.peer_processes import SingleProcess
from fxgateway.tunnels.ports import Departures
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import Closing, Drain, Load, Ping, Refused, Services, Welcome, encode
from fxtunnel.errors import TunnelClosed
from fxtunnel.kit.tokens import thumbprint
from fxtunnel.model import InstanceId, Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol import hello as wire


async def test_the_way_in_from_enrolment_to_a_data_link(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        kid = thumbprint(rig.key.public_key())
        assert await rig.enrol() == (200, {"relay_id": NODE, "gateway_id": GATEWAY, "kid": kid})
        assert (await rig.enrol())[0] == 200
        async with rig.control() as (_, welcome):
            assert isinstance(welcome, Welcome)
            assert (welcome.epoch, welcome.gateway_id, welcome.caps) == (1, GATEWAY, ("resume",))
        await until(lambda: rig.registry.calls == [("enter", NODE, "i1", SSH), ("leave", NODE)])
        async with rig.tickets() as ticket:
            stream, answered = await rig.data_link(await ticket(), window=4711)
            assert isinstance(answered, wire.Welcome)
            session = rig.registry.sessions[answered.session]
            link, received = session.links[0]
            assert (received, answered.received) == (0, 0)
            link.send(b"from the session")
            assert await exactly(stream, 16) == b"from the session"
            await stream.aclose()


async def test_resuming_retires_the_old_link_first_and_quotes_the_counter(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.tickets() as ticket:
            first, answered = await rig.data_link(await ticket())
            assert isinstance(answered, wire.Welcome)
            session = rig.registry.sessions[answered.session]
            session.received = 1234
            second, answered = await rig.data_link(await ticket(session.id), session=session.id, received=99)
            assert isinstance(answered, wire.Welcome)
            assert (answered.session, answered.received) == (session.id, 1234)
            assert session.links[1][1] == 99
            assert session.log == ["detach", "attach"] * 2
            await first.aclose()
            await second.aclose()


async def test_bytes_right_behind_the_hello_belong_to_the_session(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.tickets() as ticket:
            stream = await rig.dial("fx-data/1")
            await stream.send_all(wire.encode_hello(wire.Hello(await ticket())) + b"early frames")
            answered = await reply(stream)
            assert isinstance(answered, wire.Welcome)
            link = rig.registry.sessions[answered.session].links[0][0]
            assert link.recv(100) == b"early frames"
            await stream.aclose()


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("replayed", Refusal.BAD_TICKET),
        ("made up", Refusal.BAD_TICKET),
        ("for a new session, used to resume", Refusal.BAD_TICKET),
        ("session is over", Refusal.UNKNOWN_SESSION),
        ("counter out of range", Refusal.BAD_RESUME),
        ("no room", Refusal.TOO_MANY),
        ("draining", Refusal.DRAINING),
        ("needs more", Refusal.UNSUPPORTED),
    ],
)
async def test_denied_data_links(tmp_path: Path, case: str, code: Refusal) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.tickets() as ticket:
            text, fields = await ticket(), dict[str, Any]()
            match case:
                case "replayed":
                    await (await rig.data_link(text))[0].aclose()
                case "made up":
                    text = "fxt_madeup"
                case "for a new session, used to resume":
                    fields = {"session": SessionId("0" * 32)}
                case "session is over":
                    gone = SessionId("0" * 32)
                    text, fields = await ticket(gone), {"session": gone}
                case "counter out of range":
                    stream, answered = await rig.data_link(text)
                    await stream.aclose()
                    assert isinstance(answered, wire.Welcome)
                    rig.registry.sessions[answered.session].refuses = True
                    text, fields = await ticket(answered.session), {"session": answered.session, "received": 9}
                case "no room":
                    rig.registry.here.clear()
                case "draining":
                    rig.registry.is_draining = True
                case "needs more":
                    fields = {"need": ("teleport",)}
            stream, denied = await rig.data_link(text, **fields)
            assert isinstance(denied, wire.Denied)
            assert denied.code is code
            await ended(stream)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x00" * 8,
        b"GET / HT",
        b"\xf0\x00\x10\x01\x00\x00\x00\x00",
        b"\xf1\x00\x00\x02\x00\x00\x00\x00{}",
        b"\xf0\x00\x00\x02\x00\x00\x00\x00[]",
        b"\xf0\x00\x0f\xff\x00\x00\x00\x00" + b"[" * 4095,
    ],
)
async def test_malformed_hellos_are_closed(tmp_path: Path, frame: bytes) -> None:
    async with running(tmp_path) as rig:
        stream = await rig.dial("fx-data/1")
        await stream.send_all(frame)
        with trio.fail_after(20):  # sooner than the time for a hello
            await ended(stream)


async def test_a_control_link_feeds_the_registry(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            db = (Offer(ServiceName("db")),)
            for message in [hello(), Services(services=db), Load(streams=3, reluctant=True), Drain(deadline_s=5), Ping(n=1)]:
                await ws.send_message(encode(message))
            await ws.send_message('{"type":"roster"}')
            with trio.fail_after(20):
                while "pong" not in await ws.get_message():
                    pass
            assert rig.registry.calls[1:] == [("services", NODE, "i1", db), ("reluctance", NODE, "i1", True), ("draining", NODE, "i1")]


async def test_what_a_relay_has_given_up_ends_once_its_new_session_is_up(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.tickets() as ticket:
            kept = SessionId("0" * 32)
            text = await ticket(None, sessions=(kept,))
            assert rig.registry.calls[-1] == ("note_sessions", NODE, "i1", (kept,))
            stream, answered = await rig.data_link(text)
            assert isinstance(answered, wire.Welcome)
            assert rig.registry.sessions[answered.session].log[-1] == "attach"
            assert rig.registry.calls[-2:] == [("new_session", NODE, "i1"), ("end_given_up", NODE, "i1")]
            rig.registry.calls.clear()
            await ticket(answered.session)
            assert rig.registry.calls == []
            await stream.aclose()


async def test_a_new_instance_fences_the_old_one(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.control("i1") as (older, _), rig.control("i2") as (_, welcome):
            assert isinstance(welcome, Welcome)
            assert welcome.epoch == 2
            closing = await older.receive()
            assert isinstance(closing, Closing)
            assert closing.code is Code.FENCED
            assert rig.registry.here[NODE][0] == "i2"


async def test_revoking_closes_the_live_link(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, trio.open_nursery() as nursery:
        await rig.enrol()

        async def watch() -> None:
            await rig.identities.watch(rig.registry.revoke, poll_s=0.01)

        nursery.start_soon(watch)
        async with rig.control() as (channel, _):
            rig.identities.revoke(NODE)
            with trio.fail_after(20):
                closing = await channel.receive()
            assert isinstance(closing, Closing)
            assert closing.code is Code.REVOKED
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (encode(hello(v=2)), Refusal.VERSION_MISMATCH),
        (encode(hello(need=("teleport",))), Refusal.UNSUPPORTED),
        (encode(hello(caps=("resume", "leaving"))), Refusal.DRAINING),
        (encode(Load(streams=1)), Refusal.BAD_REQUEST),
        ("garbage", Refusal.BAD_REQUEST),
        (None, Refusal.TOO_MANY),
    ],
)
async def test_first_messages_that_are_refused(tmp_path: Path, first: str | None, code: Refusal) -> None:
    async with running(tmp_path, config=ControlConfig(hello_timeout_s=1.0) if first is None else None) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            if first is not None:
                await ws.send_message(first)
            channel = Channel(ws)
            with trio.fail_after(20):
                answered = await channel.receive()
                assert isinstance(answered, Refused)
                assert answered.code is code
                with pytest.raises(TunnelClosed):
                    await channel.receive()
        assert rig.registry.calls == []


async def test_an_instance_that_drains_comes_back_only_where_it_is_known(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.control("i1") as (_, welcome):
            assert isinstance(welcome, Welcome)
            async with rig.websocket() as ws:
                await ws.send_message(encode(hello("i1", caps=("resume", "leaving"))))
                assert isinstance(await Channel(ws).receive(), Welcome)
            async with rig.websocket() as ws:
                await ws.send_message(encode(hello("i0", caps=("resume", "leaving"))))
                refused = await Channel(ws).receive()
                assert isinstance(refused, Refused)
                assert refused.retry_after_s == 30  # nothing changes for it before it is restarted


class Claims(SingleProcess):
    """The other processes of the gateway: what they are asked for, and what they say."""

    def __init__(self, says: Exception | None = None) -> None:
        super().__init__()
        self.claimed: list[InstanceId] = []
        self.says = says

    async def claim(self, relay_id: RelayId, instance: InstanceId, departures: Departures) -> int:
        await trio.lowlevel.checkpoint()
        self.claimed.append(instance)
        if self.says is not None:
            raise self.says
        return 0


async def test_an_instance_that_drains_takes_no_name_back(tmp_path: Path) -> None:
    """Its successor may have it by now, at another process, and would be fenced off."""
    async with running(tmp_path) as rig:
        await rig.enrol()
        rig.port._control._peer_processes = claims = Claims()
        async with rig.control("i1"), rig.websocket() as ws:
            await ws.send_message(encode(hello("i1", caps=("resume", "leaving"))))
            assert isinstance(await Channel(ws).receive(), Welcome)
    assert claims.claimed == [InstanceId("i1")]


async def test_whoever_has_lost_the_name_before_his_welcome_is_told_so(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        rig.port._control._peer_processes = Claims(TunnelClosed(Code.FENCED, "another instance has it now"))
        async with rig.control("i1") as (channel, answered):
            assert isinstance(answered, Closing)
            assert (answered.code, answered.message) == (Code.FENCED, "another instance has it now")
            with pytest.raises(TunnelClosed):
                await channel.receive()
        assert rig.registry.calls == []


def is_listened_at(address: tuple[str, int]) -> bool:
    with socket.socket() as client:
        return client.connect_ex(address) == 0


async def test_letting_go_of_the_address_leaves_links_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            await ws.send_message(encode(hello()))
            assert isinstance(await Channel(ws).receive(), Welcome)
            rig.port.stop_accepting()
            with trio.fail_after(20):
                while is_listened_at(rig.address):
                    await trio.sleep(0.01)
            await ws.send_message(encode(Load(streams=1)))
            await until(lambda: ("reluctance", NODE, "i1", False) in rig.registry.calls)
            rig.stop.cancel()


async def test_a_relay_revoked_between_assertion_and_hello_stays_out(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            rig.identities.revoke(NODE)
            await ws.send_message(encode(hello()))
            answered = await Channel(ws).receive()
            assert isinstance(answered, Refused)
            assert answered.code is Refusal.REVOKED


async def test_stopping_says_goodbye_to_control_links(tmp_path: Path) -> None:
    seen: list[object] = []
    async with running(tmp_path) as rig, trio.open_nursery() as nursery:
        await rig.enrol()
        started = trio.Event()

        async def relay() -> None:
            async with rig.control() as (channel, _):
                started.set()
                with trio.fail_after(20):
                    seen.append(await channel.receive())

        nursery.start_soon(relay)
        await started.wait()
        rig.stop.cancel()
    assert seen == [Closing(code=Code.SHUTDOWN, retry_after_s=1.0)]
