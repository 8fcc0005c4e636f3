"""System: a daemon is stopped, or makes way, when the last bytes of streams that have ended are still on their way."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.cutter import Cutter
from tests.ports import free_port
from tests.system.peers import Service, dial, payload, read_to_end
from tests.system.stack import Daemon, Stack, wait_until

pytestmark = pytest.mark.system

SIZE_BYTES = 24_000
CLIENTS = 10
HASTE_S = 2.5
"""A daemon that does not wait for last bytes is gone by then."""
PATIENCE = "[limits]\ndrain_s = 120\n"


@pytest.fixture
def tunnel(tmp_path: Path) -> Iterator[tuple[Stack, int]]:
    """A stack with the door of its service, whose tunnel can be frozen and cut."""
    door = free_port()
    stack = Stack(tmp_path, {"s": door}, gateway_extra=PATIENCE, cutter=Cutter())
    try:
        yield stack, door
    finally:
        stack.stop()


def stopped_meanwhile(stack: Stack, daemon: Daemon, number: int) -> None:
    """`number` to a daemon whose tunnel is silent; then the tunnel is cut, with all that was on its way, and may be dialled again."""
    daemon.signal(number)
    wait_until(lambda: "have 120 s to finish" in daemon.log.read_text(), 60, "the word that it stops")
    time.sleep(HASTE_S)
    stack.cutter.cut()
    stack.cutter.thaw()


def are_over(stack: Stack) -> bool:
    """Whether the gateway has no stream left."""
    return not any(link["streams"] for relay in stack.live_relays().values() for link in relay["links"])


@pytest.mark.parametrize("way", ["stop", "successor"])
def test_answers_that_are_on_their_way_arrive_when_the_relay_goes(tunnel: tuple[Stack, int], tmp_path: Path, way: str) -> None:
    stack, door = tunnel
    answer, go_on, asked, answered = payload(7, SIZE_BYTES), threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def serve(sock: socket.socket) -> None:
        assert read_to_end(sock) == b"ask"
        asked.release()
        assert go_on.wait(60)
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
        answered.release()

    with contextlib.closing(Service(serve)) as service, contextlib.ExitStack() as clients:
        stack.start_gateway()
        stack.write_relay_config("r", {"s": service.target}, PATIENCE)
        verb = "run" if way == "stop" else "launch"
        relay = Daemon(["fxrelay.cli", verb, "--config", str(stack.relay_config("r"))], tmp_path / "r.log")
        stack.daemons.append(relay)
        stack.wait_for_relays("r")
        askers = [clients.enter_context(dial(door, 90)) for _ in range(CLIENTS)]
        for asker in askers:
            asker.sendall(b"ask")
            asker.shutdown(socket.SHUT_WR)
        for _ in askers:
            assert asked.acquire(timeout=60)
        stack.cutter.freeze_one(1)  # the data link; the control link is older
        go_on.set()
        for _ in askers:
            assert answered.acquire(timeout=60)
        stopped_meanwhile(stack, relay, signal.SIGTERM if way == "stop" else signal.SIGUSR2)
        assert [read_to_end(asker) == answer for asker in askers] == [True] * CLIENTS
        if way == "stop":
            assert relay.wait(60) == 0


def test_uploads_that_are_on_their_way_arrive_when_the_gateway_goes(tunnel: tuple[Stack, int]) -> None:
    """Nobody else would notice: the clients have ended in order, and so has the service what it had to say."""
    stack, door = tunnel
    upload, arrived, lock = payload(8, SIZE_BYTES), [], threading.Lock()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"go")
        sock.shutdown(socket.SHUT_WR)
        got = False
        try:
            got = read_to_end(sock) == upload
        finally:
            with lock:
                arrived.append(got)

    with contextlib.closing(Service(serve)) as service, contextlib.ExitStack() as clients:
        stack.start_gateway()
        stack.start_relay("r", {"s": service.target}, PATIENCE)
        stack.wait_for_relays("r")
        senders = [clients.enter_context(dial(door, 90)) for _ in range(CLIENTS)]
        for sender in senders:
            assert read_to_end(sender) == b"go"
        stack.cutter.freeze_one(1)
        for sender in senders:
            sender.sendall(upload)
            sender.shutdown(socket.SHUT_WR)
        assert stack.gateway is not None
        wait_until(lambda: are_over(stack), 30, "the end of every stream at the gateway")
        stopped_meanwhile(stack, stack.gateway, signal.SIGTERM)
        wait_until(lambda: len(arrived) == CLIENTS, 60, "the end of every upload at the service")
        assert arrived == [True] * CLIENTS
        assert stack.gateway.wait(60) == 0
