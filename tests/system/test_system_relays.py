"""System: several relays for a service, and one name that two relays claim."""

import base64
import contextlib
import json
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.ports import free_port
from tests.system.peers import Service, dial, read_exactly, say
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("relays")]


def streams(stack: Stack) -> dict[str, int]:
    return {name: sum(link["streams"] for link in relay["links"]) for name, relay in stack.live_relays().items()}


def test_clients_go_where_the_fewest_streams_are(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    with ExitStack() as clients:
        stack.start_relay("node-a", {"echo": echo_service.target})
        for _ in range(4):
            say(clients.enter_context(dial(stack.doors["echo"])), b"a")
        stack.start_relay("node-b", {"echo": echo_service.target})
        stack.wait_for_relays("node-b")
        for _ in range(4):
            say(clients.enter_context(dial(stack.doors["echo"])), b"b")
        assert streams(stack) == {"node-a": 4, "node-b": 4}
        for _ in range(6):
            say(clients.enter_context(dial(stack.doors["echo"])), b"c")
        assert streams(stack) == {"node-a": 7, "node-b": 7}


def test_a_relay_whose_service_refuses_is_passed_over(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": f"127.0.0.1:{free_port()}"})
    stack.start_relay("node-b", {"echo": echo_service.target})
    stack.wait_for_relays("node-a", "node-b")
    for number in range(8):
        with dial(stack.doors["echo"]) as client:
            say(client, b"client %d" % number)


def test_a_relay_that_dies_before_a_byte_is_replaced(make_stack: Callable[..., Stack], serve: Callable[..., Service]) -> None:
    def greet_late(sock: socket.socket) -> None:
        say_it = sock.recv(1)  # nothing comes before the client has seen which relay is left
        sock.sendall(say_it + b" from " + sock.getsockname()[0].encode())
        sock.shutdown(socket.SHUT_WR)

    service = serve(greet_late)
    extra = "[resume]\nhold_s = 2\n"
    stack = make_stack("late", extra=extra)
    stack.start_gateway()
    stack.start_relay("node-a", {"late": service.target}, extra)
    with ExitStack() as clients:
        untouched = [clients.enter_context(dial(stack.doors["late"])) for _ in range(5)]
        wait_until(lambda: service.accepted == 5, 60, "five streams by node-a")
        stack.start_relay("node-b", {"late": service.target}, extra)
        stack.wait_for_relays("node-b")
        stack.relays["node-a"].kill()
        with dial(stack.doors["late"], 60) as newcomer:  # goes past the one that is held
            newcomer.sendall(b"n")
            assert read_exactly(newcomer, 16) == b"n from 127.0.0.1"
        wait_until(lambda: service.accepted == 11, 60, "five streams again, by node-b")
        for client in untouched:
            client.sendall(b"u")
            assert read_exactly(client, 16) == b"u from 127.0.0.1"


def test_a_zombie_is_fenced_off(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    zombie = stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as old:
        say(old, b"old")
        zombie.signal(signal.SIGSTOP)
        shutil.copytree(stack.directory / "node-a", stack.directory / "twin", ignore=shutil.ignore_patterns("*.sock"))
        stack.start_relay("twin")
        assert stack.live_relays()["node-a"]["epoch"] == 2
        with pytest.raises(ConnectionResetError):
            old.recv(1)
        with dial(stack.doors["echo"]) as fresh:
            say(fresh, b"fresh")
            zombie.signal(signal.SIGCONT)
            assert zombie.wait() == 1
            say(fresh, b"still here")
    lines = [json.loads(line) for line in zombie.log.read_text().splitlines()]
    assert [line["event"] for line in lines if line["level"] == "error"] == [
        f"another fxrelay runs with the id node-a and has taken over at gateway {stack.status()['gateway']['gateway_id']}: stop one of the "
        "two, or give it another id in relay.toml and a key of its own"
    ]
    assert stack.relays["twin"].process.poll() is None


def test_one_relay_serves_two_gateways_and_outlives_one(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    first, second = make_stack("echo"), make_stack("echo")
    for stack in (first, second):
        stack.start_gateway()
    first.write_relay_config("node-a", {"echo": echo_service.target}, '[[gateway]]\nfile = "second.json"\n')
    shutil.copy(second.directory / "gateway.json", first.directory / "node-a" / "second.json")
    relay = first.start_relay("node-a")
    for stack in (first, second):
        stack.wait_for_relays("node-a")
    with dial(first.doors["echo"]) as kept, dial(second.doors["echo"]) as lost:
        say(kept, b"by the first")
        say(lost, b"by the second")
        second.gateway_cli("revoke", "node-a")
        with pytest.raises(ConnectionResetError):
            lost.recv(1)
        say(kept, b"the other goes on")
    assert relay.process.poll() is None
    assert relay.stop() == 0


def test_the_way_through_a_proxy(make_stack: Callable[..., Stack], serve: Callable[..., Service], echo_service: Service) -> None:
    asked: list[bytes] = []

    def proxy(inner: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += read_exactly(inner, 1)
        asked.append(head)
        with dial(int(head.split()[1].rpartition(b":")[2])) as outer:
            outer.settimeout(None)
            inner.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pour, args=(outer, inner))
            back.start()
            pour(inner, outer)
            back.join()

    stack = make_stack("echo")
    stack.start_gateway()
    config = stack.write_relay_config("node-a", {"echo": echo_service.target})
    address = serve(proxy).target
    config.write_text(config.read_text().replace('"gateway.json"', f'"gateway.json"\nproxy = "http://user:pa%20ss@{address}"'))
    stack.start_relay("node-a")
    with dial(stack.doors["echo"]) as client:
        say(client, b"a long way round")
    assert len(asked) >= 3  # enrolment, control link, data link
    for head in asked:
        assert head.startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % stack.cutter.port)
        assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:pa ss") in head
    assert "pa%20ss" not in stack.logs()


def pour(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(1 << 16):
            sink.sendall(block)
        sink.shutdown(socket.SHUT_WR)
