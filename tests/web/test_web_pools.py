"""Which node answers a request: by path, by cookie, by claim, by choice; and what follows when it is not there."""

import base64
import json
import re

import trio
from delivery_rig import NOBODY, Spec, listen_everywhere, serve_on
from peers import connect
from plane import SERVICE, Contexts, Plane, open_plane
from web_rig import NamingChooser, add_web_relay, ask, read_head, statuses

from fxrelay.web.affinity import ClaimAffinity, CookieAffinity
from fxrelay.web.heads import Field
from fxrelay.web.ports import Allow, RequestFacts, WebRules
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId, ServiceName

COOKIE = CookieAffinity("fxnode", SERVICE, b"k" * 32)


def serve_names(plane: Plane, *hosts: str) -> tuple[int, dict[str, list[bytes]]]:
    """A service at each address that answers with its address, and the heads they got."""
    listeners = listen_everywhere(*hosts)
    got: dict[str, list[bytes]] = {host: [] for host in hosts}

    def naming(host: str) -> object:
        async def serve(stream: trio.SocketStream) -> None:
            while True:
                head, _ = await read_head(stream)
                if not head:
                    return
                got[host].append(head)
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(host), host.encode()))

        return serve

    for host, listener in listeners.items():
        serve_on(plane, listener, naming(host))
    return next(iter(listeners.values())).getsockname()[1], got


def get(path: str, *fields: str, close: bool = True) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: a", *fields, *(["Connection: close"] if close else []), "", ""]
    return "\r\n".join(lines).encode()


def who(answer: bytes) -> str:
    assert statuses(answer) == [200], answer
    return answer.rpartition(b"\r\n\r\n")[2].decode()


async def test_nodes_by_path_with_and_without_their_prefix(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, got = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        await add_web_relay(plane, port, WebRules(SERVICE, node_paths=True), chooser=chooser, host=NOBODY, is_pool=True)
        door = plane.add_door()
        assert who(await ask(door, get("/node/n3/x/y?z"))) == "127.0.0.3"
        assert got["127.0.0.3"][-1].startswith(b"GET /node/n3/x/y?z HTTP/1.1\r\n")
        assert who(await ask(door, get("/rnode/n3/x/y?z"))) == "127.0.0.3"
        assert got["127.0.0.3"][-1].startswith(b"GET /x/y?z HTTP/1.1\r\n")
        assert b"X-Forwarded-Prefix: /rnode/n3\r\n" in got["127.0.0.3"][-1]
        assert who(await ask(door, get("/rnode/n2?q"))) == "127.0.0.2"
        assert got["127.0.0.2"][-1].startswith(b"GET /?q HTTP/1.1\r\n")
        for path in ("/node/n9/", "/rnode/127.0.0.3/", "/node/127.0.0.3:22/", "/node//x", "/node/../x", "/node/%6e3/", "/rnode/n3%2f/"):
            assert statuses(await ask(door, get(path))) == [404], path
        assert chooser.asked == []


async def test_one_connection_for_several_nodes(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, _ = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        await add_web_relay(plane, port, WebRules(SERVICE, node_paths=True), chooser=chooser, host=NOBODY, is_pool=True)
        requests = b"".join(get(f"/node/{name}/", close=False) for name in ("n2", "n3", "n9", "n2")) + get("/node/n3/")
        answer = await ask(plane.add_door(), requests)
        assert statuses(answer) == [200, 200, 404, 200, 200]
        assert re.findall(rb"127\.0\.0\.[23]", answer) == [b"127.0.0.2", b"127.0.0.3", b"127.0.0.2", b"127.0.0.3"]
        assert chooser.named_asked == ["n2", "n3", "n9"]  # the last two found an idle connection


async def test_a_cookie_brings_the_client_back(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, got = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        await add_web_relay(plane, port, WebRules(SERVICE, affinity=COOKIE), chooser=chooser, host=NOBODY, is_pool=True)
        door = plane.add_door()
        first = await ask(door, get("/"))
        assert who(first) == "127.0.0.2"
        cookie = re.search(rb"Set-Cookie: (fxnode=[^;]+); Path=/; HttpOnly; SameSite=Lax\r\n", first)
        assert cookie is not None
        chooser.nodes = chooser.nodes[::-1]  # now the other one would be chosen
        again = await ask(door, get("/", f"Cookie: a=b; {cookie[1].decode()}"))
        assert who(again) == "127.0.0.2"
        assert b"Set-Cookie" not in again
        forged = cookie[1].decode().replace("n2", "n3")
        for value in (forged, "fxnode=n2", "fxnode=.n2", "fxnode=", "fxnode=\xff"):
            answer = await ask(door, get("/", f"Cookie: {value}"))
            assert b"Set-Cookie: fxnode=" in answer
        await chooser.settled()
        assert b"X-Forwarded-For: 127.0.0.1\r\n" in got["127.0.0.2"][0]


async def test_a_dead_node_of_an_affinity_is_replaced(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, _ = serve_names(plane, "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        await add_web_relay(plane, port, WebRules(SERVICE, affinity=COOKIE), chooser=chooser, host=NOBODY, is_pool=True)
        mark = COOKIE.set_cookie(RelayId("n2"), secure=False).decode().partition(";")[0].removeprefix("Set-Cookie: ")
        answer = await ask(plane.add_door(), get("/", f"Cookie: {mark}"))
        assert who(answer) == "127.0.0.3"
        assert COOKIE.set_cookie(RelayId("n3"), secure=False) in answer
        await chooser.settled()
        assert chooser.asked[0][1] == {"n2"}


async def test_a_claim_steers(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, _ = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        await add_web_relay(plane, port, WebRules(SERVICE, affinity=ClaimAffinity("iss")), chooser=chooser, host=NOBODY, is_pool=True)
        door = plane.add_door()

        def bearer(claims: object) -> str:
            return f"Authorization: Bearer e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.x"

        assert who(await ask(door, get("/", bearer({"iss": "n3"})))) == "127.0.0.3"
        for claims in ({"iss": "n9"}, {"iss": "../x"}, {"iss": 3}, {}, [], "[" * 2_000):
            assert who(await ask(door, get("/", bearer(claims)))) == "127.0.0.2"
        assert who(await ask(door, get("/", "Authorization: Bearer " + "[" * 4_000))) == "127.0.0.2"


async def test_claims_are_held_as_long_as_the_answer_takes(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        go_on = trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
            await go_on.wait()
            await stream.send_all(b"done")

        listeners = listen_everywhere("127.0.0.2")
        serve_on(plane, listeners["127.0.0.2"], service)
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"))
        port = listeners["127.0.0.2"].getsockname()[1]
        relay, _ = await add_web_relay(plane, port, chooser=chooser, host=NOBODY, is_pool=True)
        async with await connect(plane.add_door()) as stream:
            await stream.send_all(get("/"))
            await read_head(stream)
            (claim,) = chooser.claims
            assert (claim.connected_at, claim.released) == ([1], 0)
            go_on.set()
            assert await stream.receive_some() == b"done"
        await chooser.settled()
        assert relay.desk.counters.paths_by_service == {SERVICE: {"direct": 1}}


async def test_nobody_takes_it(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        chooser = NamingChooser()
        await add_web_relay(plane, 9, chooser=chooser, host=NOBODY, is_pool=True)
        answer = await ask(plane.add_door(), get("/", "Accept: text/html"))
        assert statuses(answer) == [503]
        assert re.search(rb"Retry-After: [2-8]\r\n", answer)
        trace = re.search(rb"trace ([0-9a-f]+)", answer)
        assert trace is not None
        assert chooser.asked[0][0].trace_id == trace[1].decode()


async def test_a_gate_is_asked_before_and_after(contexts: Contexts) -> None:
    class Gate:
        def __init__(self) -> None:
            self.seen: list[tuple[str, object]] = []

        def concerns(self, service: ServiceName) -> bool:
            return True

        async def admit(self, request: RequestFacts) -> Allow:
            self.seen.append((request.path.decode(), request.node))
            if request.path == b"/no":
                raise Refused(429, "TooMany", "Not so <fast>.")
            return Allow(RelayId("n3")) if request.path == b"/steer" else Allow()

        async def answered(self, request: RequestFacts, node: RelayId | None, status: int, fields: tuple[Field, ...]) -> tuple[bytes, ...]:
            self.seen.append((request.path.decode(), node))
            if request.path == b"/hide":
                raise Refused(409, "Taken", "Somebody else has it.")
            return ()

    async with open_plane(contexts) as plane:
        port, got = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        gate = Gate()
        await add_web_relay(plane, port, chooser=chooser, host=NOBODY, is_pool=True, gate=gate)
        door = plane.add_door()
        refused = await ask(door, get("/no"))
        assert statuses(refused) == [429]
        assert b"Not so &lt;fast&gt;." in refused
        assert not got["127.0.0.2"]
        assert who(await ask(door, get("/steer"))) == "127.0.0.3"
        assert statuses(await ask(door, get("/hide"))) == [409]
        assert gate.seen == [("/no", None), ("/steer", None), ("/steer", "n3"), ("/hide", None), ("/hide", "n2")]


async def test_the_stream_names_the_only_node(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        port, _ = serve_names(plane, "127.0.0.2", "127.0.0.3")
        chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
        relay, web = await add_web_relay(plane, port, WebRules(SERVICE, node_paths=True), chooser=chooser, host=NOBODY, is_pool=True)
        take = web.take

        def take_for_n3(session: object, stream: object, service: object, opening: object, gateway_id: object) -> None:
            take(session, stream, service, opening._replace(node=RelayId("n3")), gateway_id)

        relay.desk.web = type("Taker", (), {"take": staticmethod(take_for_n3), "streams": 0, "abort_all": web.abort_all})()
        door = plane.add_door()
        assert who(await ask(door, get("/"))) == "127.0.0.3"
        assert who(await ask(door, get("/node/n3/"))) == "127.0.0.3"
        assert statuses(await ask(door, get("/node/n2/"))) == [404]
