"""TLS ended at the relay: what is offered, what a failed handshake tells the client, and upgrades under it."""

import socket
import ssl
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trustme
from peers import connect, receive_all
from plane import SERVICE, Contexts, open_plane
from web_rig import Canned, add_web_relay, read_head

from fxrelay.web.ports import WebRules
from fxtunnel.errors import ConfigError
from fxtunnel.kit.web_tls import server_context

HOST = "site.example"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


class Site:
    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert(HOST)
        self.cert, self.key = directory / "cert.pem", directory / "key.pem"
        issued.private_key_pem.write_to_path(self.key)
        self.key.chmod(0o600)
        for part in issued.cert_chain_pems:
            part.write_to_path(self.cert, append=True)
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)

    def rules(self) -> WebRules:
        return WebRules(SERVICE, tls=server_context([(self.cert, self.key)]))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def connect_tls(port: int, context: ssl.SSLContext, alpn: list[str] | None = None) -> trio.SSLStream[trio.SocketStream]:
    if alpn:
        context.set_alpn_protocols(alpn)
    stream = trio.SSLStream(await connect(port), context, server_hostname=HOST)
    await stream.do_handshake()
    return stream


async def test_requests_under_tls(contexts: Contexts, site: Site) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        await add_web_relay(plane, await plane.serve(service), site.rules())
        async with await connect_tls(plane.add_door(), site.trust, ["h2", "http/1.1"]) as stream:
            assert stream.selected_alpn_protocol() == "http/1.1"
            for _ in range(3):
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = await stream.receive_some()
                assert answer.endswith(b"ok")
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            answer = bytearray()
            async for data in stream:  # ends with a close_notify, or this raises
                answer += data
            assert answer.endswith(b"ok")
        assert b"X-Forwarded-Proto: https\r\n" in service.got[0]


async def test_the_name_in_the_handshake_opens_no_host(contexts: Contexts, site: Site) -> None:
    async with open_plane(contexts) as plane:
        service = Canned()
        await add_web_relay(plane, await plane.serve(service), replace(site.rules(), hosts=(HOST,)))
        async with await connect_tls(plane.add_door(), site.trust) as stream:
            for host, status in ((HOST.encode(), b"200"), (b"other.example", b"421")):
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 %b " % status)
        assert len(service.got) == 1


async def test_an_upgrade_under_tls(contexts: Contexts, site: Site) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(SWITCH + b"hello")
            async for data in stream:
                await stream.send_all(data.upper())
            await stream.send_all(b"bye")

        await add_web_relay(plane, await plane.serve(service), site.rules())
        stream = await connect_tls(plane.add_door(), site.trust)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
        found = bytearray()
        with trio.fail_after(5):
            while not found.endswith(b"helloEARLY"):
                found += await stream.receive_some()
        await stream.aclose()


async def test_a_handshake_that_fails_gets_its_alert_at_once(contexts: Contexts, site: Site) -> None:
    async with open_plane(contexts) as plane:
        await add_web_relay(plane, await plane.serve(Canned()), site.rules())
        port = plane.add_door()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("AES128-SHA")
        old.maximum_version = ssl.TLSVersion.TLSv1_2

        def shake() -> str:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                try:
                    old.wrap_socket(sock)
                except ssl.SSLError as exc:
                    return str(exc.reason)
            return "shook hands"

        with trio.fail_after(4):
            assert "ALERT_HANDSHAKE_FAILURE" in await trio.to_thread.run_sync(shake)
        async with await connect(port) as stream:
            await stream.send_all(b"\x16\x03\x01\x00\x05hello")
            with trio.fail_after(4):
                assert (await stream.receive_some())[:1] == b"\x15"  # an alert record
                assert await stream.receive_some() == b""


async def test_a_handshake_that_does_not_come(contexts: Contexts, site: Site) -> None:
    async with open_plane(contexts) as plane:
        await add_web_relay(plane, await plane.serve(Canned()), site.rules())
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(b"\x16\x03")
            with trio.fail_after(4):
                assert await stream.receive_some() == b""


async def test_an_answer_that_breaks_off_has_no_close_notify(contexts: Contexts, site: Site) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

        await add_web_relay(plane, await plane.serve(service), site.rules())
        stream = await connect_tls(plane.add_door(), site.trust)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError) as broken:
            await receive_all(stream)
        assert "ConnectionResetError" in "".join(traceback.format_exception(broken.value))
        await trio.aclose_forcefully(stream)


def test_certificates_that_cannot_be_used(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    with pytest.raises(ConfigError, match="does not belong to the key"):
        server_context([(site.cert, other.key)])
    with pytest.raises(ConfigError, match="does not exist"):
        server_context([(tmp_path / "nothing", site.key)])
    site.key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        server_context([(site.cert, site.key)])
