"""System: what a gateway of several processes does at the moment it is restarted: with clients that have no relay yet, sockets, workers."""

import json
import signal
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from test_workers_restarts import SetWorkers, launch, set_workers
from test_workers_system import site
from workers_rig import MakeStack, taken, until_gone, worker_of, workers

from tests.ports import free_port
from tests.system.peers import MIB, Service, dial, is_served, payload, read_exactly, say
from tests.system.stack import Stack, wait_until
from tests.system.test_system_activation import Visitors
from tests.system.test_system_upgrades import GATEWAY_LIMITS, RELAY_LIMITS, Flow
from tests.system.units import Unit

__all__ = ["set_workers"]

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]

CLIENTS = 6
HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 2000\r\n"


@pytest.fixture
def stack(make_stack: MakeStack, echo_service: Service, set_workers: SetWorkers) -> Stack:
    """One relay, so one of the two workers has it; a second door, whose clients say first who they are."""
    stack = make_stack("echo")
    stack.write_relay_config("node-a", {"echo": echo_service.target}, RELAY_LIMITS)
    stack.launch_relay("node-a")
    return stack


def started(stack: Stack, *doors: tuple[int, str]) -> Unit:
    """The gateway, with these doors beside the first: port, and more lines."""
    write_doors(stack, *doors)
    unit = Unit(launch(stack), stack.directory / "gateway.log", stack.directory)
    unit.start()
    stack.wait_for_relays("node-a", timeout_s=60)
    return unit


def write_doors(stack: Stack, *doors: tuple[int, str]) -> None:
    own = "".join(f'[[door]]\nlisten = "127.0.0.1:{port}"\nservice = "echo"\n{more}\n' for port, more in doors)
    stack.gateway_extra = f"{GATEWAY_LIMITS}hello_timeout_s = 60\n{own}"
    stack.write_gateway_config()


def listens(process: psutil.Process) -> bool:
    """Whether it has a TCP socket that others connect to."""
    return any(connection.status == psutil.CONN_LISTEN for connection in process.net_connections())


def test_clients_that_have_not_said_what_they_want_are_served_by_those_that_took_them(stack: Stack) -> None:
    """By the other worker's relay, which has no client of its own then."""
    port = free_port()
    unit = started(stack, (port, 'proxy_from = ["127.0.0.0/8"]'))
    try:
        holder = worker_of(stack, "node-a")
        (other,) = {1, 2} - {holder}
        old = {number: psutil.Process(worker["pid"]) for number, worker in workers(stack).items()}
        old[holder].suspend()
        with ExitStack() as clients:
            silent = [clients.enter_context(dial(port)) for _ in range(CLIENTS)]
            wait_until(lambda: taken(old[other], port) == CLIENTS, 9, "all clients at the worker that has no relay")
            old[holder].resume()
            unit.restart()
            stack.wait_for_relays("node-a", timeout_s=60)
            for number, client in enumerate(silent):
                client.sendall(HEADER + b"%03d" % number)
            for number, client in enumerate(silent):
                assert read_exactly(client, 3) == b"%03d" % number
            assert old[holder].is_running()
        wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
    finally:
        unit.close()


def test_a_worker_that_stands_still_holds_nothing_up(stack: Stack) -> None:
    unit = started(stack)
    try:
        flows = [Flow(stack.doors["echo"], seed) for seed in range(CLIENTS)]
        (other,) = {1, 2} - {worker_of(stack, "node-a")}
        stuck = psutil.Process(workers(stack)[other]["pid"])
        wait_until(lambda: workers(stack)[other]["connections"] == 0, what="all clients at the relay's worker")
        stuck.suspend()
        unit.restart()
        until_gone([stuck.pid])
        assert "does not let go, and is killed" in stack.logs()
        stack.wait_for_relays("node-a", timeout_s=60)
        assert is_served(stack.doors["echo"])
        assert [flow.finish() for flow in flows] == [""] * CLIENTS
    finally:
        unit.close()


def test_relays_are_sent_on_when_every_worker_has_let_go(stack: Stack) -> None:
    """One that came back to an old worker would be taken for one whose other links are lost."""
    unit = started(stack)
    try:
        flows = [Flow(stack.doors["echo"], seed) for seed in range(CLIENTS)]
        holder = worker_of(stack, "node-a")
        (other,) = {1, 2} - {holder}
        old = {number: psutil.Process(worker["pid"]) for number, worker in workers(stack).items()}
        wait_until(lambda: workers(stack)[holder]["connections"] == CLIENTS, what="all clients at the relay's worker")
        old[other].suspend()
        assert unit.main is not None
        unit.main.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(old[holder]), 5, "the relay's worker to let go")
        time.sleep(0.5)  # a relay that was told by now has dialled
        resumed_at = datetime.now(UTC)
        old[other].resume()
        assert unit.stop() == 0
        unit.start()
        stack.wait_for_relays("node-a", timeout_s=60)
        assert [flow.finish() for flow in flows] == [""] * CLIENTS
        log = map(json.loads, (stack.directory / "node-a.log").read_text().splitlines())
        told = [datetime.fromisoformat(line["ts"]) for line in log if "looking for its successor" in line["event"]]
        assert len(told) == 1
        assert told[0] > resumed_at - timedelta(milliseconds=1)  # to which the log is exact
    finally:
        unit.close()


def test_a_door_that_came_with_a_reload_is_kept_and_one_that_is_drained_is_not(stack: Stack) -> None:
    unit, port = started(stack), free_port()
    try:
        before = len(unit.stored)
        write_doors(stack, (port, ""))
        unit.reload()
        visitors = Visitors(port)
        try:
            unit.restart()
            wait_until(lambda: visitors.ends["served"] > CLIENTS, 30, "visitors")
        finally:
            visitors.stop()
        assert set(visitors.ends) == {"served"}, visitors.ends
        assert len(unit.stored) == before + 1
        with dial(port) as kept:
            say(kept)
            assert stack.gateway_cli("drain", "--timeout", "0.2", check=False).returncode == 1
            unit.listen()
            assert len(unit.stored) == before - 1
            with pytest.raises(ConnectionRefusedError):  # nobody waits in a queue that somebody else keeps
                dial(port)
            unit.restart()
            say(kept)
        wait_until(lambda: is_served(port), 30, "the door to be open again")
    finally:
        unit.close()


def test_a_reload_that_is_refused_keeps_no_socket(stack: Stack) -> None:
    unit, port = started(stack), free_port()
    try:
        before = len(unit.stored)
        certificate = Path(stack.directory / "no.pem")
        write_doors(stack, (port, f'kind = "https"\ncertificate = "{certificate}"\nkey = "{certificate}"'))
        unit.reload()
        assert "reload refused" in stack.logs()
        assert len(unit.stored) == before
        with pytest.raises(ConnectionRefusedError):
            dial(port)
    finally:
        unit.close()


def test_a_stop_lets_streams_finish_after_the_launcher_has_ended(stack: Stack) -> None:
    unit = started(stack)
    try:
        with dial(stack.doors["echo"]) as kept:
            say(kept)
            assert unit.stop() == 0  # long before drain_s is over
            say(kept)
        wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
    finally:
        unit.close()


def test_when_the_launcher_is_killed_streams_finish(stack: Stack) -> None:
    unit = started(stack)
    try:
        with dial(stack.doors["echo"]) as kept:
            say(kept)
            unit.kill()
            unit.start()
            say(kept)
            stack.wait_for_relays("node-a", timeout_s=60)
            assert is_served(stack.doors["echo"])
            say(kept)
        wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
    finally:
        unit.close()


def test_tls_that_ended_at_one_worker_outlives_a_restart(
    make_stack: MakeStack, serve: Callable[..., Service], set_workers: SetWorkers
) -> None:
    """About half of the clients are carried to the relay's worker by the one that took them."""
    service, port = serve(site), free_port()
    stack = make_stack("site")
    stack.write_relay_config("node-a", {"site": service.target}, RELAY_LIMITS)
    stack.launch_relay("node-a")
    door = f'[[door]]\nlisten = "127.0.0.1:{port}"\nkind = "https"\nservice = "site"\ncertificate = "server.pem"\nkey = "server.key"\n'
    stack.gateway_extra = GATEWAY_LIMITS + door
    stack.write_gateway_config()
    unit = Unit(launch(stack), stack.directory / "gateway.log", stack.directory)
    context = ssl.create_default_context(cafile=str(stack.directory / "ca.pem"))
    head, body = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % MIB, bytes(payload(5, MIB))
    try:
        unit.start()
        stack.wait_for_relays("node-a", timeout_s=60)
        with ExitStack() as stack_of_clients:
            clients = [
                stack_of_clients.enter_context(context.wrap_socket(dial(port), server_hostname="127.0.0.1")) for _ in range(2 * CLIENTS)
            ]
            for client in clients:
                client.sendall(head + body[: MIB // 2])
            unit.restart()
            stack.wait_for_relays("node-a", timeout_s=60)
            for client in clients:
                client.sendall(body[MIB // 2 :])
                answer = read_exactly(client, len(b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n") + MIB)
                assert answer.endswith(body)
        assert service.problems == []
        wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
    finally:
        unit.close()
