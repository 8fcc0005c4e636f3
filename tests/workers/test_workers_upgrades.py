"""System: a relay that is restarted behind a gateway of several processes: its successor is at another one than itself."""

import time
from contextlib import ExitStack

import pytest
from workers_rig import MakeStack, start, worker_of

from tests.system.peers import Service, dial, read_exactly
from tests.system.stack import Stack, wait_until
from tests.system.test_system_upgrades import GATEWAY_LIMITS, RELAY_LIMITS, through
from tests.system.units import Unit

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]


def test_a_relay_is_replaced_by_one_at_another_worker(make_stack: MakeStack, echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": "2"})
    config = stack.write_relay_config("node-a", {"echo": echo_service.target}, RELAY_LIMITS)
    relay = Unit(["fxrelay.cli", "launch", "--config", str(config)], stack.directory / "node-a.log", stack.directory)
    try:
        relay.start()
        stack.wait_for_relays("node-a")
        seen = [worker_of(stack, "node-a")]

        def restart() -> None:
            relay.restart()
            stack.wait_for_relays("node-a")
            seen.append(worker_of(stack, "node-a"))

        through(stack.doors["echo"], restart, 2)
        wait_until(lambda: not relay.left_over(), 30, "the end of the old processes")  # sooner than handover_s
        assert seen in ([1, 2, 1], [2, 1, 2])
        assert "fenced" not in stack.logs()
    finally:
        relay.close()


def test_who_comes_while_the_only_relay_is_dead_is_served_by_its_next_process_at_another_worker(
    make_stack: MakeStack, echo_service: Service
) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=1)
    seen = [worker_of(stack, "node-0")]
    for _ in range(2):
        stack.relays["node-0"].kill()
        wait_until(lambda: not any(link["up"] for link in stack.live_relays()["node-0"]["links"]), what="the gateway to notice")
        with ExitStack() as clients:
            waiting = [clients.enter_context(dial(stack.doors["echo"])) for _ in range(20)]
            for client in waiting:
                client.sendall(b"before")
            relay = stack.launch_relay("node-0")
            while not is_here_again(stack, seen):
                waiting.append(clients.enter_context(dial(stack.doors["echo"])))
                waiting[-1].sendall(b"during")
                time.sleep(0.02)
            relay.wait_ready()
            for number, client in enumerate(waiting):
                client.settimeout(60)
                assert read_exactly(client, 6) == (b"before" if number < 20 else b"during")
    assert seen in ([1, 2, 1], [2, 1, 2])


def is_here_again(stack: Stack, seen: list[int]) -> bool:
    """Notes at which worker the relay's latest process is, if that is not the one before."""
    worker = worker_of(stack, "node-0")
    if worker != seen[-1]:
        seen.append(worker)
        return True
    return False


def test_a_gateway_of_several_processes_and_its_relay_are_restarted_in_turns(
    make_stack: MakeStack, echo_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that makes way stays where its streams are, whatever is restarted beside it."""
    monkeypatch.setenv("FXGATEWAY__TUNNEL__WORKERS", "2")
    stack = make_stack("echo", extra=GATEWAY_LIMITS)
    config = stack.write_relay_config("node-a", {"echo": echo_service.target}, RELAY_LIMITS)
    gateway = Unit(["fxgateway.cli", "launch", "--config", str(stack.gateway_config)], stack.directory / "gateway.log", stack.directory)
    relay = Unit(["fxrelay.cli", "launch", "--config", str(config)], stack.directory / "node-a.log", stack.directory)
    try:
        gateway.start()
        relay.start()
        stack.wait_for_relays("node-a")

        def restart() -> None:
            relay.restart()
            gateway.restart()

        through(stack.doors["echo"], restart, 2)
        wait_until(lambda: not relay.left_over() and not gateway.left_over(), 60, "the end of the old processes")
        assert "fenced" not in stack.logs()
    finally:
        relay.close()
        gateway.close()
