import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from fxtunnel.errors import ConfigError, LocalProtocolError
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.tls import (
    HandshakeFailed,
    HandshakeProblem,
    TlsStream,
    client_context,
    handshake_client,
    handshake_server,
    server_context,
)


class Failures(list[HandshakeFailed]):
    def __init__(self) -> None:
        self._happened = trio.Event()

    def add(self, failure: HandshakeFailed) -> None:
        self.append(failure)
        self._happened.set()

    async def wait(self) -> None:
        await self._happened.wait()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[tuple[tuple[str, int], Failures]]:
    """A TLS port that shakes hands within 20 s and hangs up; its failures are collected."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    failures = Failures()

    async def one(sock: socket.socket) -> None:
        try:
            with trio.move_on_after(20):
                await TlsStream(await handshake_server(sock, context)).aclose()
        except HandshakeFailed as exc:
            failures.add(exc)

    async def accept() -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            nursery.start_soon(one, listener.accept()[0])

    with listener, trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            yield listener.getsockname(), failures
            nursery.cancel_scope.cancel()


async def drained(stream: TlsStream) -> None:
    with trio.fail_after(30):
        while await stream.receive_some():
            pass


async def dial(address: tuple[str, int], context: ssl.SSLContext, host: str = "localhost") -> HandshakeFailed:
    with pytest.raises(HandshakeFailed) as caught:
        await handshake_client(socket.create_connection(address), context, host)
    return caught.value


def plain_exchange(address: tuple[str, int], data: bytes) -> bytes:
    with socket.create_connection(address) as sock:
        sock.settimeout(30)
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(4096), b""))


async def test_agrees_on_tls13_and_alpn(tls: Any) -> None:
    client, server = await tls.pair()
    with client, server:
        assert client.version() == server.version() == "TLSv1.3"
        assert client.selected_alpn_protocol() == server.selected_alpn_protocol() == "http/1.1"
        assert not client.getblocking()
        await TlsStream(server).send_all(b"x")
        assert await TlsStream(client).receive_some() == b"x"


async def test_accepts_a_name_and_an_address_of_the_certificate(tls: Any) -> None:
    async with serving(tls.server("gw.example", "127.0.0.1")) as (address, _):
        for host in ("gw.example", "127.0.0.1"):
            (await handshake_client(socket.create_connection(address), tls.client(), host)).close()


async def test_wrong_authority_is_named_and_the_server_learns_of_it_by_an_alert(tls: Any) -> None:
    async with serving(tls.server()) as (address, failures):
        failed = await dial(address, client_context(new_authority("another").cert_pem, ["http/1.1"]))
        await failures.wait()
    assert failed.problem is HandshakeProblem.UNTRUSTED
    assert "pinned authority" in str(failed)
    assert failures[0].problem is HandshakeProblem.REFUSED_BY_PEER
    assert "unknown ca" in str(failures[0])


@pytest.mark.parametrize(
    ("begins", "problem", "text"),
    [
        (timedelta(days=-40), HandshakeProblem.EXPIRED, "it ended 10 days ago, on 20"),
        (timedelta(hours=5, minutes=30), HandshakeProblem.NOT_YET_VALID, "it begins in 4 hours, on 20"),
    ],
)
async def test_says_by_how_much_a_certificate_is_out_of_date(tls: Any, begins: timedelta, problem: HandshakeProblem, text: str) -> None:
    async with serving(tls.server(valid_from=datetime.now(UTC) + begins, valid_days=30)) as (address, _):
        failed = await dial(address, tls.client())
    assert failed.problem is problem
    assert text in str(failed)


async def test_expired_certificate_behind_a_single_use_connection_is_still_explained(tls: Any) -> None:
    context = tls.server(valid_from=datetime.now(UTC) - timedelta(days=40), valid_days=30)
    near, far = socket.socketpair()

    async def answer() -> None:
        with pytest.raises(HandshakeFailed, match="certificate expired"):
            await handshake_server(far, context)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(HandshakeFailed, match="has expired: renew it"):
            await handshake_client(near, tls.client(), "localhost")


async def test_a_certificate_without_the_name_asked_for_is_refused(tls: Any) -> None:
    async with serving(tls.server("gw.example")) as (address, _):
        assert (await dial(address, tls.client(), "other.example")).problem is HandshakeProblem.WRONG_NAME
        assert (await dial(address, tls.client(), "127.0.0.1")).problem is HandshakeProblem.WRONG_NAME
        assert (await dial(address, tls.client(), "x" * 70)).problem is HandshakeProblem.OTHER


async def test_without_a_common_application_protocol_both_sides_fail(tls: Any) -> None:
    async with serving(tls.server()) as (address, failures):
        assert (await dial(address, tls.client("h2"))).problem is HandshakeProblem.NO_COMMON_PROTOCOL
        await failures.wait()
    assert failures[0].problem is HandshakeProblem.NO_COMMON_PROTOCOL


async def test_tls12_is_refused_with_an_alert(tls: Any) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(cadata=tls.authority.cert_pem)
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    def shake(address: tuple[str, int]) -> str:
        with pytest.raises(ssl.SSLError) as caught, socket.create_connection(address) as sock:
            old.wrap_socket(sock, server_hostname="localhost")
        return str(caught.value.reason)

    async with serving(tls.server()) as (address, failures):
        assert "ALERT_PROTOCOL_VERSION" in await trio.to_thread.run_sync(shake, address)
    assert failures[0].problem is HandshakeProblem.NO_COMMON_VERSION


async def test_garbage_gets_an_alert_and_an_end_at_once(tls: Any) -> None:
    garbage = b"\x16\x03\x01\x00\x04\xff\xff\xff\xff" + bytes(20000)
    async with serving(tls.server()) as (address, failures):
        started = trio.current_time()
        answer = await trio.to_thread.run_sync(plain_exchange, address, garbage)
        assert trio.current_time() - started < 10
    assert answer[:1] == b"\x15", "an alert record"
    assert len(failures) == 1


async def test_plain_http_is_not_tls(tls: Any) -> None:
    async with serving(tls.server()) as (address, failures):
        await trio.to_thread.run_sync(plain_exchange, address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert failures[0].problem is HandshakeProblem.NOT_TLS


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_server_without_tls_is_called_that(tls: Any, reply: bytes) -> None:
    near, far = socket.socketpair()
    far.sendall(reply)
    with far, pytest.raises(HandshakeFailed, match="localhost does not speak TLS") as caught:
        await handshake_client(near, tls.client(), "localhost")
    assert caught.value.problem is HandshakeProblem.NOT_TLS


async def test_a_peer_that_hangs_up_during_the_handshake(tls: Any) -> None:
    near, far = socket.socketpair()
    far.close()
    with pytest.raises(HandshakeFailed) as caught:
        await handshake_client(near, tls.client(), "localhost")
    assert caught.value.problem is HandshakeProblem.CLOSED_BY_PEER


async def test_bytes_before_a_hang_up_are_never_delivered(tls: Any) -> None:
    near, far = socket.socketpair()
    far.sendall(b"not encrypted")
    far.close()
    with pytest.raises(HandshakeFailed):
        await handshake_server(near, tls.server())


async def test_a_silent_peer_costs_the_callers_deadline_and_no_descriptor(tls: Any) -> None:
    near, far = socket.socketpair()
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(0.05):
            await handshake_server(near, tls.server())
    far.settimeout(1)
    assert far.recv(1) == b"", "the other end was closed"
    far.close()


async def test_stream_passes_trios_own_checks(tls: Any) -> None:
    async def make() -> tuple[TlsStream, TlsStream]:
        client, server = await tls.pair()
        return TlsStream(client), TlsStream(server)

    async def make_clogged() -> tuple[TlsStream, TlsStream]:
        client, server = await make()
        # One-byte records: the socket is full without a send of the stream having been cut in two.
        for stream in (client, server):
            with contextlib.suppress(ssl.SSLWantWriteError):
                while True:
                    stream.socket.send(b"x")
        return client, server

    with trio.fail_after(30):
        await trio.testing.check_two_way_stream(make, make_clogged)


async def test_a_megabyte_each_way_at_once_arrives_whole(tls: Any) -> None:
    client, server = await tls.pair()
    blob = bytes(range(256)) * 8192

    async def send(stream: TlsStream) -> None:
        await stream.send_all(blob)

    async def receive(stream: TlsStream) -> None:
        data = b""
        while len(data) < len(blob):
            data += await stream.receive_some(100_000)
        assert data == blob

    streams = TlsStream(client), TlsStream(server)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, stream)
    for stream in streams:
        await stream.aclose()


async def test_only_close_notify_is_an_end(tls: Any) -> None:
    client, server = await tls.pair()
    stream = TlsStream(client)
    await TlsStream(server).aclose()
    assert await stream.receive_some() == b""
    assert await stream.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    await stream.aclose()

    client, server = await tls.pair()
    stream = TlsStream(client)
    with trio.move_on_after(0.01):
        await stream.receive_some()
    server.close()
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    await stream.aclose()


async def test_what_was_sent_before_closing_arrives_though_the_peer_was_still_talking(tls: Any) -> None:
    client, server = await tls.pair(tcp_pair())
    await TlsStream(client).send_all(bytes(60000))
    answering = TlsStream(server)
    await answering.send_all(b"401")
    await answering.aclose()
    stream = TlsStream(client)
    assert await stream.receive_some() == b"401"
    assert await stream.receive_some() == b""
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0, "no RST came after it, which could have overtaken it"
    await stream.aclose()


@pytest.mark.parametrize("tries_again", [True, False])
async def test_a_cancelled_send_ends_sending_and_hides_no_truncation(tls: Any, tries_again: bool) -> None:
    client, server = await tls.pair()
    sender, receiver = TlsStream(client), TlsStream(server)
    with trio.move_on_after(0.05) as scope:
        await sender.send_all(bytes(8 << 20))
    assert scope.cancelled_caught
    if tries_again:
        with pytest.raises(trio.BrokenResourceError):
            await sender.send_all(b"x")
    await sender.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await drained(receiver)
    await receiver.aclose()


async def test_a_cancelled_receive_loses_nothing(tls: Any) -> None:
    client, server = await tls.pair()
    stream, peer = TlsStream(client), TlsStream(server)
    with trio.move_on_after(0.01):
        await stream.receive_some()
    await peer.send_all(b"still here")
    assert await stream.receive_some() == b"still here"
    for each in (stream, peer):
        await each.aclose()


async def test_unread_bytes_come_first_and_go_with_the_detached_socket(tls: Any) -> None:
    client, server = await tls.pair()
    stream, peer = TlsStream(client), TlsStream(server)
    await peer.send_all(b"cd")
    stream.unread(b"b")
    stream.unread(b"a")
    assert await stream.receive_some(1) == b"a"
    assert await stream.receive_some() == b"b"
    assert await stream.receive_some() == b"cd"
    stream.unread(b"d")
    assert stream.detach() == (client, b"d")
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()
    await stream.aclose()
    assert client.fileno() >= 0, "closing a detached stream leaves the socket alone"
    client.close()
    await peer.aclose()


async def test_a_stream_in_use_is_not_detached_and_has_no_half_close(tls: Any) -> None:
    client, server = await tls.pair()
    stream = TlsStream(client)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive_some)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(LocalProtocolError):
            stream.detach()
        nursery.cancel_scope.cancel()
    with pytest.raises(LocalProtocolError):
        await stream.send_eof()
    await stream.aclose()
    server.close()


def test_server_context_explains_bad_files(tls: Any, tmp_path: Path) -> None:
    tls.server()
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    other = tmp_path / "other.pem"
    other.write_text(tls.authority.cert_pem)
    with pytest.raises(ConfigError, match="does not belong to the key"):
        server_context(other, key, ["http/1.1"])
    with pytest.raises(ConfigError, match=r"missing\.pem: does not exist"):
        server_context(tmp_path / "missing.pem", key, ["http/1.1"])
    other.write_text("nonsense")
    with pytest.raises(ConfigError, match="not in PEM format"):
        server_context(other, key, ["http/1.1"])
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {key}"):
        server_context(certificate, key, ["http/1.1"])


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "é"])
def test_client_context_explains_a_bad_authority(text: str) -> None:
    with pytest.raises(ConfigError, match="holds no certificate"):
        client_context(text, ["http/1.1"])


def test_an_encrypted_key_is_refused_instead_of_asking_for_its_passphrase(tls: Any, tmp_path: Path) -> None:
    tls.server()
    key = tmp_path / "server.key"
    locked = subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x"], capture_output=True, check=True).stdout
    key.write_bytes(locked)
    with pytest.raises(ConfigError, match="openssl pkey -in OLD -out NEW"):
        server_context(tmp_path / "server.pem", key, ["http/1.1"])
