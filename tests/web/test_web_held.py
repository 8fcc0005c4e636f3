"""Requests that a gate holds: whole in, whole back, as long as the client is there."""

import trio
import trio.testing
from delivery_rig import NOBODY, Spec, listen_everywhere, serve_on
from peers import connect
from plane import SERVICE, Contexts, Plane, open_plane
from web_rig import Canned, NamingChooser, add_web_relay, ask, read_head, statuses

from fxrelay.delivery.ports import NoNode, Wanted
from fxrelay.web.client import ClientSide
from fxrelay.web.holding import while_there
from fxrelay.web.ports import Allow, Reply, RequestFacts, Sender, WebLimits, WholeAnswer
from fxtunnel.errors import NodeError
from fxtunnel.kit.answers import Refused
from fxtunnel.model import GatewayId, RelayId, ServiceName

LOGIN = b"POST /login HTTP/1.1\r\nHost: a\r\n"


class Holding:
    """A gate that holds what goes to /login, and sends it to the node chosen."""

    max_body_bytes = 100

    def __init__(self, chooser: NamingChooser) -> None:
        self.chooser = chooser
        self.bodies: list[bytes] = []
        self.undone = 0
        self.cancelled = 0
        self.waits = False
        self.most_bytes = 1_000

    def concerns(self, service: ServiceName) -> bool:
        return True

    async def admit(self, request: RequestFacts) -> Allow:
        return Allow(held=self) if request.path == b"/login" else Allow(closed=frozenset({RelayId("n3")}))

    async def answered(self, request: RequestFacts, node: RelayId | None, status: int, fields: object) -> tuple[bytes, ...]:
        return (b"X-Extra: 1\r\n",)

    async def run(self, body: bytes, sender: Sender) -> Reply:
        self.bodies.append(body)
        try:
            if self.waits:
                await trio.sleep_forever()
            node = await self.chooser.choose(Wanted(SERVICE, "", GatewayId(""), "t"), frozenset())
            assert not isinstance(node, NoNode)
            answer = await sender.send(node, self.most_bytes)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        except NodeError as exc:
            raise Refused(502, "Unreachable", "No.", fields=(b"Fx-Queue-Position: 3\r\n",)) from exc

        def undone() -> None:
            self.undone += 1

        return Reply(answer, (b"Set-Cookie: p=1\r\n",), undone)


async def open_site(plane: Plane, *answers: bytes) -> tuple[int, Holding, Canned]:
    listener = listen_everywhere("127.0.0.2")["127.0.0.2"]
    service = Canned(*answers)
    serve_on(plane, listener, service)
    chooser = NamingChooser(Spec("n2", address="127.0.0.2"), Spec("n3", address="127.0.0.3"))
    gate = Holding(chooser)
    port = listener.getsockname()[1]
    await add_web_relay(plane, port, chooser=chooser, host=NOBODY, is_pool=True, gate=gate)
    return plane.add_door(), gate, service


async def test_a_body_in_any_framing_is_held_and_sent_with_its_length(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        door, gate, service = await open_site(plane)
        for framing in (
            b"Content-Length: 5\r\n\r\nhello",
            b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nA: b\r\n\r\n",
            b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
        ):
            answer = await ask(door, LOGIN + b"Connection: close\r\n" + framing)
            assert statuses(answer)[-1] == 200
            assert b"Set-Cookie: p=1\r\n" in answer
            assert (b"100 Continue" in answer) is (b"Expect" in framing)
            assert b"Content-Length: 5\r\n" in service.got[-1]
            assert b"chunked" not in service.got[-1]
            assert b"xpect" not in service.got[-1]
        assert gate.bodies == [b"hello"] * 3
        await gate.chooser.settled()


async def test_answers_come_back_whole_and_the_connection_goes_on(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        found = b"HTTP/1.1 302 Found\r\nTransfer-Encoding: chunked\r\nLocation: /\r\n\r\n"
        chunked = b"HTTP/1.1 100 Continue\r\n\r\n" + found + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        door, gate, _ = await open_site(plane, chunked, b"HTTP/1.1 204 No Content\r\n\r\n")
        requests = (LOGIN + b"Content-Length: 1\r\n\r\nx") * 2 + b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        answer = await ask(door, requests)
        assert statuses(answer) == [302, 204, 200]
        first = answer.partition(b"abc")[0]
        assert b"Content-Length: 3\r\n" in first
        assert b"chunked" not in first
        assert b"Location: /\r\n" in first
        assert b"X-Extra: 1\r\n" in answer
        assert gate.bodies == [b"x", b"x"]


async def test_what_is_refused(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        long = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2_000
        broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        switched = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
        door, gate, _ = await open_site(plane, long, broken, switched, b"nonsense\r\n\r\n")
        body = LOGIN + b"Connection: close\r\nContent-Length: 1\r\n\r\nx"
        for _ in range(4):
            assert statuses(await ask(door, body)) == [502]
        for too_large in (
            b"Content-Length: 101\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n",
        ):
            assert statuses(await ask(door, LOGIN + too_large)) == [413]
        assert statuses(await ask(door, LOGIN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")) == [400]
        assert statuses(await ask(door, LOGIN + b"Content-Length: 9\r\n\r\nslow")) == [408]
        gate.chooser.nodes = (Spec("n3", address="127.0.0.3"),)
        answer = await ask(door, body)
        assert statuses(answer) == [502]
        assert b"Fx-Queue-Position: 3\r\n" in answer
        assert gate.undone == 0
        await gate.chooser.settled()


async def test_who_leaves_is_not_waited_for(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        door, gate, _ = await open_site(plane)
        gate.waits = True
        for is_reset in (False, True):
            stream = await connect(door)
            await stream.send_all(LOGIN + b"Content-Length: 1\r\n\r\nx")
            with trio.fail_after(5):
                while len(gate.bodies) <= is_reset:
                    await trio.sleep(0.01)
            if is_reset:
                await trio.aclose_forcefully(stream)
            else:
                await stream.aclose()
            with trio.fail_after(5):
                while gate.cancelled <= is_reset:
                    await trio.sleep(0.01)
        gate.waits = False
        stream = await connect(door)
        async with stream:
            await stream.send_all(LOGIN + b"Content-Length: 1\r\n\r\nx")
            head, _ = await read_head(stream)
        assert head.startswith(b"HTTP/1.1 200 ")
        assert gate.undone == 0


async def test_an_answer_that_nobody_can_be_given_any_more_is_undone() -> None:
    undone, connection = [], trio.CancelScope()

    async def ask() -> Reply:
        await trio.lowlevel.checkpoint()
        connection.cancel()  # it breaks at the very moment at which the login is committed
        return Reply(WholeAnswer(200, b"OK", (), b""), undone=lambda: undone.append(1))

    ours, _ = trio.testing.memory_stream_pair()
    with connection:
        await while_there(ClientSide(ours, WebLimits()), ask)
    assert connection.cancelled_caught
    assert undone == [1]
