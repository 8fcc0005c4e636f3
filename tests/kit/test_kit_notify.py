import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxtunnel.kit import notify
from fxtunnel.kit.notify import LoopNotifier, Notifier

PID = 4242
KEPT = 100
MANY = 2_000


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


def test_what_is_kept_waits_until_it_is_heard(manager: tuple[str, socket.socket], tmp_path: Path) -> None:
    """A manager that has much to do reads later: the kernel keeps ten messages for it (net.unix.max_dgram_qlen)."""
    name, sock = manager
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": name})
    heard: list[str] = []

    def hear() -> None:
        while len(heard) < KEPT + 1:
            time.sleep(0.001)
            data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(4))
            heard.append(data.decode())
            for _, _, raw in ancillary:
                os.close(memoryview(raw).cast("i")[0])

    manager_reads = threading.Thread(target=hear)
    with socket.socket() as kept:
        manager_reads.start()
        for number in range(KEPT):
            notifier.keep(f"s{number}", kept)
        notifier.ready()
        manager_reads.join()
    assert heard == [*(f"FDSTORE=1\nFDNAME=s{number}" for number in range(KEPT)), "READY=1"]


def test_a_launcher_that_has_much_to_do_hears_of_all_that_is_kept() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    notifier, names = Notifier(launcher=theirs), []

    def hear() -> None:
        time.sleep(0.1)
        while data := ours.recvmsg(4096)[0]:
            names.append(data)

    launcher_reads = threading.Thread(target=hear)
    with ours, socket.socket() as kept:
        launcher_reads.start()
        for number in range(MANY):
            notifier.keep(f"s{number}", kept)
        notifier.prepared()
        notifier.close()
        launcher_reads.join()
    assert len(names) == MANY + 1


def test_a_manager_that_hears_nothing_is_waited_for_once(manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    name, sock = manager
    pauses: list[float] = []
    monkeypatch.setattr(notify, "HEARD_S", 0.05)
    monkeypatch.setattr(notify.time, "sleep", pauses.append)
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": name})
    while not pauses:
        notifier.stopping()
    paused = len(pauses)
    for _ in range(100):
        notifier.stopping()
    assert len(pauses) == paused
    sock.setblocking(False)
    while True:
        try:
            sock.recv(4096)
        except BlockingIOError:
            break
    notifier.ready()
    assert sock.recv(4096) == b"READY=1"


def fill(name: str) -> int:
    """Fill the manager's queue; returns how many messages it took."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:  # a socket each, as a sender's own buffer is full sooner
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(b"FILL", f"\0{name[1:]}" if name.startswith("@") else name)
            count += 1
    return count


def test_a_loop_never_waits_for_a_manager_that_hears_late(manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets everything, in order, when it hears again; sockets too that were closed here meanwhile."""
    name, sock = manager
    sleepers: set[int] = set()
    sleep = time.sleep

    def noted(pause_s: float) -> None:
        sleepers.add(threading.get_ident())
        sleep(pause_s)

    monkeypatch.setattr(notify.time, "sleep", noted)
    filled = fill(name)
    notifier = LoopNotifier.from_environ({"NOTIFY_SOCKET": name})
    for number in range(KEPT):
        with socket.socket() as kept:
            kept.bind(("127.0.0.1", 0))
            notifier.keep(f"s{kept.getsockname()[1]}", kept)
        if number % 10 == 0:
            notifier.reloading()
            notifier.ready()
    notifier.drop("s1")
    notifier.stopping()
    while not sleepers:
        sleep(0.001)
    assert threading.get_ident() not in sleepers
    heard: list[str] = []
    assert [sock.recv(4096) for _ in range(filled)] == [b"FILL"] * filled
    while not heard or heard[-1] != "STOPPING=1":
        data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(4))
        heard.append(data.decode().partition("\nMONOTONIC")[0])
        for _, _, raw in ancillary:
            with socket.socket(fileno=memoryview(raw).cast("i")[0]) as kept:
                assert heard[-1] == f"FDSTORE=1\nFDNAME=s{kept.getsockname()[1]}"
    assert [words for words in heard if not words.startswith("FDSTORE=")] == [
        *(["RELOADING=1", "READY=1"] * (KEPT // 10)),
        "FDSTOREREMOVE=1\nFDNAME=s1",
        "STOPPING=1",
    ]
    assert len(heard) == KEPT + KEPT // 5 + 2
    notifier.ready()
    notifier.close()
    assert sock.recv(4096) == b"READY=1"


def test_a_process_that_ends_waits_for_its_last_words_but_not_for_ever(
    manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sock = manager
    filled = fill(name)
    notifier = LoopNotifier.from_environ({"NOTIFY_SOCKET": name})
    for _ in range(KEPT):
        notifier.ready()
    notifier.stopping()
    manager_reads = threading.Thread(target=lambda: [sock.recv(4096) for _ in range(filled + KEPT)])
    manager_reads.start()
    notifier.close()
    manager_reads.join()
    assert sock.recv(4096) == b"STOPPING=1"
    monkeypatch.setattr(notify, "HEARD_S", 0.05)
    fill(name)
    deaf = LoopNotifier.from_environ({"NOTIFY_SOCKET": name})
    for _ in range(KEPT):
        deaf.ready()
    deaf.close()
    sock.close()
    LoopNotifier.from_environ({"NOTIFY_SOCKET": name}).stopping()


@pytest.mark.parametrize("lacking", ["thread", "descriptor"])
def test_without_a_thread_or_a_descriptor_it_is_waited_for(
    manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    name, sock = manager

    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread") if lacking == "thread" else OSError(24, "Too many open files")

    fill(name)
    notifier = LoopNotifier.from_environ({"NOTIFY_SOCKET": name})
    if lacking == "thread":
        monkeypatch.setattr(threading.Thread, "start", fails)
    else:
        monkeypatch.setattr(notify.os, "dup", fails)
    monkeypatch.setattr(notify.time, "sleep", lambda _: sock.recv(4096))
    with socket.socket() as kept:
        for number in range(KEPT):
            notifier.keep(f"s{number}", kept)
    monkeypatch.undo()
    last = b""
    sock.setblocking(False)
    while True:
        try:
            last = sock.recv(4096)
        except BlockingIOError:
            break
    assert last == b"FDSTORE=1\nFDNAME=s%d" % (KEPT - 1)
    notifier.close()


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
