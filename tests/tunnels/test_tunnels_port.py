"""The port among strangers, with real TLS on loopback: garbage, silence, crowds, resets, and errors of our own."""

import contextlib
import errno
import gc
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed
from tunnels_rig import ended, hello, raw_answer, reply, running, until

from fxgateway.tunnels.port import PortLimits
from fxgateway.tunnels.pre_auth_queue import SILENT_S, PreAuthQueue
from fxtunnel.control.busy import BUSY_BYTES, parse_busy
from fxtunnel.control.messages import Load, Ping, Welcome, encode
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.kit.tls import HandshakeFailed, client_context, handshake_client
from fxtunnel.kit.tokens import new_key
from fxtunnel.model import RelayId
from fxtunnel.protocol import hello as wire

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
            with trio.fail_after(20):  # sooner than the time for a hello
                answered = await stream.receive_some()
                assert answered.startswith(b"\x15") == has_alert  # as openssl s_server does: none for what is no TLS record at all
                while answered:
                    answered = await stream.receive_some()
            await stream.aclose()


async def test_no_common_alpn_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        with pytest.raises(HandshakeFailed):
            await rig.dial("h2")
        context = client_context(rig.ca_pem, [])
        sock = await rig.connect()
        with pytest.raises((HandshakeFailed, trio.BrokenResourceError)):
            await handshake_client(sock, context, "127.0.0.1")


async def test_silence_is_ended_in_time_at_every_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path, PortLimits(hello_timeout_s=2, pending=256, pending_per_source=64)) as rig:
        started = trio.current_time()
        silent = trio.SocketStream(trio.socket.from_stdlib_socket(await rig.connect()))
        half_head = await rig.dial()
        await half_head.send_all(HEAD)
        half_body = await rig.dial()
        await half_body.send_all(b"POST /.fx/enrol HTTP/1.1\r\nHost: gw\r\nContent-Length: 50\r\n\r\n{")
        half_hello = await rig.dial("fx-data/1")
        await half_hello.send_all(b"\xf0\x00")
        assert rig.port.pending == 4
        with trio.fail_after(20):
            assert await silent.receive_some() == b""
        for stream in (half_head, half_body, half_hello):
            await ended(stream)
        assert trio.current_time() - started >= 2
        assert rig.port.pending == 0
        await silent.aclose()
        assert caplog.text.count("did not prove who it is within 2 s") == 4


async def test_silent_crowds_do_not_keep_a_good_relay_out(tmp_path: Path) -> None:
    async with running(tmp_path, PortLimits(hello_timeout_s=60, pending=100, pending_per_source=40)) as rig:
        await rig.enrol()
        silent = [await rig.connect(f"127.0.0.{1 + i % 8}") for i in range(200)]
        await trio.sleep(2 * SILENT_S)
        assert rig.port.pending <= 100
        started = trio.current_time()
        async with rig.control() as (_, welcome):
            assert isinstance(welcome, Welcome)
            assert trio.current_time() - started < 20  # not only when the silent ones are gone
        for sock in silent:
            sock.close()


async def test_one_source_cannot_fill_the_lobby(tmp_path: Path) -> None:
    async with running(tmp_path, PortLimits(hello_timeout_s=60.0, pending=100, pending_per_source=4)) as rig:
        crowd = [await rig.connect("127.0.0.9") for _ in range(20)]
        other = await rig.connect("127.0.0.8")
        with trio.fail_after(20):
            while rig.port.pending < 5:
                await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert rig.port.pending == 5
        for sock in [*crowd, other]:
            sock.close()


async def test_a_busy_port_says_so_before_tls_and_finishes_what_it_has_begun(tmp_path: Path) -> None:
    """Both places are taken by clients that have said their hello and wait for us; there is one turn, which a slow one has."""
    async with running(tmp_path, PortLimits(hello_timeout_s=60.0, pending=2, pending_per_source=2, at_once=1)) as rig:
        await rig.enrol()
        await until(lambda: not rig.port.pending)
        hello_bytes = client_hello("http/1.1")
        crowd = [await rig.connect() for _ in range(2)]
        for sock in crowd:
            sock.sendall(hello_bytes)
        await until(lambda: rig.port.pending == 2)
        late = await rig.connect()
        late.sendall(hello_bytes)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(late))
        with trio.fail_after(20):
            line = bytes(await stream.receive_some(BUSY_BYTES))
        retry_after = parse_busy(line)
        assert retry_after is not None
        assert 0 < retry_after.retry_after_s < 20
        assert rig.port.refused == {"busy": 1}
        await stream.aclose()
        for sock in crowd:
            sock.close()
        with trio.fail_after(20):
            while rig.port.pending:
                await trio.sleep(0.01)
        async with rig.control() as (_, welcome):
            assert isinstance(welcome, Welcome)


def client_hello(alpn: str) -> bytes:
    context, outgoing = ssl.create_default_context(), ssl.MemoryBIO()
    context.set_alpn_protocols([alpn])
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def test_a_connection_reset_at_any_moment_is_only_logged(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        for alpn in (None, "http/1.1", "fx-data/1"):
            sock: socket.socket | LinkSocket
            sock = await rig.connect() if alpn is None else (await rig.dial(alpn)).detach()[0]
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        with trio.fail_after(20):
            while rig.port.pending:
                await trio.sleep(0.01)
        gc.collect()  # a descriptor left to the garbage collector is a warning, thus an error


BOOMS = [RecursionError(), UnicodeError("x"), OSError(5, "x"), ExceptionGroup("x", [ValueError("y")]), MemoryError()]


@pytest.mark.parametrize("exc", BOOMS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", ["enter", "reluctance", "leave", "new_session"])
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
            with trio.fail_after(20):
                assert "pong" in await bystander.get_message()
        assert "internal error" in caplog.text


async def test_strangers_that_hold_every_turn_do_not_keep_a_good_relay_out(tmp_path: Path) -> None:
    limits = PortLimits(hello_timeout_s=60.0, pending=24, pending_per_source=24, at_once=2)
    async with running(tmp_path, limits) as rig:
        await rig.enrol()
        hello_begun = b"\x16\x03\x01\x02\x00\x01"
        crowd = [await rig.connect("127.0.0.2") for _ in range(24)]
        for sock in crowd:
            sock.sendall(hello_begun)
        await until(lambda: rig.port.pending == 24)
        await trio.sleep(0.1)
        with trio.fail_after(20):
            async with rig.control() as (_, welcome):
                assert isinstance(welcome, Welcome)
        for sock in crowd:
            sock.close()


async def test_a_bug_in_the_order_of_turns_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, PortLimits(hello_timeout_s=60.0, at_once=1)) as rig:
        await rig.enrol()
        really, failed = PreAuthQueue._end_long_turns, trio.Event()

        def fail(pre_auth_queue: PreAuthQueue) -> None:
            monkeypatch.setattr(PreAuthQueue, "_end_long_turns", really)
            failed.set()
            raise RuntimeError("a bug")

        monkeypatch.setattr(PreAuthQueue, "_end_long_turns", fail)
        idler = await rig.connect("127.0.0.2")
        idler.sendall(b"\x16")
        await until(lambda: rig.port.pending == 1)
        with trio.fail_after(20):
            async with rig.control() as (_, welcome):
                assert isinstance(welcome, Welcome)
        assert failed.is_set()
        assert "taking turns back from slow relays failed" in caplog.text
        idler.close()


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
                        await stream.send_all(head + b"Authorization: Bearer " + rig.assertion()(stream).encode() + b"\r\n\r\n")
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
        with trio.fail_after(20):
            assert (await rig.enrol())[0] == 200
        assert caplog.text.count("takes no connections for a moment") == 2
