"""A link's socket: its errors, its names, and what it leaves behind."""

import errno
import gc
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from fxtunnel.kit import alpn_choice, link_tls
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.link_tls import RECORD_BYTES, LinkSocket, ReadRecords
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem, TlsStream, handshake_client, handshake_server, server_context

BLOCK = bytes(range(256)) * 1024


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


def reset(link: LinkSocket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


def buffer() -> memoryview:
    return memoryview(bytearray(4 * RECORD_BYTES))


async def readable(link: LinkSocket) -> None:
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(link)


async def read_soon(link: LinkSocket, read: ReadRecords, room: memoryview, enough_bytes: int) -> bytes:
    """What `read` brings when there is something; tickets, and a record that is not whole yet, are nothing."""
    while True:
        await readable(link)
        with suppress(ssl.SSLWantReadError):
            return bytes(room[: read(room, enough_bytes)])


async def test_records_come_together_and_a_short_one_is_the_last(tls: Any) -> None:
    near, far = await tls.pair(tcp_pair())
    with near, far:
        read, _ = near.calls()
        _, write = far.calls()
        sent = BLOCK[: 2 * RECORD_BYTES + 100]
        assert write(memoryview(sent)) == len(sent)
        assert write(memoryview(b"next")) == 4
        room, seen = buffer(), b""
        while len(seen) < len(sent):
            seen += await read_soon(near, read, room, 3 * RECORD_BYTES)
        assert seen == sent
        assert await read_soon(near, read, room, 3 * RECORD_BYTES) == b"next"
        with pytest.raises(ssl.SSLWantReadError):
            read(room, 1)
        room.release()  # nothing holds on to it


async def test_nothing_is_read_past_what_is_enough_or_written_past_the_buffer(tls: Any) -> None:
    near, far = await tls.pair(tcp_pair())
    with near, far:
        read, _ = near.calls()
        far.send(BLOCK[: 6 * RECORD_BYTES])
        await trio.sleep(0.1)
        assert read(buffer(), RECORD_BYTES + 1) == 2 * RECORD_BYTES, "records are whole"
        assert read(buffer(), 1) == RECORD_BYTES
        far.send(BLOCK[: 6 * RECORD_BYTES])
        await trio.sleep(0.1)
        memory = bytearray(5 * RECORD_BYTES)
        front = memoryview(memory)[: 3 * RECORD_BYTES + 100]
        assert read(front, 10 * RECORD_BYTES) == 3 * RECORD_BYTES
        assert memory[3 * RECORD_BYTES :] == bytes(2 * RECORD_BYTES)
        assert memory[: 3 * RECORD_BYTES] == BLOCK[3 * RECORD_BYTES : 6 * RECORD_BYTES]


async def test_a_write_that_does_not_fit_goes_on_where_it_stopped(tls: Any) -> None:
    near, far = await tls.pair(tcp_pair())
    with near, far:
        _, write = near.calls()
        read, _ = far.calls()
        blocks, written, seen, room = 40, 0, bytearray(), buffer()
        with trio.fail_after(20):
            while len(seen) < blocks * len(BLOCK):
                try:
                    while written < blocks:
                        assert write(memoryview(BLOCK)) == len(BLOCK)
                        written += 1
                except ssl.SSLWantWriteError:
                    pass
                seen += await read_soon(far, read, room, 3 * RECORD_BYTES)
        assert seen == BLOCK * blocks


@pytest.mark.parametrize("reads", [True, False])
async def test_why_a_link_broke_is_said_each_time_and_is_no_other_links_trouble(tls: Any, reads: bool) -> None:
    near, far = await tls.pair(tcp_pair())
    healthy, other = await tls.pair(tcp_pair())
    read, write = near.calls()
    reset(far)
    await readable(near)
    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            read(buffer(), 1) if reads else write(memoryview(BLOCK))
    assert SSL._lib.ERR_peek_error() == 0
    with pytest.raises(ssl.SSLWantReadError):
        healthy.calls()[0](buffer(), 1)
    with pytest.raises(ssl.SSLWantReadError):
        healthy.recv(1)
    for link in (near, healthy, other):
        link.close()


async def test_a_forged_record_is_named_each_time(tls: Any) -> None:
    near, far = await tls.pair(tcp_pair())
    with near:
        read, _ = near.calls()
        sock = socket.socket(fileno=far.detach())
        sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record nobody has sealed
        sock.close()
        await trio.sleep(0.1)
        for _ in range(2):
            with pytest.raises(ssl.SSLError) as caught:
                read(buffer(), 1)
            assert caught.value.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"


async def test_records_before_a_forged_one_are_delivered(tls: Any) -> None:
    near, far = await tls.pair(tcp_pair())
    with near:
        read, _ = near.calls()
        far.send(BLOCK[:RECORD_BYTES])
        sock = socket.socket(fileno=far.detach())
        sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        await trio.sleep(0.1)
        room = buffer()
        assert read(room, 3 * RECORD_BYTES) == RECORD_BYTES
        assert bytes(room[:RECORD_BYTES]) == BLOCK[:RECORD_BYTES]
        with pytest.raises(ssl.SSLError, match="bad record mac"):
            read(room, 1)
        sock.close()


@pytest.mark.parametrize(("says_goodbye", "end"), [(True, ssl.SSLZeroReturnError), (False, ssl.SSLEOFError)])
async def test_only_close_notify_is_an_end(tls: Any, says_goodbye: bool, end: type[ssl.SSLError]) -> None:
    near, far = await tls.pair()
    with near:
        if says_goodbye:
            far.unwrap()
        far.close()
        read, _ = near.calls()
        for _ in range(2):
            with pytest.raises(end):
                read(buffer(), 1)


async def test_a_closed_link_touches_no_descriptor(tls: Any) -> None:
    near, far = await tls.pair()
    near.close()
    for call in (lambda: near.recv(1), lambda: near.send(b"x"), near.unwrap, near.do_handshake, near.pending):
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            call()
        assert caught.value.errno == errno.EBADF
    far.close()


async def test_nothing_is_left_for_the_collector(tls: Any) -> None:
    """A buffer that OpenSSL's wrapper still holds when the collector finds it ends the interpreter."""
    for _ in range(20):
        near, far = await tls.pair(tcp_pair())
        read, write = near.calls()
        reset(far)
        await readable(near)
        caught: list[BaseException] = []
        for call in (partial(read, buffer(), 1), partial(write, memoryview(BLOCK))):
            try:
                call()
            except OSError as exc:
                caught.append(exc)
        caught.append(RuntimeError(caught))  # a circle, by way of the frames
        assert len(caught) == 3
        near.close()
        del read, write, near, far, caught, call
        gc.collect()


def test_a_server_without_a_certificate_is_nobody() -> None:
    assert not link_tls._Server("localhost").is_named_in(None)


NO_MDWE = "this kernel has no PR_SET_MDWE"
CONFINED = """
    import ctypes, os, socket, sys, tempfile, trio
    from pathlib import Path
    from fxtunnel.kit.certificates import issue_server_certificate, new_authority
    from fxtunnel.kit.files import write_secret
    from fxtunnel.kit.tls import client_context, handshake_client, handshake_server, server_context

    if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
        sys.exit(sys.argv[2])
    authority = new_authority("x")
    certificate, key = issue_server_certificate(authority, ["localhost"])
    directory = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    (directory / "server.pem").write_text(certificate)
    write_secret(directory / "server.key", key)
    server = server_context(directory / "server.pem", directory / "server.key", ["a", "b"])
    agreed = []

    async def answer(sock):
        agreed.append((await handshake_server(sock, server)).selected_alpn_protocol())

    async def main():
        for offered in (["b"], ["x", "b", "a"], ["a" * 255, "b"]):
            near, far = socket.socketpair()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer, far)
                await handshake_client(near, client_context(authority.cert_pem, offered), "localhost")

    trio.run(main)
    print(*agreed)
"""


def test_no_memory_is_writable_and_executable(tmp_path: Path) -> None:
    """As below the units' MemoryDenyWriteExecute=, with which cffi's callbacks cannot be made."""
    arguments = [textwrap.dedent(CONFINED), str(tmp_path), NO_MDWE]
    ran = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=False)
    if ran.stderr == f"{NO_MDWE}\n":  # an older kernel, where the units' setting is a filter of systemd's: tests below a real one have that
        pytest.skip(f"{NO_MDWE}: nobody can be denied such memory before Linux 6.3")
    assert (ran.stdout, ran.stderr) == ("b a b\n", "")


async def test_a_protocol_is_agreed_on_by_public_calls_as_well(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpn_choice, "SSL", SimpleNamespace(NO_OVERLAPPING_PROTOCOLS=SSL.NO_OVERLAPPING_PROTOCOLS))
    near, far = await tls.pair()
    with near, far:
        assert near.selected_alpn_protocol() == far.selected_alpn_protocol() == "http/1.1"


async def test_no_session_is_resumed(tls: Any) -> None:
    """OpenSSL hands out tickets, which pyOpenSSL cannot turn off: they are good for nothing."""
    wanting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    wanting.load_verify_locations(cadata=tls.authority.cert_pem)
    wanting.set_alpn_protocols(["http/1.1"])
    context = tls.server()
    session: ssl.SSLSession | None = None

    def visit(sock: socket.socket) -> ssl.SSLSession | None:
        with wanting.wrap_socket(sock, server_hostname="localhost", session=session) as visitor:
            assert visitor.recv(1) == b"x"
            assert not visitor.session_reused
            return visitor.session

    async def answer(sock: socket.socket) -> None:
        async with TlsStream(await handshake_server(sock, context)) as stream:
            await stream.send_all(b"x")

    for _ in range(3):
        near, far = socket.socketpair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, far)
            session = await trio.to_thread.run_sync(visit, near)
        assert session is not None
        assert session.has_ticket


def issued(directory: Path, authority: Any, names: list[x509.GeneralName], subject: str = "x") -> Any:
    """A server's context whose certificate has just these names."""
    root = x509.load_pem_x509_certificate(authority.cert_pem.encode())
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    (directory / "named.pem").write_bytes(builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    encodings = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    write_secret(directory / "named.key", key.private_bytes(*encodings))
    return server_context(directory / "named.pem", directory / "named.key", ["http/1.1"])


def dns(*names: str) -> list[x509.GeneralName]:
    return [x509.DNSName(name) for name in names]


def ip(*addresses: str) -> list[x509.GeneralName]:
    return [x509.IPAddress(ip_address(address)) for address in addresses]


@pytest.mark.parametrize(
    ("names", "host", "is_it"),
    [
        (dns("gw.example"), "gw.example", True),
        (dns("gw.example"), "GW.Example", True),
        (dns("a.example", "gw.example"), "gw.example", True),
        (dns("*.example.org"), "gw.example.org", True),
        (dns("*.example.org"), "a.gw.example.org", False),
        (dns("*.example.org"), "example.org", False),
        (dns("g*.example.org"), "gw.example.org", False),
        (dns("gw.*.org"), "gw.example.org", False),
        (dns("*"), "localhost", False),
        (dns("xn--bcher-kva.example"), "bücher.example", True),
        (dns("gw.example"), "gw.example.evil", False),
        (dns("gw.example"), "w.example", False),
        (ip("127.0.0.1"), "127.0.0.1", True),
        (ip("127.0.0.1"), "127.0.0.2", False),
        (ip("::1"), "::1", True),
        (ip("::1"), "0:0:0:0:0:0:0:1", True),
        (dns("127.0.0.1"), "127.0.0.1", False),
        (ip("127.0.0.1"), "localhost", False),
        ([], "x", False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_names(tls: Any, tmp_path: Path, names: list[x509.GeneralName], host: str, is_it: bool) -> None:
    """RFC 9525, 6: whole labels, a wildcard for the leftmost one only, addresses as addresses, and no common name."""
    context = issued(tmp_path, tls.authority, names)
    refused: list[HandshakeFailed] = []

    async def dial() -> None:
        try:
            (await handshake_client(near, tls.client(), host)).close()
        except HandshakeFailed as exc:
            refused.append(exc)

    async def answer() -> None:
        try:
            (await handshake_server(far, context)).close()
        except HandshakeFailed:
            assert not is_it

    near, far = socket.socketpair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            nursery.start_soon(answer)
    assert [exc.problem for exc in refused] == ([] if is_it else [HandshakeProblem.WRONG_NAME])
