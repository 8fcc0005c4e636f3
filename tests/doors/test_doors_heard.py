"""Doors that hear a client first: where each protocol leads, who gets an answer, and what silence, garbage and dribble cost."""

import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from peers import Serve, connect, echo, receive_all, receive_exactly, reset, until_reset
from plane import SERVICE, Contexts, Plane, RelaySide, open_plane

from fxgateway.routing.admission import AdmissionLimits
from fxgateway.routing.hosts import HostTable, Route
from fxgateway.routing.preread_router import DoorKind, PrereadRouter
from fxtunnel.kit.client_hello import UNRECOGNIZED_NAME
from fxtunnel.kit.web_tls import server_context
from fxtunnel.model import Offer, ServiceName
from fxtunnel.protocol.opening import Opening

OTHER = ServiceName("other")
SHELL = ServiceName("shell")
ROUTES = HostTable(
    [
        Route("a.test", "/", SERVICE),
        Route("b.test", "/", OTHER),
        Route("p.test", "/", SERVICE),
        Route("p.test", "/other", OTHER),
        Route("gone.test", "/", ServiceName("gone")),
    ]
)


def hello_for(host: str | None) -> bytes:
    """What OpenSSL says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = False
    client = context.wrap_bio(incoming, outgoing, server_hostname=host)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def get(host: str, path: str = "/", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


def says(word: bytes) -> Serve:
    """A service that answers a first message with its own name and the message."""

    async def serve(stream: trio.SocketStream) -> None:
        data = await stream.receive_some()
        await stream.send_all(word + b":" + data)
        await stream.send_eof()

    return serve


async def two_services(plane: Plane) -> tuple[RelaySide, list[Opening]]:
    """SERVICE says "one", OTHER "two", SHELL "shell"; and what the relay is asked for."""
    relay = await plane.add_relay()
    ports = {name: await plane.serve(says(word)) for name, word in ((SERVICE, b"one"), (OTHER, b"two"), (SHELL, b"shell"))}
    relay.serves(ports[SERVICE])
    tables = {SERVICE: relay.desk.services.get(SERVICE)}
    for name in (OTHER, SHELL):
        relay.serves(ports[name], name=name)
        tables[name] = relay.desk.services.get(name)
    relay.desk.services.replace([service for service in tables.values() if service is not None])
    plane.registry.enter(relay.id, relay.instance, tuple(Offer(name) for name in tables), relay.control)
    openings: list[Opening] = []
    inner = relay.desk._deliver

    def note(session, stream, service, opening):
        openings.append(opening)
        inner(session, stream, service, opening)

    relay.desk._deliver = note
    return relay, openings


def door(plane: Plane, kind: DoorKind, default: str = "", ssh: str = "", **changes: float) -> int:
    preread_router = PrereadRouter(kind, ROUTES, ServiceName(default) or None, ServiceName(ssh) or None)
    return plane.add_door(service=ServiceName(default), preread_router=preread_router, **changes)


def secure_door(plane: Plane, tmp_path: Path, **changes: object) -> tuple[int, ssl.SSLContext]:
    """A door that ends TLS, and the context of its clients."""
    authority = trustme.CA()
    certificate = authority.issue_cert("a.test", "b.test", "gone.test")
    key, chain = tmp_path / "key.pem", tmp_path / "cert.pem"
    certificate.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return door(plane, DoorKind.HTTPS, tls=server_context([(chain, key)]), **changes), client


async def ask_secure(port: int, context: ssl.SSLContext, host: str, data: bytes) -> bytes:
    stream = trio.SSLStream(await connect(port), context, server_hostname=host)
    with trio.fail_after(5):
        await stream.send_all(data)
        received = b""
        async for chunk in stream:
            received += chunk
        await stream.aclose()
    return received


class Sink:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def put(self, record: dict[str, Any]) -> None:
        self.records.append(record)


async def ask(port: int, data: bytes) -> bytes:
    async with await connect(port) as stream:
        await stream.send_all(data)
        with trio.fail_after(5):
            return await receive_all(stream)


@pytest.mark.parametrize("kind", [DoorKind.SNI, DoorKind.AUTO])
async def test_tls_goes_by_its_name_and_is_passed_on_unread(contexts: Contexts, kind: DoorKind) -> None:
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        port = door(plane, kind)
        for host, word in (("a.test", b"one"), ("b.test", b"two")):
            hello = hello_for(host)
            assert await ask(port, hello) == word + b":" + hello
        assert [(opening.service, opening.host, opening.scheme) for opening in openings] == [
            (SERVICE, "a.test", "tls"),
            (OTHER, "b.test", "tls"),
        ]
        traces = [opening.trace for opening in openings]
        assert len(set(traces)) == 2
        assert all(traces)


@pytest.mark.parametrize("host", ["nobody.test", None])
async def test_tls_that_leads_nowhere_gets_its_alert(contexts: Contexts, host: str | None) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        assert await ask(door(plane, DoorKind.SNI), hello_for(host)) == UNRECOGNIZED_NAME
        assert plane.doors[0].counters.refused == {"no-route": 1}
        hello = hello_for(host)
        assert await ask(door(plane, DoorKind.SNI, "other"), hello) == b"two:" + hello


@pytest.mark.parametrize("kind", [DoorKind.HTTP, DoorKind.AUTO])
async def test_http_goes_by_host_and_path(contexts: Contexts, kind: DoorKind) -> None:
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        port = door(plane, kind)
        assert await ask(port, get("a.test")) == b"one:" + get("a.test")
        assert await ask(port, get("B.test.:80")) == b"two:" + get("B.test.:80")
        # Of a host whose paths lead to several services each connection carries one request.
        assert await ask(port, get("p.test")) == b"one:" + get("p.test", "/", "Connection: close")
        other = get("p.test", "/other/x", "X: y", "Connection: keep-alive")
        assert await ask(port, other) == b"two:" + other.replace(b"keep-alive", b"close")
        assert {opening.scheme for opening in openings} == {"http"}


@pytest.mark.parametrize("kind", [DoorKind.SNI, DoorKind.HTTP, DoorKind.AUTO])
async def test_first_words_cut_at_every_byte(contexts: Contexts, kind: DoorKind) -> None:
    words = hello_for("b.test") if kind is DoorKind.SNI else get("b.test")
    async with open_plane(contexts) as plane:
        await two_services(plane)
        port = door(plane, kind, header_timeout_s=30)
        cuts = range(1, len(words), max(1, len(words) // 60))
        streams = [await connect(port) for _ in cuts]
        for cut, stream in zip(cuts, streams, strict=True):
            await stream.send_all(words[:cut])
        with trio.fail_after(5):
            while len(plane.doors[0].pending.clients) < len(streams):
                await trio.sleep(0.01)
        for cut, stream in zip(cuts, streams, strict=True):
            await stream.send_all(words[cut:])
            with trio.fail_after(5):
                assert await receive_all(stream) == b"two:" + words
            await stream.aclose()
        await plane.quiet()


@pytest.mark.parametrize("cut", [1, 4_095, 4_096, 4_097, 5_000, 0])
async def test_a_hello_longer_than_what_goes_with_the_open(contexts: Contexts, cut: int) -> None:
    hello = hello_for("a.test")
    body = hello[9:] + bytes((0x77, 0x77, 6_000 >> 8, 6_000 & 255)) + bytes(6_000)  # an extension that nobody knows
    before = 34 + 1 + body[34]
    before += 2 + int.from_bytes(body[before : before + 2])
    before += 1 + body[before]
    body = body[:before] + (len(body) - before - 2).to_bytes(2) + body[before + 2 :]
    words = hello[:3] + (len(body) + 4).to_bytes(2) + b"\x01" + len(body).to_bytes(3) + body
    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(echo))
        port = door(plane, DoorKind.SNI, header_timeout_s=30)
        for rest in (b"", bytes(9_000)):
            async with await connect(port) as stream:
                if cut:
                    await stream.send_all(words[:cut])
                    with trio.fail_after(5):
                        while not any(getattr(preread, "_said", b"") for preread in plane.doors[0].pending.clients):
                            await trio.sleep(0.01)
                await stream.send_all(words[cut:] + rest)
                await stream.send_eof()
                with trio.fail_after(5):
                    assert await receive_all(stream) == words + rest
        await plane.quiet()


@pytest.mark.parametrize(
    ("kind", "words", "status"),
    [
        (DoorKind.HTTP, get("nobody.test"), 404),
        (DoorKind.AUTO, get("nobody.test"), 404),
        (DoorKind.HTTP, b"GET / HTTP/1.1\r\n\r\n", 400),
        (DoorKind.HTTP, b"garbage\r\n\r\n", 400),
        (DoorKind.HTTP, b"GET /" + b"a" * 9_000, 431),
        (DoorKind.HTTP, get("gone.test"), 503),
    ],
)
async def test_who_speaks_http_is_told_what_is_wrong(contexts: Contexts, kind: DoorKind, words: bytes, status: int) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        port = door(plane, kind)
        page = await ask(port, words)
        assert page.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nConnection: close\r\n" in page
        assert (b"Retry-After: " in page) is (status == 503)
        as_json = await ask(port, words.replace(b"\r\n\r\n", b"\r\nAccept: application/json\r\n\r\n"))
        if status in (404, 503):
            assert json.loads(as_json.partition(b"\r\n\r\n")[2])["error"]["trace"]
        await plane.quiet()


async def test_a_relay_that_refuses_is_a_page_too(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay, _ = await two_services(plane)
        relay.desk.is_draining = True
        assert (await ask(door(plane, DoorKind.HTTP), get("a.test"))).startswith(b"HTTP/1.1 503 ")
        await plane.quiet()


async def test_an_upload_does_not_take_the_answer_away(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        async with await connect(door(plane, DoorKind.HTTP)) as stream:
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: nobody.test\r\nContent-Length: 200000\r\n\r\n" + bytes(100_000))
            with trio.fail_after(5):
                assert (await receive_all(stream)).startswith(b"HTTP/1.1 404 ")


async def test_who_waits_for_the_server_gets_the_default(contexts: Contexts) -> None:
    async def greets(stream: trio.SocketStream) -> None:
        await stream.send_all(b"RFB 003.008\n")
        await echo(stream)

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(greets))
        async with await connect(door(plane, DoorKind.AUTO, SERVICE, sniff_s=0.1)) as stream:
            with trio.fail_after(5):
                assert await receive_exactly(stream, 12) == b"RFB 003.008\n"
                await stream.send_all(b"later")
                assert await receive_exactly(stream, 5) == b"later"


async def test_ssh_and_others_at_one_door(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        port = door(plane, DoorKind.AUTO, "other", "shell")
        assert await ask(port, b"SSH-2.0-x\r\n") == b"shell:SSH-2.0-x\r\n"
        assert await ask(port, b"\x00\x01\x02") == b"two:\x00\x01\x02"
        nowhere = door(plane, DoorKind.AUTO)
        async with await connect(nowhere) as stream:
            await stream.send_all(b"\x00\x01")
            assert await until_reset(stream, 3) == b""


@pytest.mark.parametrize("kind", [DoorKind.SNI, DoorKind.HTTP, DoorKind.AUTO])
async def test_who_says_too_little_is_not_waited_for(contexts: Contexts, kind: DoorKind) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        port = door(plane, kind, header_timeout_s=0.3)
        for words in (b"", b"\x16\x03\x01" if kind is DoorKind.SNI else b"GET /"):
            async with await connect(port) as stream:
                if words:
                    await stream.send_all(words)
                if kind is DoorKind.HTTP:
                    with trio.fail_after(5):
                        assert (await receive_all(stream)).startswith(b"HTTP/1.1 408 ")
                else:
                    assert await until_reset(stream, 5) == b""
        assert plane.doors[0].counters.refused == {"first-words-timeout": 2}
        await plane.quiet()


async def test_pending_clients_that_leave_or_reset_are_forgotten(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        port = door(plane, DoorKind.SNI)
        stream = await connect(port)
        await stream.send_all(b"\x16")
        reset(stream)
        async with await connect(port) as stream:
            await stream.send_all(b"\x16\x03")
            await stream.send_eof()
            assert await until_reset(stream, 3) == b""
        await plane.quiet()
        assert not plane.doors[0].pending.clients


async def test_too_many_are_told_so_where_http_is_spoken(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        preread_router = PrereadRouter(DoorKind.HTTP, ROUTES, None)
        port = plane.add_door(AdmissionLimits(connections_per_source=1, exempt=()), preread_router=preread_router)
        async with await connect(port):
            with trio.fail_after(10):
                while not plane.doors[0].pending.clients:
                    await trio.sleep(0.01)
            async with await connect(port) as stream:
                with trio.fail_after(5):
                    assert (await receive_all(stream)).startswith(b"HTTP/1.1 429 ")


async def test_a_door_that_closes_turns_its_pending_clients_away(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        async with await connect(door(plane, DoorKind.SNI)) as stream:
            with trio.fail_after(10):
                while not plane.doors[0].pending.clients:
                    await trio.sleep(0.01)
            plane.doors[0].close()
            assert await until_reset(stream, 3) == b""
        await plane.quiet()


async def test_tls_that_ends_at_the_door(contexts: Contexts, tmp_path: Path) -> None:
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        port, client = secure_door(plane, tmp_path)
        for host, word in (("a.test", b"one"), ("b.test", b"two")):
            assert await ask_secure(port, client, host, get(host)) == word + b":" + get(host)
        assert {opening.scheme for opening in openings} == {"https"}
        assert (await ask_secure(port, client, "gone.test", get("gone.test"))).startswith(b"HTTP/1.1 503 ")
        assert (await ask_secure(port, client, "a.test", get("nobody.test"))).startswith(b"HTTP/1.1 404 ")
        assert (await ask(port, get("a.test"))).startswith(b"HTTP/1.1 400 ")
        async with await connect(port) as stream:
            await stream.send_all(b"\x16\x03\x01\x00\x02garbage")
            with trio.fail_after(5):
                await receive_all(stream)
        await plane.quiet()
        assert plane.doors[0].counters.refused == {"no-relay": 1, "no-route": 1, "tls-failed": 2}


async def test_a_handshake_that_takes_too_long(contexts: Contexts, tmp_path: Path) -> None:
    async with open_plane(contexts) as plane:
        await two_services(plane)
        port, _ = secure_door(plane, tmp_path, header_timeout_s=0.3)
        for words in (b"", hello_for("a.test")):
            async with await connect(port) as stream:
                if words:
                    await stream.send_all(words)
                with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                    await receive_all(stream)
        await plane.quiet()
        assert plane.doors[0].counters.refused == {"first-words-timeout": 2}


@pytest.mark.parametrize("kind", [DoorKind.TCP, DoorKind.HTTP, DoorKind.HTTPS])
async def test_the_access_log_is_told_of_every_client(contexts: Contexts, tmp_path: Path, kind: DoorKind) -> None:
    sink = Sink()
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        if kind is DoorKind.TCP:
            await ask(plane.add_door(access=sink), get("a.test"))
        elif kind is DoorKind.HTTP:
            await ask(door(plane, kind, access=sink), get("a.test"))
        else:
            port, client = secure_door(plane, tmp_path, access=sink)
            await ask_secure(port, client, "a.test", get("a.test"))
        await plane.quiet()
    (record,) = sink.records
    (opening,) = openings
    assert (record["trace"], record["service"], record["relay"], record["end"]) == (opening.trace, SERVICE, "a", "closed")
    assert (record["bytes_in"], record["bytes_out"]) == (len(get("a.test")), len(get("a.test")) + 4)
    assert 0 <= record["accepted_s"] <= record["first_byte_s"] <= record["duration_s"]
    assert record["host"] == ("" if kind is DoorKind.TCP else "a.test")
