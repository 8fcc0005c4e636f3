"""System: workers that have few descriptors."""

import socket
from contextlib import ExitStack, suppress

import psutil
import pytest
from workers_rig import MakeStack, workers

from tests.system.peers import Service, dial, is_served, read_exactly
from tests.system.servers import need
from tests.system.stack import wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]


def test_clients_never_take_the_last_descriptors_of_the_worker_with_the_relay(make_stack: MakeStack, echo_service: Service) -> None:
    """Whichever worker they come to, it is that one where they end up."""

    def hears(client: socket.socket, word: bytes) -> None:
        client.sendall(word)
        assert read_exactly(client, len(word)) == word

    need("prlimit")
    stack = make_stack("echo")
    stack.gateway_config.write_text(stack.gateway_config.read_text().replace("[tunnel]\n", "[tunnel]\nworkers = 2\n", 1))
    stack.start_gateway(prefix=("prlimit", "--nofile=120"))
    stack.start_relay("node-a", {"echo": echo_service.target})
    pids = [worker["pid"] for worker in workers(stack).values()]
    with dial(stack.doors["echo"]) as client, ExitStack() as crowd:
        hears(client, b"first")
        served = 0
        for _ in range(200):
            with suppress(OSError, EOFError):
                other = crowd.enter_context(dial(stack.doors["echo"]))
                hears(other, b"another")
                served += 1
        assert 40 <= served < 200
        assert max(psutil.Process(pid).num_fds() for pid in pids) <= 110
        stack.cutter.cut()
        hears(client, b"and after a cut")
        crowd.close()
        wait_until(lambda: is_served(stack.doors["echo"]), 20, "normal again")
    assert "may open no more files" not in stack.logs()
