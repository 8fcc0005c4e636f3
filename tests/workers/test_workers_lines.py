"""Lines between processes: messages and sockets in order and whole; bounded; and bridges that keep a reset a reset."""

import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from fxgateway.doors.door import Door, DoorConfig
from fxgateway.doors.web_client import TlsWebClient
from fxgateway.routing.admission import Admission, AdmissionLimits
from fxgateway.routing.preread_router import Destination
from fxgateway.routing.shared_admission import SharedAdmission
from fxgateway.settings import GatewaySettings
from fxgateway.workers import channel as module
from fxgateway.workers import drain_requests, parent
from fxgateway.workers.bridge import Bridge, PlainEnd, adopt, plain_pair
from fxgateway.workers.channel import Channel, Message, pair
from fxgateway.workers.peers import Peers
from fxgateway.workers.shares import as_message, from_message, share_of
from fxgateway.workers.worker_relays import AllRelays
from fxtunnel.engine.reactor import Reactor
from fxtunnel.engine.splice import abort
from fxtunnel.kit.console import ASK_TIMEOUT_S
from fxtunnel.kit.settings import Address
from fxtunnel.model import ServiceName
from fxtunnel.protocol.opening import Opening

SERVICE = ServiceName("s")


class Ear:
    def __init__(self) -> None:
        self.heard: list[tuple[Message, list[socket.socket]]] = []
        self.gone = 0

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        self.heard.append((message, sockets))

    def on_gone(self, channel: Channel) -> None:
        self.gone += 1


class ParentLine:
    def __init__(self) -> None:
        self.reactor = Reactor()
        one, two = pair()
        self.ears = (Ear(), Ear())
        self.ends = (Channel(self.reactor, one, self.ears[0], 1), Channel(self.reactor, two, self.ears[1], 2))

    def turn_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            self.reactor.run_once(0.01)

    def close(self) -> None:
        for end in self.ends:
            end.close()
        self.reactor.close()


@pytest.fixture
def line():
    line = ParentLine()
    yield line
    line.close()


def test_messages_arrive_whole_and_in_order_however_long(line: ParentLine) -> None:
    texts = ["x" * size for size in (0, 1, module.PACKET_BYTES, 3 * module.PACKET_BYTES + 7, 2_000_000, 5)]
    for text in texts:
        assert line.ends[0].send({"text": text})
    line.turn_until(lambda: len(line.ears[1].heard) == len(texts))
    assert [message["text"] for message, _ in line.ears[1].heard] == texts
    assert line.ends[0].is_clear


def test_sockets_come_with_their_message(line: ParentLine) -> None:
    given = [socket.socketpair() for _ in range(module.MAX_SOCKETS)]
    line.ends[0].send({"n": 0, "text": "y" * 100_000})
    assert line.ends[0].send({"n": 1}, [one for one, _ in given])
    line.turn_until(lambda: len(line.ears[1].heard) == 2)
    received = line.ears[1].heard[1][1]
    assert len(received) == len(given)
    assert all(one.fileno() == -1 for one, _ in given)  # ours are closed
    received[7].sendall(b"it is me")
    assert given[7][1].recv(100) == b"it is me"
    for sock in (*received, *(other for _, other in given)):
        sock.close()


def test_an_end_that_takes_nothing_costs_a_bounded_amount(line: ParentLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 1_000_000)
    line.reactor.unregister(line.ends[1]._sock)
    sent = 0
    while line.ends[0].send({"text": "z" * 50_000}):
        sent += 1
        assert sent < 100
    assert not line.ends[0].has_room or sent < 256
    one, other = socket.socketpair()
    assert not line.ends[0].send({"text": "z" * 50_000}, [one])
    assert one.fileno() >= 0  # still ours
    one.close()
    other.close()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
def test_what_the_kernel_has_no_room_for_now_is_sent_later(line: ParentLine, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    failures = [number] * 2

    sendmsg = socket.socket.sendmsg

    def short(sock: socket.socket, *arguments: Any) -> int:
        if failures:
            raise OSError(failures.pop(), "short")
        return sendmsg(sock, *arguments)

    monkeypatch.setattr(socket.socket, "sendmsg", short)
    one, other = socket.socketpair()
    assert line.ends[0].send({"n": 0})
    assert line.ends[0].send({"n": 1}, [one])
    line.turn_until(lambda: len(line.ears[1].heard) == 2)
    assert [message["n"] for message, _ in line.ears[1].heard] == [0, 1]
    assert line.ends[0].is_clear
    assert line.ears[0].gone == line.ears[1].gone == 0
    for sock in (*line.ears[1].heard[1][1], other):
        sock.close()


def test_the_end_of_a_process_is_heard_once(line: ParentLine) -> None:
    line.ends[0].close()
    line.turn_until(lambda: line.ears[1].gone == 1)
    assert not line.ends[1].is_open
    assert not line.ends[1].send({})
    line.ends[1].close()
    assert (line.ears[0].gone, line.ears[1].gone) == (0, 1)


def receive(end: PlainEnd, limit: int = 1 << 20) -> bytes:
    data = bytearray()
    with suppress(BlockingIOError):
        while True:
            buffer = bytearray(limit)
            count = end.recv_into(buffer)
            data += buffer[:count]
            if not count:
                break
    return bytes(data)


def test_a_bridge_end_gives_back_every_byte_and_an_end_that_was_said() -> None:
    one, other = plain_pair()
    with one, other:
        sent = one.send(b"a" * 100_000)
        assert sent == 100_000
        assert other.recv_into(bytearray(10)) == 10
        assert other.has_more
        assert receive(other) == b"a" * 99_990
        with pytest.raises(BlockingIOError):
            other.recv_into(bytearray(10))
        one.send(b"last")
        one.shutdown(socket.SHUT_WR)
        assert receive(other) == b"last"
        assert other.at_end
        assert other.recv_into(bytearray(10)) == 0
        assert other.send(b"the other way goes on") == 21
        assert receive(one) == b"the other way goes on"


@pytest.mark.parametrize("said", [b"", b"half of it"])
def test_a_bridge_that_just_ends_is_a_reset(said: bytes) -> None:
    one, other = plain_pair()
    with other:
        if said:
            one.send(said)
        one.close()
        if said:
            assert other.recv_into(bytearray(len(said))) == len(said)
        with pytest.raises(ConnectionResetError):
            other.recv_into(bytearray(10))


class Crossing:
    """`near` and `far` with a bridge between them. A plain end has the manners of a TLS socket, so both can be one."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.near, one = plain_pair()
        other, self.far = plain_pair()
        self.over: list[Bridge] = []
        self.bridge = Bridge(self.reactor, one, other, self.over.append)

    def turn(self, turns: int = 3) -> None:
        for _ in range(turns):
            self.reactor.run_once(0)

    def close(self) -> None:
        self.bridge.fail()
        self.near.close()
        self.far.close()
        self.reactor.close()


@pytest.fixture
def crossing():
    crossing = Crossing()
    yield crossing
    crossing.close()


def test_bytes_cross_a_bridge_both_ways_whatever_fits_into_its_buffers(crossing: Crossing) -> None:
    block = bytes(range(256)) * 20_000
    for source, sink in ((crossing.near, crossing.far), (crossing.far, crossing.near)):
        sent, received = 0, bytearray()
        while len(received) < len(block):
            with suppress(BlockingIOError):
                sent += source.send(block[sent : sent + 200_000])
            crossing.turn(1)
            received += receive(sink, 70_000)
        assert bytes(received) == block
    assert not crossing.over


def test_a_half_closed_bridge_carries_the_other_half(crossing: Crossing) -> None:
    crossing.near.send(b"question")
    crossing.near.shutdown(socket.SHUT_WR)
    crossing.turn()
    assert receive(crossing.far) == b"question"
    assert crossing.far.at_end
    crossing.far.send(b"answer")
    crossing.turn()
    assert receive(crossing.near) == b"answer"
    assert not crossing.near.at_end
    crossing.far.shutdown(socket.SHUT_WR)
    crossing.turn()
    assert receive(crossing.near) == b""
    assert crossing.near.at_end
    assert len(crossing.over) == 1


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_reset_crosses_a_bridge_as_a_reset(crossing: Crossing, has_ended: bool) -> None:
    if has_ended:
        crossing.near.shutdown(socket.SHUT_WR)
        crossing.turn()
    crossing.far.send(b"the first half")
    crossing.turn()
    crossing.far.close()
    crossing.turn()
    assert crossing.near.recv_into(bytearray(14)) == 14
    with pytest.raises(ConnectionResetError):
        crossing.near.recv_into(bytearray(10))
    assert len(crossing.over) == 1


class Secured(socket.socket):
    """A client's socket, as a `TlsSocket` is used."""

    has_more = read_awaits_write = write_awaits_read = at_end = False


def test_a_client_that_is_reset_while_nobody_reads_him_is_let_go() -> None:
    """His service has stopped reading, for hours maybe: nobody would try his socket before it goes on."""
    reactor, over = Reactor(), list[Bridge]()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted = server.accept()[0]
    secured = Secured(accepted.family, accepted.type, accepted.proto, accepted.detach())
    ours, far = plain_pair()
    for sock in (client, secured):
        sock.setblocking(False)
    bridge = Bridge(reactor, secured, ours, over.append)
    with far:
        for _ in range(200):
            with suppress(BlockingIOError):
                client.send(b"x" * 65_536)
            reactor.run_once(0)
        assert bridge._halves[1].blocked
        abort(client)
        for _ in range(3):
            reactor.run_once(0.1)
        assert over == [bridge]
    reactor.close()


@pytest.mark.parametrize("unread", [b"", b"and what it said then"])
def test_a_client_whose_tls_ended_elsewhere_may_be_passed_on_again(line: ParentLine, unread: bytes) -> None:
    """The first worker that it came to has no relay for it, either: its line goes on, or another bridge carries what has left it."""
    config, relays = DoorConfig("d", Address.parse("127.0.0.1:1"), SERVICE), AllRelays(None, None, None)
    door = Door(line.reactor, config, relays, Admission(AdmissionLimits()))
    near, end = plain_pair()
    client = TlsWebClient(door, end, "192.0.2.1", Destination(SERVICE), Opening(SERVICE))
    door.admission.admit(door.listen_address, client.address, 0.0)
    door.clients.add(client)
    near.send(b"early" + unread)
    assert end.recv_into(bytearray(5)) == 5
    admission = SharedAdmission(AdmissionLimits(), 100)
    peers = Peers(line.reactor, admission)
    peers.channels[2] = line.ends[0]
    assert peers.pass_on(2, client, b"early")
    assert not door.clients
    assert admission.files_here == (2 if unread else 0)
    line.turn_until(lambda: len(line.ears[1].heard) == 1)
    message, (received,) = line.ears[1].heard[0]
    assert message["is_bridged"]
    with near, adopt(received) as far:
        said = bytearray()

        def hears(words: bytes, at: PlainEnd) -> bool:
            said.extend(receive(at))
            return bytes(said) == words

        near.send(b", and more")
        near.shutdown(socket.SHUT_WR)
        line.turn_until(lambda: hears(unread + b", and more", far))
        line.turn_until(lambda: not receive(far) and far.at_end)
        said.clear()
        far.send(b"the answer")
        far.shutdown(socket.SHUT_WR)
        line.turn_until(lambda: hears(b"the answer", near) and near.at_end)
    assert not peers.bridges
    assert not admission.files_here


def test_a_configuration_arrives_as_it_was_sent(tmp_path) -> None:
    written = {
        "tunnel": {"listen": "127.0.0.1:7000", "public_url": "wss://gw.example:7000", "workers": 4},
        "door": [{"listen": "[::1]:22", "service": "ssh", "proxy_from": ["10.0.0.0/8"]}, {"listen": "unix:web.sock", "kind": "http"}],
        "route": [{"host": "a.example", "service": "web"}],
        "limits": {"memory_bytes": "64MiB", "exempt_sources": ["192.0.2.0/24"]},
    }
    settings = GatewaySettings.model_validate(written, context={"directory": tmp_path})
    there = from_message(as_message(settings), tmp_path)
    assert there == settings
    assert there.tunnel.key == tmp_path / "server.key"
    share = share_of(there, 4).limits
    assert (share.memory_bytes, share.pending_handshakes, share.connections) == (16 << 20, 128, settings.limits.connections)


def test_a_command_waits_longer_than_the_parent_does_for_its_workers() -> None:
    """Otherwise it would say that the gateway does not answer, and not which worker."""
    assert drain_requests.ANSWER_S < ASK_TIMEOUT_S
    assert parent.STATUS_S < ASK_TIMEOUT_S
