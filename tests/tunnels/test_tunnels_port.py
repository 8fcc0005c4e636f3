"""The tunnel port with real TLS on loopback: enrolment, control links, data links, and everyone who should not get in."""

import contextlib
import errno
import gc
import socket
import ssl
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed
from tunnels_rig import GATEWAY, NODE, SSH, Rig, exactly, hello, reply, running, warnings_of

from fxgateway.tunnels.port import PortLimits
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import Channel
from fxtunnel.control.messages import Closing, Drain, Load, Ping, Refused, Services, Welcome, encode
from fxtunnel.control.upgrade import CONTROL_PATH, open_websocket
from fxtunnel.errors import PeerRefused, TunnelClosed
from fxtunnel.kit.tls import HandshakeFailed, TlsStream, client_context, handshake_client
from fxtunnel.kit.tokens import new_key, thumbprint
from fxtunnel.model import Offer, RelayId, ServiceName, SessionId
from fxtunnel.protocol import hello as wire


async def refused(rig: Rig, assertion: str | None = None) -> PeerRefused:
    stream = await rig.dial()
    headers = {"Authorization": f"Bearer {assertion or rig.assertion()}"}
    async with trio.open_nursery() as nursery:
        with pytest.raises(PeerRefused) as caught:
            await open_websocket(nursery, stream, "gw.example", CONTROL_PATH, headers)
    await stream.aclose()
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.01)


async def raw_answer(rig: Rig, data: bytes) -> bytes:
    stream = await rig.dial()
    answered = b""
    with trio.fail_after(5):
        await stream.send_all(data)
        try:
            while more := await stream.receive_some():
                answered += more
        except trio.BrokenResourceError:
            answered += b"<broken>"
    await trio.aclose_forcefully(stream)
    return answered


async def ended(stream: TlsStream) -> None:
    """Until the gateway has closed the connection."""
    with trio.fail_after(5):
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
    await trio.aclose_forcefully(stream)


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
            link, received, window = session.links[0]
            assert (received, window, answered.received) == (0, 4711, 0)
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
        with trio.fail_after(0.9):
            await ended(stream)


async def test_an_assertion_is_good_once(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        assertion = rig.assertion()
        async with rig.websocket(assertion):
            pass
        again = await refused(rig, assertion)
        assert (again.refusal, "used before" in str(again)) == (Refusal.BAD_ASSERTION, True)
        spent = rig.assertion()
        assert (await rig.enrol(assertion=spent))[0] == 200
        assert (await refused(rig, spent)).refusal is Refusal.BAD_ASSERTION


async def test_who_may_not_come_in(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        assert (await refused(rig)).refusal is Refusal.UNKNOWN_RELAY
        await rig.enrol()
        stranger = new_key()
        assert (await refused(rig, rig.assertion(key=stranger))).refusal is Refusal.UNKNOWN_RELAY
        assert (await refused(rig, rig.assertion(relay_id=RelayId("node-b")))).refusal is Refusal.UNKNOWN_RELAY
        assert (await refused(rig, "a.b.c")).refusal is Refusal.BAD_ASSERTION
        assert (await refused(rig, rig.assertion()[:-4] + "AAAA")).refusal is Refusal.BAD_ASSERTION
        skewed = await refused(rig, rig.assertion(skew_s=300))
        assert skewed.refusal is Refusal.CLOCK_SKEW
        rig.registry.full = True
        assert (await refused(rig)).refusal is Refusal.TOO_MANY
        rig.registry.full = False
        rig.registry.is_draining = True
        draining = await refused(rig)
        assert (draining.refusal, draining.retry_after_s > 0) == (Refusal.DRAINING, True)
        rig.registry.is_draining = False
        rig.identities.revoke(NODE)
        assert (await refused(rig)).refusal is Refusal.REVOKED
        assert rig.registry.calls == []


async def test_clock_skew_comes_with_the_gateways_time(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        status, answered = await rig.enrol(assertion=rig.assertion(skew_s=-300))
        assert (status, answered["error"]) == (401, "clock-skew")
        assert abs(answered["gateway_time_unix"] - time.time()) < 3


async def test_enrolments_that_fail(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        other = new_key()
        rig.identities.add_token("fxe_old", 1_700_000_000)
        for changed, expected in [
            ({"token": "fxe_wrong"}, (401, "bad-token")),
            ({"token": "fxe_old"}, (401, "expired-token")),
            ({"assertion": rig.assertion(key=other)}, (401, "bad-assertion")),
            ({"assertion": rig.assertion(relay_id=RelayId("x"))}, (401, "bad-assertion")),
            ({"v": 2}, (426, "version-mismatch")),
            ({"relay_id": "a b"}, (400, "bad-request")),
            ({"public_key": "AAAA"}, (400, "bad-request")),
            ({"token": None}, (400, "bad-request")),
            ({"pad": "x" * 9000}, (400, "bad-request")),
        ]:
            status, answered = await rig.enrol(**changed)
            assert (status, answered["error"]) == expected
        assert "2023-11-14" in (await rig.enrol(token="fxe_old"))[1]["message"]
        assert rig.identities.known() == ()
        assert (await rig.enrol())[0] == 200
        taken = await rig.enrol(key=other)
        assert (taken[0], taken[1]["error"]) == (409, "name-taken")
        assert "fxgateway forget node-a" in taken[1]["message"]
        rig.identities.revoke(NODE)
        assert (await rig.enrol())[1]["error"] == "revoked"


async def test_an_unwritable_state_is_told_to_try_again(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        (tmp_path / "relays.json.lock").unlink()
        (tmp_path / "relays.json.lock").symlink_to(tmp_path / "elsewhere")
        status, answered = await rig.enrol()
        assert (status, answered["retry_after_s"] > 0) == (429, True)


async def test_tokens_and_assertions_never_reach_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "fxgateway")
    async with running(tmp_path) as rig:
        await rig.enrol(token="fxe_canary")
        await rig.enrol()
        assertion = rig.assertion()
        async with rig.websocket(assertion):
            pass
        await refused(rig, assertion)
        async with rig.tickets() as ticket:
            text = await ticket()
            await (await rig.data_link(text))[0].aclose()
    assert "127.0.0.1" in warnings_of(caplog)
    assert not any(secret in caplog.text for secret in ("canary", rig.token, assertion, text))


async def test_a_control_link_feeds_the_registry(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            db = (Offer(ServiceName("db")),)
            for message in [hello(), Services(services=db), Load(streams=3), Drain(deadline_s=5), Ping(n=1)]:
                await ws.send_message(encode(message))
            await ws.send_message('{"type":"roster"}')
            with trio.fail_after(5):
                while "pong" not in await ws.get_message():
                    pass
            assert rig.registry.calls[1:] == [("services", NODE, "i1", db), ("load", NODE, "i1", 3), ("draining", NODE, "i1")]


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
            with trio.fail_after(5):
                closing = await channel.receive()
            assert isinstance(closing, Closing)
            assert closing.code is Code.REVOKED
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (encode(hello(v=2)), Refusal.VERSION_MISMATCH),
        (encode(hello(need=("teleport",))), Refusal.UNSUPPORTED),
        (encode(Load(streams=1)), Refusal.BAD_REQUEST),
        ("garbage", Refusal.BAD_REQUEST),
        (None, Refusal.TOO_MANY),
    ],
)
async def test_first_messages_that_are_refused(tmp_path: Path, first: str | None, code: Refusal) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            if first is not None:
                await ws.send_message(first)
            channel = Channel(ws)
            with trio.fail_after(5):
                answered = await channel.receive()
                assert isinstance(answered, Refused)
                assert answered.code is code
                with pytest.raises(TunnelClosed):
                    await channel.receive()
        assert rig.registry.calls == []


async def test_a_relay_revoked_between_assertion_and_hello_stays_out(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.websocket() as ws:
            rig.identities.revoke(NODE)
            await ws.send_message(encode(hello()))
            answered = await Channel(ws).receive()
            assert isinstance(answered, Refused)
            assert answered.code is Refusal.REVOKED


HEAD = b"GET /.fx/control HTTP/1.1\r\nHost: gw\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Sec-WebSocket-Protocol: \xff\xfe\r\n\r\n",
        HEAD + b"Connection: \x80Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /.fx/control HTTP/1.1\r\nHost: \xe9xn--\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: gw\r\n\r\n",
        HEAD + b"X: " + b"y" * 9000 + b"\r\n\r\n",
        HEAD + b"".join(b"X%d: y\r\n" % i for i in range(80)) + b"\r\n",
        HEAD + b"\r\n",
        HEAD + b"Authorization: Basic Zm9v\r\n\r\n",
        HEAD + b"Authorization: Bearer a.b.c\r\nAuthorization: Bearer a.b.c\r\n\r\n",
        b"POST /.fx/enrol HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=range(10),
)
async def test_a_bad_head_closes_that_one_connection(tmp_path: Path, data: bytes) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.control() as (channel, _):
            answered = await raw_answer(rig, data)
            assert answered.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 "))
            assert not answered.endswith(b"<broken>")
            channel.send_nowait(Ping(n=1))
            with trio.move_on_after(0.2):
                await channel.run(lambda _: None, heartbeat_s=1, dead_after_s=5)


async def test_other_paths_are_not_found(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        for line in (b"GET /", b"POST /.fx/control", b"GET /.fx/enrol", b"CONNECT x:1", b"GET /.fx/control?x"):
            assert (await raw_answer(rig, line + b" HTTP/1.1\r\nHost: gw\r\n\r\n")).startswith(b"HTTP/1.1 404 ")


async def test_garbage_instead_of_tls_gets_an_alert_and_is_closed_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        for data, has_alert in [
            (b"\x16\x03\x01\x00\x05hello", True),
            (b"\x16\x03\x01\xff\xff" + b"x" * 99, True),
            (b"GET / HTTP/1.1\r\n\r\n", False),
        ]:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(await rig.connect()))
            await stream.send_all(data)
            with trio.fail_after(0.9):
                answered = await stream.receive_some()
                assert answered.startswith(b"\x15") == has_alert  # as openssl s_server does: none for what is no TLS record at all
                while answered:
                    answered = await stream.receive_some()
            await stream.aclose()


async def test_no_common_alpn_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        with pytest.raises(HandshakeFailed):
            await rig.dial("h2")
        context = client_context(rig.ca_pem, ["x"])
        context.set_alpn_protocols([])
        sock = await rig.connect()
        with pytest.raises((HandshakeFailed, trio.BrokenResourceError)):
            await handshake_client(sock, context, "127.0.0.1")


async def test_silence_is_ended_in_time_at_every_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as rig:
        started = trio.current_time()
        silent = trio.SocketStream(trio.socket.from_stdlib_socket(await rig.connect()))
        half_head = await rig.dial()
        await half_head.send_all(HEAD)
        half_body = await rig.dial()
        await half_body.send_all(b"POST /.fx/enrol HTTP/1.1\r\nHost: gw\r\nContent-Length: 50\r\n\r\n{")
        half_hello = await rig.dial("fx-data/1")
        await half_hello.send_all(b"\xf0\x00")
        assert rig.port.pending == 4
        with trio.fail_after(3):
            assert await silent.receive_some() == b""
        for stream in (half_head, half_body, half_hello):
            await ended(stream)
        assert 0.8 < trio.current_time() - started < 2.5
        assert rig.port.pending == 0
        await silent.aclose()
        assert caplog.text.count("did not prove who it is within 1 s") == 4


async def test_silent_crowds_do_not_keep_a_good_relay_out(tmp_path: Path) -> None:
    async with running(tmp_path, PortLimits(hello_timeout_s=5, pending=100, pending_per_source=40)) as rig:
        await rig.enrol()
        silent = [await rig.connect(f"127.0.0.{1 + i % 8}") for i in range(200)]
        await trio.sleep(0.05)
        assert rig.port.pending <= 100
        started = trio.current_time()
        async with rig.control() as (_, welcome):
            assert isinstance(welcome, Welcome)
            assert trio.current_time() - started < 1
        for sock in silent:
            sock.close()


async def test_one_source_cannot_fill_the_lobby(tmp_path: Path) -> None:
    async with running(tmp_path, PortLimits(hello_timeout_s=5, pending=100, pending_per_source=4)) as rig:
        crowd = [await rig.connect("127.0.0.9") for _ in range(20)]
        other = await rig.connect("127.0.0.8")
        await trio.sleep(0.05)
        assert rig.port.pending == 5
        for sock in [*crowd, other]:
            sock.close()


async def test_a_connection_reset_at_any_moment_is_only_logged(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        for alpn in (None, "http/1.1", "fx-data/1"):
            sock: socket.socket | ssl.SSLSocket
            sock = await rig.connect() if alpn is None else (await rig.dial(alpn)).detach()[0]
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        with trio.fail_after(2):
            while rig.port.pending:
                await trio.sleep(0.01)
        gc.collect()  # a descriptor left to the garbage collector is a warning, thus an error


BOOMS = [RecursionError(), UnicodeError("x"), OSError(5, "x"), ExceptionGroup("x", [ValueError("y")]), MemoryError()]


@pytest.mark.parametrize("exc", BOOMS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", ["enter", "load", "leave", "new_session"])
async def test_no_error_of_ours_stops_the_port(tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, exc: BaseException) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        await rig.enrol(RelayId("node-b"), key := new_key())
        async with rig.websocket(rig.assertion(relay_id=RelayId("node-b"), key=key)) as bystander:
            await bystander.send_message(encode(hello("other")))
            assert "welcome" in await bystander.get_message()
            async with rig.tickets() as ticket:
                text = await ticket()
                rig.registry.boom[place] = exc
                stream = await rig.dial("fx-data/1")
                await stream.send_all(wire.encode_hello(wire.Hello(text)))
                if place == "new_session":
                    await ended(stream)
                else:
                    await reply(stream)
                    await stream.aclose()
            async with rig.websocket() as ws:
                await ws.send_message(encode(hello()))
                await ws.send_message(encode(Load(streams=1)))
                with trio.move_on_after(0.2), contextlib.suppress(ConnectionClosed):
                    while True:
                        await ws.get_message()
            rig.registry.boom.clear()
            await bystander.send_message(encode(Ping(n=3)))
            with trio.fail_after(5):
                assert "pong" in await bystander.get_message()
        assert "internal error" in caplog.text


@pytest.mark.parametrize("exc", BOOMS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ["handshake_server", "read_head", "accept_websocket", "answer"])
async def test_errors_in_the_adapters_do_not_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, exc: BaseException
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise exc

    async with running(tmp_path) as rig:
        await rig.enrol()
        with monkeypatch.context() as patch:
            patch.setattr(f"fxgateway.tunnels.port.{name}", fail)
            for target in (b"GET /", b"GET /.fx/control"):
                with contextlib.suppress(HandshakeFailed):
                    stream = await rig.dial()
                    head = target + b" HTTP/1.1\r\nHost: gw\r\nConnection: upgrade\r\n"
                    with contextlib.suppress(trio.BrokenResourceError):
                        await stream.send_all(head + b"Authorization: Bearer " + rig.assertion().encode() + b"\r\n\r\n")
                    await ended(stream)
        assert "internal error" in caplog.text
        async with rig.control() as (_, welcome):
            assert isinstance(welcome, Welcome)


async def test_running_out_of_descriptors_is_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED]
    with trio.socket.socket() as sample:
        socket_type = type(sample)
    accept = socket_type.accept

    async def short(self: Any) -> Any:
        result = await accept(self)
        if failures:
            result[0].close()
            raise OSError(failures.pop(), "no more")
        return result

    monkeypatch.setattr(socket_type, "accept", short)
    async with running(tmp_path) as rig:
        for _ in range(3):
            (await rig.connect()).close()
        with trio.fail_after(5):
            assert (await rig.enrol())[0] == 200
        assert caplog.text.count("takes no connections for a moment") == 2


async def test_stopping_says_goodbye_to_control_links(tmp_path: Path) -> None:
    seen: list[object] = []
    async with running(tmp_path) as rig, trio.open_nursery() as nursery:
        await rig.enrol()
        started = trio.Event()

        async def relay() -> None:
            async with rig.control() as (channel, _):
                started.set()
                with trio.fail_after(5):
                    seen.append(await channel.receive())

        nursery.start_soon(relay)
        await started.wait()
        rig.stop.cancel()
    assert seen == [Closing(code=Code.SHUTDOWN, retry_after_s=1.0)]
