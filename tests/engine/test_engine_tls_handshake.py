"""Handshakes at a door that ends TLS: those that succeed, those that cannot, and those that never end."""

import os
import resource
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio
from peers import LOOPBACK, echo, pattern
from plane import Contexts, open_plane
from tls_door import TlsDoor, WebClient, add_tls_door, in_thread

from fxtunnel.engine import lingering_close
from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.web_tls import server_context

AUTHORITY = new_authority("test authority")
HTTP = b"GET / HTTP/1.1\r\nHost: web.test\r\n\r\n"
ANSWER = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    directory: Path = tmp_path_factory.mktemp("web")
    found = []
    for number, names in enumerate((["web.test"], ["*.apps.test", "apps.test"], ["one.apps.test"])):
        certificate, key = issue_server_certificate(AUTHORITY, names)
        paths = directory / f"{number}.pem", directory / f"{number}.key"
        paths[0].write_text(certificate)
        write_secret(paths[1], key)
        found.append(paths)
    return found


def browser(*alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=AUTHORITY.cert_pem)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


async def failure(door: TlsDoor) -> str:
    with trio.fail_after(5):
        while not door.seen.failed:
            await trio.sleep(0.01)
    assert not door.seen.under_way
    return door.seen.failed[0]


def raw(port: int, data: bytes) -> bytes:
    """Send bytes, and read to the clean end."""
    with socket.create_connection((LOOPBACK, port), timeout=5) as sock:
        sock.sendall(data)
        answer = b""
        while more := sock.recv(4096):
            answer += more
        return answer


async def test_hello_that_arrives_byte_by_byte(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, server_context(pairs))

        def client() -> bytes:
            with WebClient(port, browser()) as slow:
                with pytest.raises(ssl.SSLWantReadError):
                    slow.tls.do_handshake()
                for byte in slow.outgoing.read():
                    slow.sock.sendall(bytes([byte]))
                slow.handshake(also=b"x")
                answer = slow.read_exactly(1)
                slow.end()
                slow.read_all()
                return answer

        assert await in_thread(client) == b"x"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n" * 3, "does not speak TLS"),
        (b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\x03" + bytes(1_000), "TLS handshake with the client failed"),
        (b"\x16\x03\x01\x00\x05\x01\x02\x01\x45\x03" + bytes(1_000), "TLS handshake with the client failed"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "does not speak TLS"),
    ],
    ids=["ssh", "hello of 16 MiB", "hello above OpenSSL's bound", "alert"],
)
async def test_garbage_is_told_so_and_closed(contexts: Contexts, pairs: list[tuple[Path, Path]], data: bytes, reason: str) -> None:
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs[:1]))
        answer = await in_thread(lambda: raw(port, data))
        assert reason in await failure(door)
        assert answer[:1] in (b"\x15", b"")  # an alert, where there is anything of TLS to answer


async def test_old_tls_is_told_by_an_alert(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    old = browser()
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs[:1]))

        def client() -> str:
            with WebClient(port, old) as web_client, pytest.raises(ssl.SSLError) as caught:
                web_client.handshake()
            return str(caught.value)

        assert "PROTOCOL_VERSION" in await in_thread(client)
        assert await failure(door) == "the client does not speak TLS 1.2 or 1.3"


async def test_plain_http_gets_an_answer_in_the_clear(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs[:1]), http_answer=ANSWER)
        assert await in_thread(lambda: raw(port, HTTP)) == ANSWER
        assert await failure(door) == "the client does not speak TLS"


async def test_client_that_stays_after_the_alert_is_reset(
    contexts: Contexts, pairs: list[tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingering_close, "LINGER_S", 0.1)
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs[:1]))
        with socket.create_connection((LOOPBACK, port)) as sock:
            sock.sendall(b"no TLS at all\r\n")
            await failure(door)
            with trio.fail_after(5):
                while sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    await trio.sleep(0.01)


@pytest.mark.parametrize("begins", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["silent", "half a hello"])
async def test_owner_ends_a_client_that_takes_too_long(contexts: Contexts, pairs: list[tuple[Path, Path]], begins: bytes) -> None:
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs[:1]))
        with socket.create_connection((LOOPBACK, port), timeout=5) as sock:
            sock.sendall(begins)
            with trio.fail_after(5):
                while not door.seen.under_way:
                    await trio.sleep(0.01)
            await trio.sleep(0.05)
            door.seen.under_way[0].fail("took too long")
            assert await failure(door) == "took too long"
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


@pytest.mark.parametrize("with_reset", [True, False], ids=["RST", "FIN"])
async def test_client_that_leaves_during_the_handshake(contexts: Contexts, pairs: list[tuple[Path, Path]], with_reset: bool) -> None:
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs[:1]))
        with socket.create_connection((LOOPBACK, port)) as sock:
            sock.sendall(b"\x16\x03\x01\x02\x00")
            if with_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert "closed the connection" in await failure(door)


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [((), None), (("http/1.1",), "http/1.1"), (("h2", "http/1.1"), "http/1.1"), (("h2",), None)],
    ids=["nothing", "http/1.1", "both", "h2 only"],
)
async def test_only_http_1_1_is_agreed_on(
    contexts: Contexts, pairs: list[tuple[Path, Path]], offered: tuple[str, ...], agreed: str | None
) -> None:
    """Who speaks h2 only learns from the answer that it was not taken; its connection is good, and its own to give up."""
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, server_context(pairs[:1]))

        def client() -> str | None:
            with WebClient(port, browser(*offered)).handshake() as web_client:
                web_client.end()
                assert web_client.read_all() == b""
                return web_client.tls.selected_alpn_protocol()

        assert await in_thread(client) == agreed


@pytest.mark.parametrize(
    ("name", "number"),
    [("web.test", 0), ("WEB.test", 0), ("apps.test", 1), ("two.apps.test", 1), ("one.apps.test", 2), ("a.two.apps.test", 0), (None, 0)],
)
async def test_certificate_is_chosen_by_name(contexts: Contexts, pairs: list[tuple[Path, Path]], name: str | None, number: int) -> None:
    anyone = browser()
    anyone.check_hostname = False
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, server_context(pairs))

        def client() -> bytes | None:
            with WebClient(port, anyone, name).handshake() as web_client:
                web_client.end()
                web_client.read_all()
                return web_client.tls.getpeercert(binary_form=True)

        assert await in_thread(client) == ssl.PEM_cert_to_DER_cert(pairs[number][0].read_text())


@pytest.mark.parametrize("name", [b"\xff\xfe.apps.test", b"a..b", b"a" * 200, b"\n\x1b[31m", b"*.apps.test", b".", b"xn--a"])
async def test_odd_names_break_nothing_and_write_nothing(
    contexts: Contexts, pairs: list[tuple[Path, Path]], name: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    anyone = browser()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        door, port = add_tls_door(plane, server_context(pairs))
        stand_in = ("x." * len(name))[: len(name) - 1] + "y"
        with WebClient(port, anyone, stand_in) as web_client:
            with pytest.raises(ssl.SSLWantReadError):
                web_client.tls.do_handshake()
            hello = web_client.outgoing.read()
            assert stand_in.encode() in hello
            web_client.sock.sendall(hello.replace(stand_in.encode(), name))
            with trio.fail_after(5):
                while not web_client.incoming.pending:
                    web_client.sock.settimeout(0.01)
                    try:
                        web_client.incoming.write(await trio.to_thread.run_sync(web_client.sock.recv, 4096))
                    except TimeoutError:
                        continue
        await failure(door)
    assert capfd.readouterr().err == ""


async def test_sessions_resume_in_their_context_and_no_other(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    client_context = browser()
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        ports = [add_tls_door(plane, server_context(pairs[:1]))[1] for _ in range(2)]

        def client(port: int, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
            with WebClient(port, client_context, session=session).handshake(also=b"x") as web_client:
                web_client.read_exactly(1)
                web_client.end()
                web_client.read_all()
                return bool(web_client.tls.session_reused), web_client.tls.session

        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            client_context.maximum_version = version
            reused, session = await in_thread(lambda: client(ports[0], None))
            assert not reused
            assert (await in_thread(lambda s=session: client(ports[0], s)))[0]
            assert not (await in_thread(lambda s=session: client(ports[1], s)))[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
async def test_renegotiation_is_refused(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        _, port = add_tls_door(plane, server_context(pairs[:1]))

        def s_client(*options: str, send: bytes, until: bytes) -> None:
            command = ["timeout", "60", "openssl", "s_client", "-connect", f"127.0.0.1:{port}", *options]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(send)
                process.stdin.flush()
                text = b""
                while until not in text and (more := process.stdout.read1(4096)):
                    text += more
                process.terminate()
            assert until in text

        await in_thread(lambda: s_client("-tls1_2", send=b"R\n", until=b"no renegotiation"))


async def test_a_client_whose_time_is_over_while_the_thread_has_its_socket(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    """The owner hears at once; the socket is closed when the thread has let go of it, since its number might be somebody else's by then."""
    async with open_plane(contexts) as plane:
        door, port = add_tls_door(plane, server_context(pairs))
        may_go_on = threading.Event()
        plane.reactor.offload.do(lambda: may_go_on.wait(10), lambda _: None)
        async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
            await stream.send_all(b"\x16\x03\x01")
            with trio.fail_after(5):
                while not door.seen.under_way or not door.seen.under_way[0]._is_offloaded:
                    await trio.sleep(0.01)
            door.seen.under_way[0].fail("too late")
            assert door.seen.failed == ["too late"]
            with trio.move_on_after(0.1):
                await stream.receive_some()
                raise AssertionError("the socket was closed while the thread had it")
            may_go_on.set()
            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()


async def test_an_end_needs_no_descriptor_that_may_be_missing(contexts: Contexts, pairs: list[tuple[Path, Path]]) -> None:
    may_end = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(pattern(100_000))
        await may_end.wait()

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(serve))
        _, port = add_tls_door(plane, server_context(pairs))
        with WebClient(port, browser()) as client:
            await in_thread(client.handshake)
            assert await in_thread(lambda: client.read_exactly(100_000)) == pattern(100_000)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with ExitStack() as files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
                files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                with suppress(OSError):
                    while True:
                        files.callback(os.close, os.dup(0))
                may_end.set()
                assert await in_thread(client.read_all) == b""
                client.end()
