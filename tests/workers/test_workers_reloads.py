"""System: a reload of a gateway of several processes: all of them have the new configuration, or none."""

import os
import signal
import socket

import pytest
from workers_rig import MakeStack, say, start, worker_of, workers

from tests.ports import free_port
from tests.system.peers import Service, dial, is_refused, is_served, read_exactly
from tests.system.stack import wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]


def test_a_reload_is_for_all_or_for_none(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    gateway, second = stack.gateway, free_port()
    assert gateway is not None
    good = stack.gateway_config.read_text()
    with dial(stack.doors["echo"]) as client:
        more = f'[[door]]\nlisten = "127.0.0.1:{second}"\nservice = "echo"\n'
        stack.gateway_config.write_text(good + more)
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: is_served(second), 60, "the new door")
        for _ in range(20):
            say(second)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            worse = f'[[door]]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\nservice = "echo"\n'
            stack.gateway_config.write_text(good + worse)  # would close one door, and cannot open the other
            gateway.signal(signal.SIGHUP)
            wait_until(lambda: "reload refused" in gateway.log.read_text(), 60, "a refusal")
        for _ in range(10):
            say(second)
        stack.gateway_config.write_text(good)
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: not is_served(second), 60, "the door to close")
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    # A worker that is started now begins with what holds now.
    pid = workers(stack)[1]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: workers(stack).get(1, {}).get("up") and workers(stack)[1]["pid"] != pid, 60, "a fresh worker")
    stack.wait_for_relays("node-0", "node-1")
    for _ in range(10):
        say(stack.doors["echo"])
    wait_until(lambda: is_refused(second), what="the door to be closed in the fresh worker as well")


def test_a_refused_reload_leaves_the_access_log_where_it_was(make_stack: MakeStack, echo_service: Service) -> None:
    """One worker has prepared for it, and begun a new file; the other ends before it has."""
    stack = make_stack("echo")
    before, after = stack.directory / "before.log", stack.directory / "after.log"
    stack.gateway_extra = f'[log]\naccess = "{before}"\n'
    stack.write_gateway_config()
    gateway = stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": "2"})
    stack.start_relay("node-0", {"echo": echo_service.target})
    stack.wait_for_relays("node-0")
    victim = workers(stack)[1 if worker_of(stack, "node-0") == 2 else 2]["pid"]
    os.kill(victim, signal.SIGSTOP)
    stack.gateway_config.write_text(stack.gateway_config.read_text().replace("before.log", "after.log"))
    gateway.signal(signal.SIGHUP)
    wait_until(after.exists, what="the new file")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "reload refused" in gateway.log.read_text(), what="a refusal")

    def is_written_to() -> bool:
        say(stack.doors["echo"])
        return before.stat().st_size > 0

    wait_until(is_written_to, what="a line where it was")
