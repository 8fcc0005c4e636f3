"""A gateway in wrong hands asks a relay for all it can think of: the relay connects to what its configuration says, and nothing else."""

import random
import socket
import string

import pytest
import trio
from peers import echo
from plane import SERVICE, Contexts, open_plane

from fxtunnel.codes import Code
from fxtunnel.engine.splice import Splice
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol.opening import Opening, encode_tags

OPENINGS = 10_000
AT_ONCE = 250
TARGETS = (
    *(f"127.0.0.{last}" for last in range(1, 60)),
    *(f"10.0.0.{last}" for last in range(1, 60)),
    *("169.254.169.254", "0.0.0.0", "0x7f000001", "2130706433", "localhost", "metadata.google.internal", "node-a", "..", "-", "ssh.."),
)


class Asker(Splice):
    """An opener that only remembers how it was answered."""

    def __init__(self, plane: object) -> None:
        self.near, far = socket.socketpair()
        far.setblocking(False)
        super().__init__(plane.reactor, far)
        self.answer: Code | str | None = None

    def on_accept(self) -> None:
        self.answer = "accepted"

    def on_refuse(self, code: Code, text: str) -> None:
        self.answer = code
        self.abort()

    def on_reset(self, code: Code) -> None:
        self.answer = code
        self.abort()

    def end(self) -> None:
        self.fail(Code.CANCELLED)
        self.near.close()


def odd_opening(chance: random.Random) -> Opening:
    """Names that look like targets, with whatever else an OPEN can say."""
    name = (
        chance.choice(TARGETS)
        if chance.random() < 0.5
        else "".join(chance.choices(string.ascii_letters + "._-", k=chance.randrange(2, 64)))
    )
    return Opening(
        ServiceName(name),
        chance.choice(("", "127.0.0.1:22", "[::1]:22", "x\r\ny", "0.0.0.0:0")),
        chance.choice(("", "127.0.0.1:22")),
        chance.choice((None, RelayId("a"), RelayId("127.0.0.1"))),
        host=chance.choice(("", "127.0.0.1", "localhost:22")),
        scheme=chance.choice(("", "http", "https", "tls")),
        node=chance.choice((None, RelayId("a"), RelayId("127.0.0.1"), RelayId("node-z"))),
        ticket=chance.choice(("", "a.b.c")),
    )


async def test_no_opening_leads_anywhere_else(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: set[object] = set()
    connect_ex = socket.socket.connect_ex

    class Watched(socket.socket):
        def connect_ex(self, address: object) -> int:
            dialled.add(address)
            return connect_ex(self, address)

    async with open_plane(contexts) as plane:
        port = await plane.serve(echo)
        relay = await plane.add_relay(port)
        monkeypatch.setattr("fxrelay.delivery.delivery.socket.socket", Watched)
        legal = Asker(plane)
        stream = relay.far_session.open_stream(encode_tags(Opening(SERVICE)), legal)
        assert stream is not None
        legal.join(relay.far_session, stream)
        chance = random.Random(11)
        answers: dict[object, int] = {}
        for _ in range(OPENINGS // AT_ONCE):
            askers = [Asker(plane) for _ in range(AT_ONCE)]
            for asker in askers:
                stream = relay.far_session.open_stream(encode_tags(odd_opening(chance)), asker)
                assert stream is not None
                asker.join(relay.far_session, stream)
            with trio.fail_after(10):
                while any(asker.answer is None for asker in askers):
                    await trio.sleep(0.005)
            for asker in askers:
                answers[asker.answer] = answers.get(asker.answer, 0) + 1
                asker.end()
        assert answers == {Code.NO_SERVICE: OPENINGS}
        assert legal.answer == "accepted"
        assert dialled == {("127.0.0.1", port)}
        legal.end()
