"""Dialling: straight, through a proxy, and the one line for each thing that goes wrong."""

import base64
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from pydantic import SecretStr
from uplink_fakes import FakeGateway, session_id

from fxrelay.uplink.datalink import open_data_link
from fxrelay.uplink.dial import Dialler, GatewayBusy, Proxy, Unanswered
from fxrelay.uplink.failure_policy import retry_delay_s
from fxrelay.uplink.gateway_file import GatewayUrl
from fxrelay.uplink.slot import RESUMING_CAP_S
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.busy import RetryAfter
from fxtunnel.engine.splice import RESET_ON_CLOSE
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed, TunnelError
from fxtunnel.kit.certificates import Authority
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem, TlsStream
from fxtunnel.protocol.alpn import ALPN_DATA, ALPN_HTTP
from fxtunnel.protocol.hello import Denied, Hello, Welcome, encode_denied, encode_hello, encode_welcome

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[GatewayUrl]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, handler, [listener])
            yield GatewayUrl("127.0.0.1", listener.socket.getsockname()[1])
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(gateway: FakeGateway) -> AsyncIterator[GatewayUrl]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.serve)
            yield GatewayUrl("127.0.0.1", gateway.port)
            nursery.cancel_scope.cancel()
    gateway.close()


def dialler(authority: Authority, proxy: Proxy | None = None, timeout_s: float = 5.0) -> Dialler:
    return Dialler(authority.cert_pem, proxy, timeout_s=timeout_s, dead_after_s=7.0)


def answering(answer: bytes, heard: list[bytes] | None = None) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        data = await stream.receive_some(4096)
        if heard is not None:
            heard.append(data)
        await stream.send_all(answer)
        await trio.sleep(0.05)

    return handler


async def test_a_dialled_socket_is_ready_for_the_engine(gateway: FakeGateway, authority: Authority) -> None:
    async with serving(gateway) as url:
        for alpn in (ALPN_HTTP, ALPN_DATA):
            with await dialler(authority).dial(url, alpn) as sock:
                assert not sock.getblocking()
                assert sock.version() == "TLSv1.3"
                assert sock.selected_alpn_protocol() == alpn
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000


async def test_an_address_where_nobody_listens_is_named_in_the_error(authority: Authority) -> None:
    with pytest.raises(TunnelError, match=r"^cannot connect to 127\.0\.0\.1:1: Connection refused$"):
        await dialler(authority).dial(GatewayUrl("127.0.0.1", 1), ALPN_HTTP)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70 + ".invalid"])
async def test_a_name_that_is_none(host: str, authority: Authority) -> None:
    with pytest.raises(TunnelError, match=rf"^cannot (find|connect to) {host}:8443: "):
        await dialler(authority).dial(GatewayUrl(host, 8443), ALPN_HTTP)


async def test_a_listener_that_says_nothing(authority: Authority) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with listening(silent) as url:
        with pytest.raises(TunnelError, match=rf"^no connection to {url.authority} within 0\.1 s$") as caught:
            await dialler(authority, timeout_s=0.1).dial(url, ALPN_HTTP)
        assert not isinstance(caught.value, Unanswered)  # perhaps it is there, and has too much to do


async def test_a_listener_that_hangs_up(authority: Authority) -> None:
    async def with_fin(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)

    for hang_up in (with_fin, trio.aclose_forcefully):
        async with listening(hang_up) as url:
            with pytest.raises(Unanswered, match="closed the connection during the TLS handshake"):
                await dialler(authority).dial(url, ALPN_HTTP)


async def test_a_listener_that_has_reset_the_connection_before_we_say_a_word(
    gateway: FakeGateway, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = trio.open_tcp_stream

    async def connect_and_wait(host: str, port: int) -> trio.SocketStream:
        stream = await connect(host, port)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        return stream

    async def reset(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        await trio.aclose_forcefully(stream)

    monkeypatch.setattr(trio, "open_tcp_stream", connect_and_wait)
    descriptors = len(os.listdir("/proc/self/fd"))
    async with listening(reset) as url:
        with pytest.raises(Unanswered):
            await dialler(authority).dial(url, ALPN_HTTP)
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_listener_that_is_not_tls(authority: Authority) -> None:
    async with listening(answering(b"220 mail ready\r\n")) as url:
        with pytest.raises(HandshakeFailed, match="does not speak TLS") as caught:
            await dialler(authority).dial(url, ALPN_HTTP)
        assert caught.value.problem is HandshakeProblem.NOT_TLS


# Through a proxy


async def test_a_gateway_that_is_busy(authority: Authority) -> None:
    async def busy(stream: trio.SocketStream) -> None:
        await stream.send_all(b"fx-busy 1500 700\n")

    async with listening(busy) as url:
        for _ in range(5):  # before our hello, after it, or with the reset that it causes
            with pytest.raises(GatewayBusy) as caught:
                await dialler(authority).dial(url, ALPN_HTTP)
            assert caught.value.retry_after == RetryAfter(1.5, 0.7)


def test_an_appointment_is_believed_within_bounds() -> None:
    assert retry_delay_s(RetryAfter(2.0, 1.0), 0.5, 30.0) == 2.5
    assert retry_delay_s(RetryAfter(999.0, 999.0), 1.0, 30.0) == 60.0
    assert retry_delay_s(RetryAfter(999.0, 999.0), 0.0, RESUMING_CAP_S) == RESUMING_CAP_S


def relaying(heard: list[bytes], gateway_port: int) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(4096)
        heard.append(head)
        async with await trio.open_tcp_stream("127.0.0.1", gateway_port) as onward, trio.open_nursery() as nursery:
            await stream.send_all(b"HTTP/1.1 200 Connection established\r\nProxy-Agent: x\r\n\r\n")
            nursery.start_soon(pump, stream, onward)
            await pump(onward, stream)
            nursery.cancel_scope.cancel()

    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            async for data in source:
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass

    return handler


async def test_a_data_link_through_a_proxy_with_password(gateway: FakeGateway, authority: Authority) -> None:
    heard: list[bytes] = []
    async with serving(gateway) as url, listening(relaying(heard, url.port)) as at:
        proxy = Proxy.parse(SecretStr(f"http://us%40er:p%3Ass@127.0.0.1:{at.port}"))
        link, welcome = await open_data_link(dialler(authority, proxy), url, Hello("t"))
        link.close()
        assert welcome.session == session_id(1)
        lines = heard[0].split(b"\r\n")
        assert lines[0] == f"CONNECT {url.authority} HTTP/1.1".encode()
        assert f"Host: {url.authority}".encode() in lines
        assert b"Proxy-Authorization: Basic " + base64.b64encode(b"us@er:p:ss") in lines


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n",
            "wants a user name and password",
        ),
        (b"HTTP/1.1 502 Bad\x1b[2J Gateway\r\nContent-Length: 0\r\n\r\n", "answered 502 when asked for gw.example.com:8443"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "answered 502 when asked for gw.example.com:8443"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "does not answer in HTTP"),
        (b"\x00\xff\xfe garbage \r\n\r\n", "does not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9000, "(does not answer in HTTP|more than 8192 bytes)"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 400, "more than 8192 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n\x16\x03\x03", "sent bytes of its own"),
        (b"", "closed the connection"),
    ],
    ids=range(9),
)
async def test_a_proxy_that_does_not_help(answer: bytes, words: str, authority: Authority) -> None:
    async with listening(answering(answer)) as at:
        proxy = Proxy("127.0.0.1", at.port)
        with pytest.raises(TunnelError, match=rf"^the proxy 127\.0\.0\.1:{at.port} .*{words}") as caught:
            await dialler(authority, proxy).dial(GatewayUrl("gw.example.com", 8443), ALPN_HTTP)
        assert str(caught.value).isprintable()
        assert isinstance(caught.value, Unanswered) is any(word in words for word in ("502", "closed"))


async def test_a_wrong_password_is_not_repeated(authority: Authority) -> None:
    async with listening(answering(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")) as at:
        proxy = Proxy.parse(SecretStr(f"http://user:hunter2@127.0.0.1:{at.port}"))
        with pytest.raises(TunnelError, match="does not accept the user name and password") as caught:
            await dialler(authority, proxy).dial(GatewayUrl("gw.example.com", 8443), ALPN_HTTP)
        assert "hunter2" not in str(caught.value) + repr(proxy)


async def test_a_proxy_that_says_nothing(authority: Authority) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with listening(silent) as at:
        with pytest.raises(TunnelError, match=r"^no connection to gw:8443 through the proxy .* within 0\.1 s$"):
            await dialler(authority, Proxy("127.0.0.1", at.port), 0.1).dial(GatewayUrl("gw", 8443), ALPN_HTTP)


async def test_a_proxy_that_is_not_there(authority: Authority) -> None:
    with pytest.raises(TunnelError, match=r"^cannot connect to the proxy 127\.0\.0\.1:1: Connection refused$"):
        await dialler(authority, Proxy("127.0.0.1", 1)).dial(GatewayUrl("gw", 8443), ALPN_HTTP)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://proxy", ("proxy", 3128, None)),
        ("http://proxy:80/", ("proxy", 80, None)),
        ("http://[::1]:8080", ("::1", 8080, None)),
        ("http://u:p@proxy:80", ("proxy", 80, "Basic dTpw")),
        ("http://u@proxy:80", ("proxy", 80, "Basic dTo=")),
    ],
)
def test_proxy_urls(text: str, expected: tuple[str, int, str | None]) -> None:
    proxy = Proxy.parse(SecretStr(text))
    assert (proxy.host, proxy.port, proxy.authorization and proxy.authorization.get_secret_value()) == expected


@pytest.mark.parametrize(
    "text", ["https://proxy", "proxy:3128", "http://", "http://proxy:0", "http://u:s3cret@proxy:99999", "http://proxy/x"]
)
def test_bad_proxy_urls(text: str) -> None:
    with pytest.raises(ValueError, match="expected http://") as caught:
        Proxy.parse(SecretStr(text))
    assert "s3cret" not in str(caught.value)


# The hello of a data link


def data_answer(answer: bytes) -> Callable[[TlsStream], Awaitable[None]]:
    async def handler(peer: TlsStream) -> None:
        await peer.receive_some(4096)
        for byte in answer[:-1]:
            await peer.send_all(bytes([byte]))
        await peer.send_all(answer[-1:] + b"behind")
        await peer.receive_some(1)
        await trio.aclose_forcefully(peer)

    return handler


async def test_bytes_behind_the_welcome_stay_in_the_socket(
    gateway: FakeGateway, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcome = Welcome(session_id(1), 5, 70_000)
    monkeypatch.setattr(gateway, "_data_link", data_answer(encode_welcome(welcome)))
    async with serving(gateway) as url:
        link, answer = await open_data_link(dialler(authority), url, Hello("t"))
        assert answer == welcome
        rest = TlsStream(link)
        assert await rest.receive_some(100) == b"behind"
        await trio.aclose_forcefully(rest)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (encode_denied(Denied(Refusal.BAD_TICKET, "spent", 2.0)), PeerRefused, "spent"),
        (encode_denied(Denied(Refusal.DRAINING)), PeerRefused, "draining"),
        (encode_hello(Hello("t")), RemoteProtocolError, "HELLO"),
        (encode_welcome(Welcome(session_id(2))), RemoteProtocolError, "another session"),
        (struct.pack(">II", 0x00000005, 1) + b"hello", RemoteProtocolError, "not a hello"),
        (struct.pack(">II", 0xF1FFFFFF, 0), RemoteProtocolError, "16777215"),
        (struct.pack(">II", 0xF1000004, 0) + b"{{{{", RemoteProtocolError, "not JSON"),
        (encode_welcome(Welcome(session_id(1)))[:-4], TunnelClosed, "closed"),
    ],
    ids=range(8),
)
async def test_answers_that_are_no_welcome(
    answer: bytes, error: type[TunnelError], words: str, gateway: FakeGateway, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(peer: TlsStream) -> None:
        await peer.receive_some(4096)
        await peer.send_all(answer)
        await trio.aclose_forcefully(peer)

    monkeypatch.setattr(gateway, "_data_link", handler)
    async with serving(gateway) as url:
        with pytest.raises(error, match=words) as caught:
            await open_data_link(dialler(authority), url, Hello("t", session_id(1), 9))
        if isinstance(caught.value, PeerRefused):
            assert caught.value.retry_after_s == (2.0 if caught.value.refusal is Refusal.BAD_TICKET else 0.0)
        if isinstance(caught.value, TunnelClosed):
            assert caught.value.code is Code.LINK_LOST


async def test_a_gateway_that_does_not_answer_the_hello(
    gateway: FakeGateway, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(peer: TlsStream) -> None:
        while await peer.receive_some(4096):
            pass
        await trio.aclose_forcefully(peer)

    monkeypatch.setattr(gateway, "_data_link", handler)
    async with serving(gateway) as url:
        with pytest.raises(TunnelError, match=r"did not answer on a data link within 0\.2 s$"):
            await open_data_link(dialler(authority, timeout_s=0.2), url, Hello("t"))
