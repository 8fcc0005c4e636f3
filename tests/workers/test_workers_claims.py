"""Who has a relay's name, when the parent's answer and the fence that follows it are read together; whom a worker passes on."""

import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest
import trio

from fxgateway.doors.client import Client
from fxgateway.doors.doors import Doors
from fxgateway.routing.admission import AdmissionLimits
from fxgateway.routing.shared_admission import SharedAdmission
from fxgateway.tunnels.peer_processes import AcceptedConnection
from fxgateway.tunnels.pre_auth_queue import TooBusy
from fxgateway.tunnels.registry import Registry, RegistryLimits
from fxgateway.workers.channel import Channel, Message, pair
from fxgateway.workers.parent_line import ParentLine
from fxgateway.workers.peering import WorkerParts, WorkerPeering
from fxgateway.workers.peers import Peers
from fxgateway.workers.relay_dispatch import RelayDispatch
from fxgateway.workers.worker_relays import AllRelays
from fxtunnel.codes import Code
from fxtunnel.engine.ports import SessionConfig
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.tls_socket import TlsSocket
from fxtunnel.errors import TunnelClosed
from fxtunnel.kit.client_hello import ClientHello
from fxtunnel.model import InstanceId, Offer, RelayId, ServiceName
from fxtunnel.protocol.alpn import ALPN_WORKER
from fxtunnel.protocol.credit import WindowBudget

NODE = RelayId("node-a")
FIRST, SECOND = InstanceId("first"), InstanceId("second")
OFFERS = (Offer(ServiceName("ssh")),)


@dataclass
class Parent:
    """The other end of a worker's line: answers all claims at once, when it is told to."""

    claims: list[Message] = field(default_factory=list)
    news: list[Message] = field(default_factory=list)
    channel: Channel | None = None

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        if message["op"] == "claim":
            self.claims.append(message)
        elif message["op"] == "told":
            self.news.append(message["news"])

    def on_gone(self, channel: Channel) -> None:
        pass

    def send(self, message: Message) -> None:
        assert self.channel is not None
        assert self.channel.send(message)

    def answer(self, claim: Message, epoch: int) -> None:
        self.send({"op": "answer", "n": claim["n"], "epoch": epoch})

    def fence(self, instance: InstanceId, epoch: int, successor: InstanceId) -> None:
        self.send({"op": "fence", "relay": NODE, "instance": instance, "epoch": epoch, "successor": successor, "departure": None})


class Link:
    remote_address = "192.0.2.1:1"
    connected_at = 0.0

    def __init__(self) -> None:
        self.closed: list[Code] = []

    def drain(self, deadline_s: float) -> None:
        pass

    def close(self, code: Code, text: str, retry_after_s: float = 0) -> None:
        self.closed.append(code)


class Worker:
    """As much of one as takes names."""

    def __init__(self, reactor: Reactor, line: socket.socket, parent: Parent) -> None:
        self.parent = parent
        self.registry = Registry(reactor, SessionConfig(), WindowBudget(1 << 20), RegistryLimits())
        admission = SharedAdmission(AdmissionLimits(), 100)
        self.line, self.peers = ParentLine(reactor, line), Peers(reactor, admission)
        peers = self.peers
        relays = AllRelays(self.registry, peers.pass_on, peers.catch_up)
        self.relay_dispatch = RelayDispatch(self.line, peers, self.registry, relays, 1)
        doors = Doors(reactor, relays, admission)
        WorkerPeering(
            reactor, self.line, peers, WorkerParts(self.registry, relays, admission, doors, self.relay_dispatch, dict, lambda *_: 0)
        ).begin()
        self.links: dict[InstanceId, Link] = {}
        self.refused: dict[InstanceId, Code] = {}

    async def take(self, instance: InstanceId) -> None:
        """As a control link does it."""
        try:
            epoch = await self.relay_dispatch.claim(NODE, instance, {})
        except TunnelClosed as exc:
            self.refused[instance] = exc.code
        else:
            link = self.links[instance] = Link()
            self.registry.enter(NODE, instance, OFFERS, link, epoch)

    async def claims(self, count: int) -> list[Message]:
        with trio.fail_after(10):
            while len(self.parent.claims) < count:
                await trio.sleep(0.01)
        return self.parent.claims

    @property
    def here(self) -> list[InstanceId]:
        return [relay.instance for relay in self.registry.relays()]


@asynccontextmanager
async def working() -> AsyncIterator[tuple[Worker, trio.Nursery]]:
    reactor, parent = Reactor(), Parent()
    ours, theirs = pair()
    parent.channel = Channel(reactor, ours, parent, 1)
    worker = Worker(reactor, theirs, parent)
    async with trio.open_nursery() as around:
        around.start_soon(reactor.run_in_task)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                yield worker, nursery
        around.cancel_scope.cancel()
    worker.line.close()
    parent.channel.close()
    reactor.close()


@pytest.mark.parametrize(("successor", "code"), [(SECOND, Code.FENCED), (FIRST, Code.LINK_LOST)])
async def test_a_name_that_is_given_on_before_it_is_taken_is_not_taken(successor: InstanceId, code: Code) -> None:
    async with working() as (worker, nursery):
        nursery.start_soon(worker.take, FIRST)
        (claim,) = await worker.claims(1)
        worker.parent.answer(claim, 5)
        worker.parent.fence(FIRST, 6, successor)  # another worker's claim: both are read at once
    assert worker.here == []
    assert worker.refused == {FIRST: code}


async def test_a_fence_that_was_meant_for_an_earlier_holding_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    async with working() as (worker, nursery):
        nursery.start_soon(worker.take, FIRST)
        (claim,) = await worker.claims(1)
        worker.parent.fence(FIRST, 6, SECOND)
        worker.parent.answer(claim, 7)
    assert worker.here == [FIRST]
    assert not worker.links[FIRST].closed


async def test_of_two_at_one_worker_the_later_claim_has_the_name() -> None:
    """Whichever of their tasks goes on first."""
    for _ in range(20):
        async with working() as (worker, nursery):
            nursery.start_soon(worker.take, FIRST)
            await worker.claims(1)
            nursery.start_soon(worker.take, SECOND)
            first, second = await worker.claims(2)
            worker.parent.answer(first, 5)
            worker.parent.answer(second, 6)
        assert worker.here == [SECOND]
        assert worker.refused == {FIRST: Code.FENCED} or worker.links[FIRST].closed == [Code.FENCED]


async def test_a_name_that_nobody_waits_for_any_more_is_given_back() -> None:
    """The parent may grant it all the same, later; it would count as a relay of this worker until the relay came again."""
    async with working() as (worker, nursery):
        with trio.CancelScope() as patience:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(worker.take, FIRST)
                (claim,) = await worker.claims(1)
                patience.cancel()
        worker.parent.answer(claim, 5)
        with trio.fail_after(10):
            while worker.parent.news != [{NODE: None}]:
                await trio.sleep(0.01)
        assert worker.here == []
        nursery.start_soon(worker.take, FIRST)
        worker.parent.answer((await worker.claims(2))[1], 6)
        with trio.fail_after(10):
            while worker.here != [FIRST]:
                await trio.sleep(0.01)
        assert worker.parent.news == [{NODE: None}]


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class SecureClient:
    """One whose TLS ends here. `given_away`: it was passed on."""

    sock: TlsSocket = field(default_factory=lambda: TlsSocket.__new__(TlsSocket))
    given_away: bool = False

    def give_away(self) -> socket.socket:
        self.given_away = True
        return self.sock


async def test_who_cannot_be_passed_on_for_lack_of_descriptors_stays_to_be_served_otherwise() -> None:
    async with working() as (worker, _):
        line, far = pair()
        assert worker.parent.channel is not None
        worker.parent.channel.send({"op": "peer", "worker": 2}, [far])
        with trio.fail_after(10):
            while 2 not in worker.peers.channels:
                await trio.sleep(0.01)
        client = SecureClient()
        with line, no_more_descriptors():
            assert not worker.peers.pass_on(2, cast(Client, client), b"")
        assert not client.given_away


async def test_after_a_worker_has_let_go_nobody_waits_for_it_in_vain() -> None:
    """Relays that others have accepted: those that wait, and those that come."""
    facts: Message = {"ip": "127.0.0.1", "address": "127.0.0.1:1", "counts_as_relay": False}
    async with working() as (worker, _):
        for has_let_go in (False, True):
            relay, far = socket.socketpair()
            with relay:
                worker.relay_dispatch.welcome(facts, [far])
                if not has_let_go:
                    worker.relay_dispatch.stop_accepting()
                relay.settimeout(30)
                assert relay.recv(1) == b""


async def test_a_relay_that_cannot_be_passed_on_for_want_of_descriptors_is_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hello(sock: socket.socket) -> ClientHello:
        await trio.lowlevel.checkpoint()
        return ClientHello("", (f"{ALPN_WORKER}2".encode(),))

    def fail(sock: socket.socket) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("fxgateway.workers.relay_dispatch.peek_client_hello", hello)
    async with working() as (worker, _):
        worker.peers.channels[2] = worker.line.channel
        worker.peers.heard_of.add(2)
        with socket.socket() as sock, monkeypatch.context() as patch:
            patch.setattr(socket.socket, "dup", fail)
            with pytest.raises(TooBusy):
                await worker.relay_dispatch.keeps(AcceptedConnection(sock, "192.0.2.1", "192.0.2.1:1"))
