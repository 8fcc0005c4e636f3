"""System: planned work at a gateway of several processes: `fxgateway drain` reaches all of them, those that are started later too."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from workers_rig import MakeStack, start, streams, wait_until_shown, worker_of, workers

from tests.system.peers import Service, dial, is_refused, is_served, say, visit
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]

CLIENTS = 12
"""So many that each of two workers has some."""


def kill_and_wait(stack: Stack, number: int) -> None:
    """Until another process is that worker."""
    before = workers(stack)[number]
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        worker = workers(stack).get(number, before)
        return worker["restarts"] > before["restarts"] and worker["up"]

    wait_until(is_back, 60, f"worker {number} again")


@contextmanager
def visitors(port: int) -> Iterator[list[float]]:
    """One client after the other as fast as it goes; when those were that were let in, even if only for a moment."""
    let_in: list[float] = []
    stop = threading.Event()

    def visit_again() -> None:
        while not stop.is_set():
            with suppress(OSError):
                dial(port).close()
                let_in.append(time.monotonic())

    thread = threading.Thread(target=visit_again)
    thread.start()
    try:
        yield let_in
    finally:
        stop.set()
        thread.join()


def test_a_relay_that_is_drained_gets_nothing_new_from_any_worker(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    port = stack.doors["echo"]
    unknown = stack.gateway_cli("drain", "node-9", check=False)
    assert (unknown.returncode, "no relay node-9 is here" in unknown.stderr) == (1, True)
    clients = [dial(port) for _ in range(CLIENTS)]
    for client in clients:
        say(client)

    wait_until(lambda: sum(streams(stack).values()) == CLIENTS, what="all streams are shown")
    before = streams(stack)["node-0"]
    assert before > 0
    watched = stack.gateway_cli("drain", "node-0", "--timeout", "0.2", check=False)
    assert (watched.returncode, watched.stdout.splitlines()[0].split(",")[0]) == (1, f"streams of node-0 left: {before}")
    wait_until(lambda: stack.live_relays()["node-0"]["state"] == "draining", what="the drain is shown")
    # Who comes now, at whichever worker, goes to the other relay; who was there stays.
    clients += [dial(port) for _ in range(CLIENTS)]
    for client in clients:
        say(client)
    wait_until(lambda: sum(streams(stack).values()) == 2 * CLIENTS, what="all streams are shown")
    assert streams(stack) == {"node-0": before, "node-1": 2 * CLIENTS - before}
    for client in clients:
        client.close()
    stack.relays["node-1"].stop()
    # The request holds at a worker that is started later, where the relay has to go when the worker that has it dies.
    holder = worker_of(stack, "node-0")
    kill_and_wait(stack, next(number for number in workers(stack) if number != holder))
    kill_and_wait(stack, holder)
    wait_until(lambda: stack.live_relays().get("node-0", {}).get("state") == "draining", 60, "node-0 drained where it is now")
    assert worker_of(stack, "node-0") != holder
    assert visit(port, 30)[0] == "reset"
    stack.gateway_cli("drain", "node-0", "--undo")
    wait_until(lambda: is_served(port), 30, "service after --undo")


def test_a_gateway_that_is_drained_takes_nobody_at_any_worker(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    port = stack.doors["echo"]
    kept = [dial(port) for _ in range(CLIENTS)]
    for client in kept:
        say(client)
    wait_until_shown(stack, "connections", CLIENTS)
    command = [sys.executable, "-u", "-m", "fxgateway.cli", "drain", "--config", str(stack.gateway_config)]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    try:
        assert watching.stdout.readline().startswith(f"clients left: {CLIENTS},")
        with pytest.raises(ConnectionRefusedError):
            dial(port)
        assert "not ready: the gateway is draining" in stack.gateway_cli("relays").stdout
        # Neither a reload nor a worker that is started anew opens the doors again.
        stack.gateway.signal(signal.SIGHUP)
        wait_until(lambda: stack.logs().count('"reloaded ') == 3, 60, "the reload of both workers, then of the parent")
        for client in kept[1:]:
            say(client)
        with visitors(port) as let_in:
            kill_and_wait(stack, 1)
        assert let_in == []
        for client in kept:
            client.close()
        assert watching.communicate(timeout=60)[0].splitlines()[-1].startswith("clients left: 0,")
        assert watching.returncode == 0
    finally:
        watching.kill()
        watching.wait()
        watching.stdout.close()
    assert stack.gateway.stop() == 0


def test_a_reload_while_the_gateway_stops_opens_no_door(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=1)
    gateway = stack.gateway
    with dial(stack.doors["echo"]) as kept:
        say(kept)
        gateway.signal(signal.SIGTERM)
        wait_until(lambda: "stopping: 2 workers" in gateway.log.read_text(), 20, "the drain")
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: "reload" in gateway.log.read_text(), 20, "an answer to the reload")
        wait_until(lambda: is_refused(stack.doors["echo"]), what="the doors of every worker to close")
        say(kept)
    assert gateway.wait(60) == 0
    assert "the gateway is stopping" in gateway.log.read_text()
