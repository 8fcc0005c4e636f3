"""`fxgateway connect` carries ends as they are: a half-close, a clean end, a reset; also over TLS."""

import errno
import io
import os
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from click.testing import CliRunner

import fxgateway.cli
from fxgateway.connect import Wanted, connect, forward
from fxgateway.connect_streams import TlsHalves
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.errors import FxError
from fxtunnel.kit.settings import Address
from fxtunnel.kit.tls_problems import no_forged_end

BLOB = bytes(range(256)) * 8192
Service = Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]


async def counting(stream: trio.abc.HalfCloseableStream) -> None:
    """Answers only after the client's end: how much it was."""
    count = 0
    async for block in stream:
        count += len(block)
    await stream.send_all(str(count).encode())
    await stream.send_eof()


async def ending_first(stream: trio.abc.HalfCloseableStream) -> None:
    """Ends its own way at once, and goes on listening."""
    await stream.send_eof()
    count = 0
    async for block in stream:
        count += len(block)
    assert count == len(BLOB)


async def resetting(stream: trio.abc.HalfCloseableStream) -> None:
    """Breaks off in the middle of an answer that has arrived so far."""
    await stream.send_all(b"part")
    await stream.receive_some(1)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def shake_hands(sock: socket.socket, context: ssl.SSLContext) -> Any:
    sock.setblocking(False)
    tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
    while True:
        try:
            tls.do_handshake()
            return tls
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(tls)
        except ssl.SSLError:
            tls.close()
            raise


@asynccontextmanager
async def gateway_with(service: Service, tls: bool, ended: list[str], tmp_path: Path) -> AsyncIterator[Wanted]:
    """A door that gives out `service` and nothing else. How each of its streams went is added to `ended`."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])
    no_forged_end(context).sslsocket_class = TlsSocket
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    async def serve(client: trio.SocketStream) -> None:
        stream: trio.abc.HalfCloseableStream = client
        if tls:
            stream = TlsHalves(await shake_hands(socket.socket(fileno=client.socket.detach()), context))
        async with stream:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += await stream.receive_some(1)
            await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: fx-stream\r\n\r\n")
            try:
                await service(stream)
                ended.append("clean")
            except trio.BrokenResourceError:
                ended.append("reset")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        yield Wanted("echo", f"{'https' if tls else 'http'}://127.0.0.1:{port}", ca_file=str(tmp_path / "ca.pem"))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def forwarder(wanted: Wanted) -> AsyncIterator[trio.SocketStream]:
    """A client of a local port that leads to the door."""
    async with trio.open_nursery() as nursery:
        address = await nursery.start(forward, wanted, Address("127.0.0.1", 0))
        async with await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2])) as client:
            with trio.fail_after(20):
                yield client
        nursery.cancel_scope.cancel()


async def received(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(block) async for block in stream])


@pytest.fixture(params=[False, True], ids=["http", "https"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_a_client_that_ends_its_side_still_gets_the_answer(tls: bool, tmp_path: Path) -> None:
    ended: list[str] = []
    async with gateway_with(counting, tls, ended, tmp_path) as wanted, forwarder(wanted) as client:
        await client.send_all(BLOB)
        await client.send_eof()
        assert await received(client) == str(len(BLOB)).encode()
    assert ended == ["clean"]


async def test_a_service_that_ends_its_side_still_hears_the_client(tls: bool, tmp_path: Path) -> None:
    ended: list[str] = []
    async with gateway_with(ending_first, tls, ended, tmp_path) as wanted, forwarder(wanted) as client:
        assert await client.receive_some() == b""
        await client.send_all(BLOB)
        await client.send_eof()
        while not ended:
            await trio.sleep(0.01)
    assert ended == ["clean"]


async def test_a_reset_of_the_service_is_a_reset_for_the_client(tls: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with gateway_with(resetting, tls, [], tmp_path) as wanted, forwarder(wanted) as client:
        assert await client.receive_some() == b"part"
        await client.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
    assert "the connection to echo broke" in capsys.readouterr().err


async def test_a_reset_of_the_client_is_a_reset_for_the_service(tls: bool, tmp_path: Path) -> None:
    ended: list[str] = []
    async with gateway_with(counting, tls, ended, tmp_path) as wanted, forwarder(wanted) as client:
        await client.send_all(b"x")
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
        while not ended:
            await trio.sleep(0.01)
    assert ended == ["reset"]


class NoTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_what_one_connection_meets_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be started for it, and there is no terminal any more to say so."""
    ended: list[str] = []
    failures = [RuntimeError("can't start new thread")]

    def ticket() -> str:
        if failures:
            raise failures.pop()
        return ""

    async with gateway_with(counting, False, ended, tmp_path) as wanted, trio.open_nursery() as nursery:
        address = await nursery.start(forward, replace(wanted, ticket=ticket), Address("127.0.0.1", 0))
        port = int(address.rpartition(":")[2])
        with trio.fail_after(20):
            monkeypatch.setattr(sys, "stderr", NoTerminal())
            async with await trio.open_tcp_stream("127.0.0.1", port) as unlucky:
                with pytest.raises(trio.BrokenResourceError):
                    await unlucky.receive_some(1)
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                await client.send_all(b"four")
                await client.send_eof()
                assert await client.receive_some() == b"4"
        nursery.cancel_scope.cancel()


async def test_a_door_that_is_not_there_is_said_in_a_few_words(autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        via = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(FxError, match=r"Connection refused; is a door of the gateway there\?$"):
            await connect(Wanted("echo", via))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a b", "--via", "http://gw"], "SERVICE: expected a name"),
        (["ssh", "--via", "http://gw", "--node", "x/y"], "--node: expected a name"),
        *(
            (["ssh", "--via", via], "--via: expected http://HOST:PORT")
            for via in ("gw:80", "ftp://gw", "http://", "http://gw:99999", "http://[::1")
        ),
        (["ssh", "--via", "http://gw/path"], "--via: expected http://HOST:PORT"),
        (["ssh", "--via", "http://gw", "--listen", "5901"], "--listen: expected HOST:PORT"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_dialled(words: list[str], expected: str) -> None:
    done = CliRunner().invoke(fxgateway.cli.main, ["connect", *words])
    assert (done.exit_code, expected in done.output) == (2, True), done.output


async def test_a_local_port_in_use_is_said_in_a_few_words() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(FxError, match=r"^cannot listen on 127\.0\.0\.1:\d+: Address already in use$"):
            await forward(Wanted("echo", "http://gw"), Address.parse(f"127.0.0.1:{held.getsockname()[1]}"))


async def test_an_authority_that_is_not_known_is_named_by_an_option(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)

    async def serve(stream: trio.SocketStream) -> None:
        with pytest.raises(ssl.SSLError), socket.socket(fileno=stream.socket.detach()) as sock:
            await shake_hands(sock, context)

    other, none = tmp_path / "other.pem", tmp_path / "none.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    none.write_text("no certificate")
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        via = f"https://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.fail_after(10):
            with pytest.raises(FxError, match=r"name it with --ca$"):
                await connect(Wanted("echo", via))
            with pytest.raises(FxError, match=r"not from an authority in .*other\.pem$"):
                await connect(Wanted("echo", via, ca_file=str(other)))
        with pytest.raises(FxError, match=r"none\.pem: holds no certificates in PEM format$"):
            await connect(Wanted("echo", f"https://127.0.0.1:{listener.socket.getsockname()[1]}", ca_file=str(none)))
        nursery.cancel_scope.cancel()
