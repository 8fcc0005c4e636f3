"""System: a relay that answers an opening too late. What a client sent with it reaches one service, unless it may reach two."""

import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.system.peers import Service, dial, read_to_end
from tests.system.stack import Stack, wait_until
from tests.system.test_system_web import http_service

pytestmark = pytest.mark.system

OPEN_S = 2.0
LIMITS = f"[limits]\nopen_timeout_s = {OPEN_S:g}\n"
ANSWERED_S = 20.0
"""For a client to be served, or turned away: the opening's time and that for a confirmation, on a busy machine."""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
POST = b"POST /pay HTTP/1.1\r\nHost: site\r\nContent-Length: 3\r\n\r\n100"
GET = b"GET /balance HTTP/1.1\r\nHost: site\r\nConnection: close\r\n\r\n"
AFTERWARDS = GET.replace(b"balance", b"afterwards")


class Till:
    """A service that remembers what it was asked, and answers as a web server would. It reads to the end of the line, or of the body."""

    def __init__(self, serve: Callable[..., Service]) -> None:
        self.asked: list[bytes] = []
        self._lock = threading.Lock()
        self.service = serve(self._serve)

    def times(self, request: bytes) -> int:
        """How often it was asked this."""
        with self._lock:
            return sum(request.split()[1] in asked for asked in self.asked)

    def _serve(self, sock: socket.socket) -> None:
        asked = b""
        while not re.search(rb"\r\n\r\n(100)?$|^PAY .*\r\n$", asked) and (block := sock.recv(4096)):
            asked += block
        with self._lock:
            self.asked.append(asked)
        sock.sendall(ANSWER)


@pytest.fixture
def till(serve: Callable[..., Service]) -> Iterator[Till]:
    return Till(serve)


def two_relays(stack: Stack, till: Till, protocol: str) -> None:
    """Both offer the service, with the same till behind it."""
    stack.start_gateway()
    extra = http_service("till", till.service.target) if protocol == "http" else ""
    services = {} if protocol == "http" else {"till": till.service.target}
    stack.start_relay("b", services, extra)
    stack.wait_for_relays("b")
    stack.start_relay("a", services, extra)
    stack.wait_for_relays("a", "b")


def ask(port: int, request: bytes) -> bytes:
    """What comes back; nothing if that is a RST."""
    with dial(port, ANSWERED_S) as client:
        client.sendall(request)
        try:
            return read_to_end(client)
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    ("protocol", "request_", "is_repeated"),
    [("tcp", b"PAY 100\r\n", False), ("http", POST, False), ("tcp", POST, False), ("http", GET, True), ("tcp", GET, True)],
    ids=["raw", "http-post", "raw-post", "http-get", "raw-get"],
)
def test_a_relay_that_stands_still(make_stack: Callable[..., Stack], till: Till, protocol: str, request_: bytes, is_repeated: bool) -> None:
    """It goes on later, with all that waits for it: the opening, what the client sent, and behind that the word that nobody wants it."""
    stack = make_stack("till", extra=LIMITS)
    two_relays(stack, till, protocol)
    with dial(stack.doors["till"]) as idle:
        idle.sendall(b"P")
        wait_until(lambda: busy(stack), what="the client that keeps one relay busy")
        (other,) = busy(stack)
        first = "b" if other == "a" else "a"
        stack.relays[first].signal(signal.SIGSTOP)
        answer = ask(stack.doors["till"], request_)
        served = till.times(request_)
        stack.relays[first].signal(signal.SIGCONT)
        stack.relays[other].kill()
        # In order: who comes now gets there behind all that waited.
        wait_until(lambda: ask(stack.doors["till"], AFTERWARDS) == ANSWER, what="the relay that stood still")
        assert till.times(request_) <= 1 + is_repeated
        assert (answer == ANSWER) == bool(served) == is_repeated, answer


def busy(stack: Stack) -> list[str]:
    """The relays that have streams."""
    return [name for name, relay in stack.live_relays().items() if any(link["streams"] for link in relay["links"])]
