"""What TLS does on its own account on a link: key updates."""

import shutil
import socket
import ssl
import subprocess
from types import SimpleNamespace

import pytest
import trio
from OpenSSL import SSL
from peers import connect, echo, receive_exactly, until_read
from plane import Contexts, open_plane

from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig, State
from fxtunnel.engine.session import Session
from fxtunnel.kit import link_tls
from fxtunnel.kit.link_tls import LinkSocket, ReadRecords
from fxtunnel.kit.tls import handshake_server
from fxtunnel.model import SessionId
from fxtunnel.protocol.credit import WindowBudget
from fxtunnel.protocol.frames import PING, PONG, encode_u64


class Owner:
    def on_link_down(self, session: Session, reason: str) -> None:
        raise AssertionError(reason)

    def on_closed(self, session: Session, code: Code, text: str) -> None:
        pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
async def test_key_update_by_the_peer(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "fx-data/1", "-tls1_3"]
            process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            sock = (await trio.to_thread.run_sync(listener.accept))[0]
        sock.setblocking(False)
        link = await handshake_server(sock, contexts.server)
        session = Session(plane.reactor, SessionId("k"), Owner(), SessionConfig(), WindowBudget(1 << 20))
        session.attach(link, 0)
        assert process.stdin is not None
        assert process.stdout is not None
        seen = b""
        try:
            for number in range(3):
                await process.stdin.send_all(encode_u64(PING, number))
                with trio.fail_after(30):
                    while encode_u64(PONG, number) not in seen:
                        seen += await process.stdout.receive_some()
                await process.stdin.send_all(b"K\n")  # KeyUpdate, and asks for ours
                await until_read(process.stdin)
            assert session.state is State.UP
        finally:
            session.close(Code.NORMAL)
            process.kill()
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


class Rekeying:
    """A link's read that cannot go on, once, before something has been written."""

    def __init__(self, read: ReadRecords) -> None:
        self.read = read
        self.wants_write = True

    def __call__(self, buffer: memoryview, enough_bytes: int) -> int:
        if self.wants_write:
            self.wants_write = False
            raise ssl.SSLWantWriteError
        return self.read(buffer, enough_bytes)


async def test_read_that_waits_for_a_write_is_taken_up_again(contexts: Contexts) -> None:
    async with open_plane(contexts, SessionConfig()) as plane:
        relay = await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(b"x")
            await receive_exactly(stream, 1)
            far = relay.far_session
            rekeying = far._read_records = Rekeying(far._read_records)
            await stream.send_all(b"y")
            with trio.fail_after(10):
                while rekeying.wants_write:
                    await trio.sleep(0.01)
            with trio.fail_after(4):
                assert await receive_exactly(stream, 1) == b"y"


async def test_a_link_works_by_its_public_calls_as_well(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_tls, "SSL", SimpleNamespace(**{name: value for name, value in vars(SSL).items() if name[0] != "_"}))
    calls: list[str] = []
    public = LinkSocket._read_records

    def noted(link: LinkSocket, buffer: memoryview, enough_bytes: int) -> int:
        calls.append("read")
        return public(link, buffer, enough_bytes)

    monkeypatch.setattr(LinkSocket, "_read_records", noted)
    async with open_plane(contexts, SessionConfig()) as plane:
        await plane.add_relay(await plane.serve(echo))
        async with await connect(plane.add_door()) as stream:
            with trio.fail_after(4):
                await stream.send_all(b"x" * 100_000)
                assert await receive_exactly(stream, 100_000) == b"x" * 100_000
    assert calls
