"""TLS for one name, a request for another: one of them decides, and everybody downstream is told that one; and the names of doors."""

from pathlib import Path

import trio
from peers import connect
from plane import SERVICE, Contexts, open_plane
from test_doors_heard import OTHER, Sink, ask, ask_secure, door, get, hello_for, secure_door, two_services

from fxgateway.routing.preread_router import DoorKind


async def test_where_tls_ends_the_request_decides(contexts: Contexts, tmp_path: Path) -> None:
    sink = Sink()
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        port, client = secure_door(plane, tmp_path, access=sink)
        for name, host, service, word in (("a.test", "b.test", OTHER, b"two"), ("b.test", "a.test", SERVICE, b"one")):
            assert await ask_secure(port, client, name, get(host)) == word + b":" + get(host)
            assert (openings[-1].service, openings[-1].host, openings[-1].scheme) == (service, host, "https")
        assert (await ask_secure(port, client, "a.test", get("nobody.test"))).startswith(b"HTTP/1.1 404 ")
        assert (await ask_secure(port, client, "a.test", get("a.test", "/", "Host: b.test"))).startswith(b"HTTP/1.1 400 ")
        await plane.quiet()
    assert [(record["service"], record["host"]) for record in sink.records] == [(OTHER, "b.test"), (SERVICE, "a.test")]


async def test_where_tls_passes_its_name_decides_and_no_request_behind_it(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        port = door(plane, DoorKind.SNI)
        words = hello_for("a.test") + get("b.test")
        assert await ask(port, words) == b"one:" + words
        async with await connect(port) as stream:
            hello = hello_for("b.test")
            await stream.send_all(hello)
            with trio.fail_after(10):
                while len(openings) < 2:
                    await trio.sleep(0.01)
            await stream.send_all(get("a.test"))
        assert [(opening.service, opening.host, opening.scheme) for opening in openings] == [
            (SERVICE, "a.test", "tls"),
            (OTHER, "b.test", "tls"),
        ]


async def test_a_relay_is_told_where_the_client_came_in_whatever_the_door_is_called(contexts: Contexts) -> None:
    """PROTOCOL.md, 5, tag 0x82: it goes into the PROXY header that a service gets."""
    words = {None: b"hello", DoorKind.SNI: hello_for("a.test"), DoorKind.HTTP: get("a.test")}
    async with open_plane(contexts) as plane:
        _, openings = await two_services(plane)
        for kind, said in words.items():
            port = plane.add_door(name="the front door") if kind is None else door(plane, kind, name="the front door")
            assert await ask(port, said) == b"one:" + said
        listen = plane.doors[0].config.listen
        assert [opening.door for opening in openings] == [str(listen)] * len(words)
