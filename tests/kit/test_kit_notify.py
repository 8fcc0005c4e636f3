import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxtunnel.kit.notify import Notifier

PID = 4242


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """(NOTIFY_SOCKET, the socket behind it)."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@fx-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        sock.settimeout(30)
        yield name, sock


def test_says_what_systemd_expects(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": name})
    before_us = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.ready("listening on 0.0.0.0:8443")
    notifier.stopping()
    notifier.watchdog()
    notifier.status("3 relays\nSTOPPING=1\x1b é")
    notifier.status("x" * 5000)
    notifier.reloading()
    received = [sock.recv(4096).decode() for _ in range(7)]
    assert received[:5] == [
        "READY=1",
        "READY=1\nSTATUS=listening on 0.0.0.0:8443",
        "STOPPING=1",
        "WATCHDOG=1",
        "STATUS=3 relays STOPPING=1  é",
    ]
    assert len(received[5]) < 600
    first, second = received[6].split("\n")
    assert first == "RELOADING=1"
    assert before_us <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("address", ["", "@", "vsock:2:1234", "relative"])
def test_without_a_usable_socket_nothing_happens(address: str) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    notifier.ready("x")
    notifier.status("\ud800")
    assert notifier.watchdog_interval_s is None


def test_a_manager_that_is_gone_or_does_not_read_stops_nobody(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": name})
    for _ in range(2000):
        notifier.watchdog()
    sock.close()
    notifier.stopping()
    Notifier.from_environ({"NOTIFY_SOCKET": "/nowhere/notify"}).ready()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({"WATCHDOG_USEC": "5000000"}, 5.0),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": str(PID)}, 5.0),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval_s: float | None) -> None:
    assert Notifier.from_environ({"NOTIFY_SOCKET": "/run/n", **environ}, PID).watchdog_interval_s == interval_s


def test_the_process_is_this_one_unless_told() -> None:
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier.from_environ(environ).watchdog_interval_s == 1.0
