"""Streams whose client speaks TLS with the gateway: bytes, ends in order, and ends out of order."""

import hashlib
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
import trio
from peers import echo, pattern, receive_all, receive_exactly, reset, until_read, until_reset
from plane import Contexts, open_plane
from tls_door import WebClient, add_tls_door, in_thread

from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.web_tls import server_context

MIB = 1 << 20
AUTHORITY = new_authority("test authority")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    directory: Path = tmp_path_factory.mktemp("web")
    certificate, key = issue_server_certificate(AUTHORITY, ["web.test"])
    (directory / "web.pem").write_text(certificate)
    write_secret(directory / "web.key", key)
    return server_context([(directory / "web.pem", directory / "web.key")])


def browser(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, *alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=AUTHORITY.cert_pem)
    context.maximum_version = version
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


BOTH = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2], ids=["1.3", "1.2"])


@BOTH
async def test_bulk_both_ways_at_once(contexts: Contexts, web: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    data = pattern(50 * MIB + 12_345)
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, web)

        def client() -> str:
            with WebClient(port, browser(version)).handshake() as web_client:
                return sha256(web_client.exchange(data))

        assert await in_thread(client) == sha256(data)


async def test_many_small_records(contexts: Contexts, web: ssl.SSLContext) -> None:
    """More records in one segment than are read in one turn, and the close_notify right behind them, with no event of its own."""
    data = pattern(3_000)
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, web)

        def client() -> bytes:
            with WebClient(port, browser()).handshake() as web_client:
                for at in range(len(data)):
                    web_client.tls.write(data[at : at + 1])
                web_client.end(fin=False)
                return web_client.read_all()

        assert await in_thread(client) == data


@BOTH
@pytest.mark.parametrize("size", [1, 4_096, 16_384, 16_385, 100_000])
async def test_data_and_close_notify_in_one_segment_without_fin(
    contexts: Contexts, web: ssl.SSLContext, version: ssl.TLSVersion, size: int
) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, web)

        def client() -> bytes:
            with WebClient(port, browser(version)).handshake() as web_client:
                web_client.tls.write(pattern(size))
                web_client.end(fin=False)
                return web_client.read_all()

        assert await in_thread(client) == pattern(size)


@pytest.mark.parametrize("head_bytes", [0, 100, 60_000])
async def test_request_with_the_last_flight_of_the_handshake(contexts: Contexts, web: ssl.SSLContext, head_bytes: int) -> None:
    """What a door peeks at, more of it than an OPEN may carry, is delivered all the same, and first."""
    data = pattern(70_000)
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        door, port = add_tls_door(plane, web, head_bytes=head_bytes)

        def client() -> bytes:
            with WebClient(port, browser()).handshake(also=data) as web_client:
                answer = web_client.read_exactly(len(data))
                web_client.write(b"more")
                answer += web_client.read_exactly(4)
                web_client.end()
                assert web_client.read() == b""
                return answer

        assert await in_thread(client) == data + b"more"
        assert door.heads == ([data[:head_bytes]] if head_bytes else [])


async def test_head_of_single_bytes(contexts: Contexts, web: ssl.SSLContext) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        door, port = add_tls_door(plane, web, head_bytes=5_000)

        def client() -> bytes:
            with WebClient(port, browser()).handshake() as web_client:
                for byte in pattern(2_000):
                    web_client.tls.write(bytes([byte]))
                web_client.end()
                return web_client.read_all()

        assert await in_thread(client) == pattern(2_000)
        assert door.heads == [pattern(2_000)]


@BOTH
async def test_client_ends_first_and_still_gets_the_answer(contexts: Contexts, web: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        request = await receive_all(stream)
        await trio.sleep(0.02)
        await stream.send_all(sha256(request).encode() + pattern(2 * MIB))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> bytes:
            with WebClient(port, browser(version)).handshake() as web_client:
                web_client.write(pattern(300_000, 3))
                web_client.end()
                return web_client.read_all()

        assert await in_thread(client) == sha256(pattern(300_000, 3)).encode() + pattern(2 * MIB)


@BOTH
async def test_service_ends_first_while_the_client_is_sending(contexts: Contexts, web: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    """Its end becomes close_notify and FIN in the middle of the client's data, of which nothing is lost."""
    got: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        got.append(await receive_exactly(stream, 100_000))
        await stream.send_all(b"bye")
        await stream.send_eof()
        await trio.sleep(0.1)  # the window is full, and TLS holds part of a record
        got.append(await receive_all(stream))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> bytes:
            with WebClient(port, browser(version)).handshake() as web_client:
                web_client.write(pattern(8 * MIB))
                answer = web_client.read_all()
                assert web_client.sock.recv(1) == b""  # the FIN behind it
                web_client.write(b"and more")  # a client may go on after the other's end (RFC 8446, 6.1)
                web_client.end()
                return answer

        assert await in_thread(client) == b"bye"
        with trio.fail_after(5):
            while len(got) < 2:
                await trio.sleep(0.01)
        assert b"".join(got) == pattern(8 * MIB) + b"and more"


async def test_goodbye_waits_for_a_client_that_reads_late(contexts: Contexts, web: ssl.SSLContext) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(pattern(12 * MIB))

    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)
        client = WebClient(port, browser())
        with client:
            await in_thread(client.handshake)
            with trio.fail_after(5):
                while not relay.far_session.mux.bytes_in > 100_000:
                    await trio.sleep(0.01)
            await trio.sleep(0.2)
            assert sha256(await in_thread(client.read_all)) == sha256(pattern(12 * MIB))
            client.end()


@BOTH
@pytest.mark.parametrize("size", [0, 10, 200_000])
async def test_fin_without_close_notify_is_a_reset(contexts: Contexts, web: ssl.SSLContext, version: ssl.TLSVersion, size: int) -> None:
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hi")
        seen.append(await until_reset(stream, 5))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> None:
            with WebClient(port, browser(version)).handshake() as web_client:
                assert web_client.read_exactly(2) == b"hi"
                if size:
                    web_client.write(pattern(size))
                web_client.sock.shutdown(socket.SHUT_WR)
                assert web_client.until_broken() == b""

        await in_thread(client)
        with trio.fail_after(5):
            while not seen:
                await trio.sleep(0.01)
        assert pattern(size).startswith(seen[0])


async def test_half_a_record_and_fin_is_a_reset(contexts: Contexts, web: ssl.SSLContext) -> None:
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        seen.append(await until_reset(stream, 5))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> None:
            with WebClient(port, browser()).handshake() as web_client:
                web_client.tls.write(b"whole")
                web_client.tls.write(b"cut" * 100)
                web_client.sock.sendall(web_client.outgoing.read()[:-1])
                web_client.sock.shutdown(socket.SHUT_WR)
                web_client.until_broken()

        await in_thread(client)
        with trio.fail_after(5):
            while not seen:
                await trio.sleep(0.01)
        assert b"whole".startswith(seen[0])


async def test_reset_of_the_client_reaches_the_service(contexts: Contexts, web: ssl.SSLContext) -> None:
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        seen.append(await until_reset(stream, 5))

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> None:
            with WebClient(port, browser()).handshake() as web_client:
                web_client.write(b"x")
                web_client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        await in_thread(client)
        with trio.fail_after(5):
            while not seen:
                await trio.sleep(0.01)


async def test_forged_record_is_a_reset(contexts: Contexts, web: ssl.SSLContext) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await until_reset(stream, 5)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> None:
            with WebClient(port, browser()).handshake() as web_client:
                web_client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
                with pytest.raises((ConnectionResetError, ssl.SSLError)):
                    web_client.read()

        await in_thread(client)


@BOTH
@pytest.mark.parametrize("size", [0, 10, 100_000])
async def test_reset_of_the_service_is_never_a_clean_end(
    contexts: Contexts, web: ssl.SSLContext, version: ssl.TLSVersion, size: int
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(pattern(size))
        reset(stream)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, web)

        def client() -> None:
            with WebClient(port, browser(version)).handshake() as web_client:
                got = web_client.until_broken()
            assert pattern(size).startswith(got)

        for _ in range(5):
            await in_thread(client)


async def test_client_that_does_not_read_holds_up_only_itself(contexts: Contexts, web: ssl.SSLContext) -> None:
    sent = 0

    async def floods(stream: trio.SocketStream) -> None:
        nonlocal sent
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        if await stream.receive_some(1) == b"e":
            await stream.send_all(b"!")
            await stream.send_eof()
            return
        while True:
            await stream.send_all(pattern(65_536))
            sent += 65_536

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(floods))
        _, port = add_tls_door(plane, web)

        def stalled() -> WebClient:
            client = WebClient(port, browser())
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            client.handshake().write(b"f")
            return client

        def lively() -> None:
            with WebClient(port, browser()).handshake(also=b"e") as client:
                assert client.read_all() == b"!"
                client.end()

        with await in_thread(stalled) as client:
            before = -1
            with trio.fail_after(10):
                while before != sent:
                    before = sent
                    await trio.sleep(0.2)
            assert sent < 12 * MIB
            await in_thread(lively)
            assert await in_thread(lambda: client.read_exactly(MIB // 2)) == pattern(65_536) * 8
            reset_on_close = b"\1\0\0\0\0\0\0\0"
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
        await plane.quiet(5)


async def test_another_relay_is_tried_with_what_was_peeked(contexts: Contexts, web: ssl.SSLContext) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(1, name="a")  # nothing listens there
        await plane.add_relay(await plane.serve(echo), name="b")
        _, port = add_tls_door(plane, web, head_bytes=10_000)

        def client() -> bytes:
            with WebClient(port, browser()).handshake(also=pattern(20_000)) as web_client:
                web_client.end()
                return web_client.read_all()

        for _ in range(4):
            assert await in_thread(client) == pattern(20_000)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
async def test_key_updates_by_the_client(contexts: Contexts, web: ssl.SSLContext) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, web)
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-quiet", "-no_ign_eof"]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        assert process.stdout is not None
        seen = b""
        try:
            for number in range(3):
                await process.stdin.send_all(b"line %d\n" % number)
                with trio.fail_after(30):
                    while b"line %d\n" % number not in seen:
                        seen += await process.stdout.receive_some()
                await process.stdin.send_all(b"K\n")  # KeyUpdate, and asks for ours
                await until_read(process.stdin)
            assert b"K" not in seen
        finally:
            process.kill()
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()
