"""One relay's gate for logins, with a real store and a rival; nodes, their service and requests are the test's."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import jwt
import pytest
import trio

from fxrelay.balance.seating import SeatRules
from fxrelay.cluster.members import Ages
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxrelay.logins.gate import LoginGate, LoginService, Timing
from fxrelay.logins.login import HeldLogin
from fxrelay.logins.passes import PassCookies
from fxrelay.logins.rules import FASTX3, FORM, LoginRules, Retry, Signs
from fxrelay.reserving.reservations import Reservations
from fxrelay.web.heads import Field
from fxrelay.web.ports import Reply, RequestFacts, WholeAnswer
from fxtunnel.codes import Code
from fxtunnel.errors import NodeError
from fxtunnel.kit.answers import Refused
from fxtunnel.kit.jwt_keys import KeySource, TokenVerifier
from fxtunnel.kit.jwt_verifying import TokenRules
from fxtunnel.model import RelayId, ServiceName
from tests.reservations.test_reservations_service import Relay, relays, until
from tests.system.login_nodes import KEY, public_pem

SITE = ServiceName("site")
N1, N2 = RelayId("n1"), RelayId("n2")
SIMPLE = replace(FORM, signs=Signs(frozenset({302})), retry=Retry.REPLAY)
GONE = NodeError("connection refused")


class Claim:
    def connected(self) -> None: ...
    def release(self) -> None: ...
    def hand_over(self) -> None: ...


class Chooser:
    """Gives the nodes in their order, without those that this relay knows to be somebody else's."""

    def __init__(self, reservations: Reservations, *nodes: RelayId, is_reserving: bool = True) -> None:
        self.reservations = reservations
        self.nodes = nodes
        self.asked: list[Wanted] = []
        self._seat = object() if is_reserving else None

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        await trio.lowlevel.checkpoint()
        self.asked.append(wanted)
        holders = self.reservations.holders.users(0)
        for name in self.nodes:
            if name not in excluded and holders.get(name, wanted.user) == wanted.user:
                return self._node(name)
        return NoNode(Code.BUSY, "nobody", position=3)

    async def named(self, wanted: Wanted, server_id: RelayId) -> Node | NoNode:
        await trio.lowlevel.checkpoint()
        return self._node(server_id)

    def _node(self, name: RelayId) -> Node:
        return Node(name, False, "", False, Claim(), self._seat)


@dataclass
class Service:
    """Answers with the next of these; `meanwhile` is awaited before each."""

    answers: list[WholeAnswer | Exception]
    meanwhile: Callable[[], object] | None = None
    sent_to: list[RelayId] = field(default_factory=list)

    async def send(self, node: Node, most_bytes: int) -> WholeAnswer:
        self.sent_to.append(node.server_id)
        await trio.lowlevel.checkpoint()
        if self.meanwhile is not None:
            await self.meanwhile()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(status: int, body: bytes = b"", **named: str) -> WholeAnswer:
    fields = tuple(Field(name.replace("_", "-").lower().encode(), name.encode(), value.encode()) for name, value in named.items())
    return WholeAnswer(status, b"", fields, body)


def success(**claims: object) -> WholeAnswer:
    token = jwt.encode({"sub": "ann", "exp": 4_000_000_000, **claims}, KEY, algorithm="EdDSA")
    return answer(200, json.dumps({"result": {"stage": "success", "token": token}}).encode())


def stage(token: str) -> WholeAnswer:
    return answer(200, json.dumps({"result": {"stage": "password", "authtoken": token}}).encode())


class Rig:
    def __init__(self, relay: Relay, rival: Relay, gate: LoginGate, rules: LoginRules, tmp_path: Path) -> None:
        self.relay, self.rival, self.gate = relay, rival, gate
        self.service = LoginService(rules, PassCookies("fxlogin", "site", b"k" * 32), SeatRules(always=True))
        if rules is FASTX3:
            (tmp_path / "keys.pem").write_bytes(public_pem())
            verifier = TokenVerifier(TokenRules(("EdDSA",)), KeySource(tmp_path / "keys.pem"))
            self.service = replace(self.service, verifier=verifier)
        self.gate.reconfigure({SITE: self.service})

    async def ask(self, service: Service, body: bytes = b"username=ann&password=x", client: str = "192.0.2.1:5", cookie: str = "") -> Reply:
        request = self.request("/login" if self.service.verifier is None else "/v3/api/auth/ssh", "POST", client, cookie)
        passed = await self.gate.admit(request)
        assert passed.held is not None
        return await passed.held.run(body, service)

    def request(self, path: str, method: str = "GET", client: str = "192.0.2.1:5", cookie: str = "") -> RequestFacts:
        fields = (Field(b"cookie", b"Cookie", cookie.encode()),) if cookie else ()
        return RequestFacts(SITE, "trace", client, method.encode(), path.encode(), "a", fields, None)

    async def refused(self, service: Service, status: int, name: str, body: bytes = b"username=ann&password=x") -> Refused:
        with pytest.raises(Refused) as caught:
            await self.ask(service, body)
        assert (caught.value.status, caught.value.name) == (status, name)
        return caught.value

    @property
    def users(self) -> dict[RelayId, str]:
        return {name: user for name, user in self.relay.reservations.holders.users(0).items() if user != "nobody"}

    async def nothing_is_left(self) -> None:
        await until(lambda: not self.users and not self.relay.reservations.holders.wanted(0))


@asynccontextmanager
async def open_rig(tmp_path: Path, rules: LoginRules, *nodes: RelayId, is_reserving: bool = True) -> AsyncIterator[Rig]:
    async with relays(tmp_path, "a", "b") as (relay, rival):
        chooser = Chooser(relay.reservations, *nodes, is_reserving=is_reserving)
        gate = LoginGate(chooser, ClusterView(Ages()), HeldLogin, Timing(1.0, 3.0))
        gate.reservations = relay.reservations
        async with trio.open_nursery() as nursery:
            await nursery.start(gate.run)
            yield Rig(relay, rival, gate, rules, tmp_path)
            nursery.cancel_scope.cancel()


def pass_of(reply: Reply) -> str:
    line = next(line for line in reply.extra if line.startswith(b"Set-Cookie: fxlogin="))
    return line.removeprefix(b"Set-Cookie: ").partition(b";")[0].decode()
