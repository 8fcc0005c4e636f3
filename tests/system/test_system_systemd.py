"""System: what systemd sees of the daemons: notifications, and sockets that it hands over."""

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.peers import Service, dial, read_exactly
from tests.system.stack import Daemon, Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("systemd")]

WATCHDOG_S = 0.4
# What systemd does for a .socket unit: listens, sets the two variables, runs the daemon.
_ACTIVATE = """
import os, socket, sys
ports, command = sys.argv[1].split(","), sys.argv[2:]
socks = [socket.create_server(("127.0.0.1", int(port))) for port in ports]
high = [os.dup(sock.fileno()) for sock in socks]
for sock in socks:
    sock.close()
copies = [os.fdopen(os.dup2(fd, 50 + number, inheritable=True), "r", closefd=False) for number, fd in enumerate(high)]
for number in range(len(ports)):
    os.dup2(50 + number, 3 + number, inheritable=True)
os.closerange(3 + len(ports), 100)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(ports)))
os.execv(command[0], command)
"""


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.setblocking(False)
        self._heard: list[str] = []
        self.env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}

    def close(self) -> None:
        self._sock.close()

    def heard(self) -> list[str]:
        """The fields so far, in order."""
        while True:
            try:
                self._heard += self._sock.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self._heard


@pytest.fixture
def manager(home: Path) -> Iterator[Manager]:
    manager = Manager(home / "notify")
    yield manager
    manager.close()


def check(manager: Manager, daemon: Daemon) -> None:
    wait_until(lambda: "READY=1" in manager.heard(), 20, "READY")
    wait_until(lambda: manager.heard().count("WATCHDOG=1") >= 4, 20, "watchdog messages")
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: manager.heard().count("READY=1") == 2, 20, "READY after the reload")
    heard = manager.heard()
    reloading = heard.index("RELOADING=1")
    assert any(field.startswith("MONOTONIC_USEC=") for field in heard[reloading:])
    assert "STOPPING=1" not in heard
    assert daemon.stop() == 0
    assert "STOPPING=1" in manager.heard()


def test_the_gateway_notifies(make_stack: Callable[..., Stack], manager: Manager) -> None:
    stack = make_stack("echo")
    check(manager, stack.start_gateway(env=manager.env))


def test_the_relay_notifies(make_stack: Callable[..., Stack], manager: Manager, echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    check(manager, stack.start_relay("node-a", {"echo": echo_service.target}, env=manager.env))


def test_sockets_that_were_handed_over_are_used(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    # Nobody else can bind these now, so a gateway that tried to would end.
    stack.start_gateway(prefix=(sys.executable, "-c", _ACTIVATE, f"{stack.doors['echo']},{stack.tunnel_port}"))
    stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
    assert stack.gateway.stop() == 0
