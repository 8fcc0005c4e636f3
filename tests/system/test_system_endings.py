"""System: how connections end: TCP's own endings, through two daemons and a tunnel."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.ports import free_port
from tests.system.peers import MIB, Service, dial, how_it_ends, payload, read_exactly, read_to_end, reset, visit
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("endings")]

AT_ONCE_S = 8.0
"""On a busy machine, too. What is kept instead is kept for longer: streams until hold_s is over, openings as long as a relay may think."""


class Held:
    """A service that only keeps its connections, for the test to do with as it likes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(60)
        self.target = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(60)
        return sock


@pytest.fixture(scope="module")
def held() -> Iterator[Held]:
    service = Held()
    yield service
    service.listener.close()


@pytest.fixture(scope="module")
def stack(make_shared_stack: Callable[..., Stack], held: Held, echo_service: Service) -> Stack:
    stack = make_shared_stack("held", "echo", "refused", "unknown")
    stack.start_gateway()
    stack.start_relay("node-a", {"held": held.target, "echo": echo_service.target, "refused": f"127.0.0.1:{free_port()}"})
    return stack


def pair(stack: Stack, held: Held) -> tuple[socket.socket, socket.socket]:
    """A client and the service's end of its connection, known to be joined."""
    client = dial(stack.doors["held"])
    client.sendall(b"!")
    service = held.accept()
    assert service.recv(1) == b"!"
    return client, service


def send_in_background(sock: socket.socket, data: memoryview) -> threading.Thread:
    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_half_close_leaves_the_other_direction_whole(stack: Stack, held: Held) -> None:
    for turn in range(2):
        ends = pair(stack, held)
        first, second = ends if turn == 0 else ends[::-1]
        with first, second:
            first.shutdown(socket.SHUT_WR)
            assert second.recv(1) == b""
            time.sleep(0.2)  # long enough for a wrong RST to arrive
            sender = send_in_background(second, payload(turn, 8 * MIB))
            assert read_to_end(first) == payload(turn, 8 * MIB)
            sender.join()


def test_bytes_before_a_fin_arrive_before_it(stack: Stack, held: Held) -> None:
    client, service = pair(stack, held)
    with client, service:
        up, down = send_in_background(client, payload(3, 8 * MIB)), send_in_background(service, payload(4, 8 * MIB))
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(read_to_end(service)))
        reader.start()
        assert read_to_end(client) == payload(4, 8 * MIB)
        for thread in (up, down, reader):
            thread.join()
        assert received[0] == payload(3, 8 * MIB)


def test_a_reset_arrives_as_a_reset_at_the_other_end(stack: Stack, held: Held) -> None:
    for turn in range(2):
        ends = pair(stack, held)
        first, second = ends if turn == 0 else ends[::-1]
        with second:
            reset(first)
            assert how_it_ends(second, AT_ONCE_S)[0] == "reset", turn


def test_a_reset_in_mid_transfer_is_never_a_clean_end(stack: Stack, held: Held) -> None:
    for turn in range(2):
        ends = pair(stack, held)
        first, second = ends if turn == 0 else ends[::-1]
        with second:
            first.sendall(payload(5, MIB))
            read_exactly(second, 100_000)
            reset(first)
            assert how_it_ends(second, AT_ONCE_S)[0] == "reset", turn


def test_a_reset_after_a_half_close_is_still_a_reset(stack: Stack, held: Held) -> None:
    for turn in range(2):
        ends = pair(stack, held)
        first, second = ends if turn == 0 else ends[::-1]
        with second:
            second.shutdown(socket.SHUT_WR)
            assert first.recv(1) == b""
            reset(first)
            assert how_it_ends(second, AT_ONCE_S)[0] == "reset", turn


@pytest.mark.parametrize("service", ["refused", "unknown"])
def test_a_service_that_is_not_there_is_a_reset_at_once(stack: Stack, service: str) -> None:
    assert visit(stack.doors[service], AT_ONCE_S)[0] == "reset"


def test_without_a_relay_the_door_resets_at_once(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("held")
    stack.start_gateway()
    assert visit(stack.doors["held"], AT_ONCE_S)[0] == "reset"


def test_many_short_connections_leave_nothing_behind(stack: Stack) -> None:
    def files() -> int:
        return sum(psutil.Process(daemon.pid).num_fds() for daemon in (stack.gateway, stack.relays["node-a"]))

    def talk(number: int) -> None:
        with dial(stack.doors["echo"]) as client:
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
            if number % 2:
                reset(client)

    talk(0)
    before = files()
    for number in range(300):
        talk(number)
    wait_until(lambda: files() <= before, 20, "all descriptors given back")
