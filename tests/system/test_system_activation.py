"""System: sockets that outlive the gateway: started by the first connection, and restarted while clients keep coming (R12).

FX_RESTARTS=20 restarts it that often; `-s` shows the figures.
"""

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system.peers import Service, dial, read_exactly
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("systemd")]

RESTARTS = int(os.environ.get("FX_RESTARTS", "4"))
CONNECTS_PER_S = 50
BACK_S = 5.0
"""See `slowness`."""
# What systemd does for a unit with a .socket of its own, every time it starts it: the same sockets, the two variables.
_HAND_OVER = """
import os, sys
fds, command = [int(fd) for fd in sys.argv[1].split(",")], sys.argv[2:]
for number, fd in enumerate([os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]):
    os.dup2(fd, 3 + number, inheritable=True)
os.closerange(3 + len(fds), 200)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(command[0], command)
"""


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
def test_the_first_connection_starts_the_gateway(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    addresses = (f"127.0.0.1:{stack.doors['echo']}", f"127.0.0.1:{stack.tunnel_port}")
    listen = [word for address in addresses for word in ("-l", address)]
    gateway = stack.launch_gateway(prefix=("systemd-socket-activate", *listen))

    def is_listening() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", stack.tunnel_port), 1):
            return True
        return False

    wait_until(is_listening, what="a socket to connect to")
    gateway.wait_ready()
    stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
    # The line on standard error that is no log line is systemd-socket-activate's.
    text = stack.gateway.log.read_text()
    stack.gateway.log.write_text("".join(line for line in text.splitlines(keepends=True) if line.startswith("{")))
    assert stack.gateway.stop() == 0


class Visitors:
    """Short visits at a steady rate, and how each ended."""

    def __init__(self, port: int) -> None:
        self.ends: Counter[str] = Counter()
        self.longest_s = 0.0
        self._port = port
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(200)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            self._pool.submit(self._visit)
            due += 1 / CONNECTS_PER_S
            time.sleep(max(0.0, due - time.monotonic()))

    def _visit(self) -> None:
        began = time.monotonic()
        try:
            with dial(self._port, 60) as client:
                client.sendall(b"hello")
                read_exactly(client, 5)
            end = "served"
        except ConnectionRefusedError:
            end = "refused"
        except ConnectionResetError:
            end = "reset"
        except (OSError, EOFError) as exc:
            end = type(exc).__name__
        self.ends[end] += 1
        self.longest_s = max(self.longest_s, time.monotonic() - began)


def resets_by_the_door(stack: Stack) -> int:
    """Clients that were accepted, and reset because no relay was there yet."""
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in stack.page("/metrics").splitlines()
        if line.startswith("fxgateway_door_refused_total{")
    )


def test_no_client_is_turned_away_by_a_restart(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra="[limits]\ndrain_s = 60\n")  # a visit may take that long
    sockets = [socket.create_server(("127.0.0.1", port), backlog=4_096) for port in (stack.doors["echo"], stack.tunnel_port)]
    fds = tuple(sock.fileno() for sock in sockets)
    prefix = (sys.executable, "-c", _HAND_OVER, ",".join(map(str, fds)))
    back_s: list[float] = []
    by_the_door = 0
    try:
        stack.start_gateway(prefix=prefix, pass_fds=fds)
        stack.start_relay("node-a", {"echo": echo_service.target})
        visitors = Visitors(stack.doors["echo"])
        try:
            for _ in range(RESTARTS):
                time.sleep(0.5)
                by_the_door += resets_by_the_door(stack)
                assert stack.gateway.stop() == 0
                stack.start_gateway(prefix=prefix, pass_fds=fds)
                ready = time.monotonic()
                stack.wait_for_relays("node-a", timeout_s=60)
                back_s.append(time.monotonic() - ready)
            time.sleep(0.5)
        finally:
            visitors.stop()
        by_the_door += resets_by_the_door(stack)
    finally:
        for sock in sockets:
            sock.close()
    figures = (
        f"{RESTARTS} restarts: {dict(visitors.ends)}, {by_the_door} resets by a door without a relay, "
        f"longest visit {visitors.longest_s:.1f} s, relays back after {min(back_s):.1f} to {max(back_s):.1f} s"
    )
    sys.stdout.write(f"\n{figures}\n")
    assert set(visitors.ends) <= {"served", "reset"}, figures
    assert visitors.ends["reset"] == by_the_door, figures
    assert visitors.ends["served"] > RESTARTS * CONNECTS_PER_S / 4
    assert max(back_s) < BACK_S * slowness(), figures
