"""System: daemons that are killed. Clients get the right bytes or RST, and new clients are served soon."""

import contextlib
import random
import socket
import time
from collections.abc import Callable

import pytest

from tests.system.peers import MIB, Outcome, Service, dial, exchanges, how_it_ends, is_served, payload, read_exactly
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("restarts")]

BACK_S = 8.0
"""Until relays are back after the gateway has been restarted: their jitter, and two slow starts of a Python process. See `slowness`."""
SOON_S = 15.0
"""On a busy machine; far below hold_s, 30 s, for which a stream without its link is kept."""


@pytest.fixture
def stack(make_stack: Callable[..., Stack], swap_service: Service, echo_service: Service) -> Stack:
    stack = make_stack("swap", "echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"swap": swap_service.target, "echo": echo_service.target})
    return stack


def test_a_relay_that_is_killed_takes_its_name_over_when_it_is_back(stack: Stack) -> None:
    with dial(stack.doors["echo"]) as old:
        old.sendall(b"old")
        assert read_exactly(old, 3) == b"old"
        stack.relays["node-a"].kill()
        began = time.monotonic()
        stack.start_relay("node-a")
        assert how_it_ends(old, SOON_S)[0] == "reset"
        assert is_served(stack.doors["echo"])
        assert time.monotonic() - began < BACK_S * slowness()
    assert stack.live_relays()["node-a"]["epoch"] == 2


def test_who_comes_while_the_only_relay_is_dead_is_served_by_its_next_process(stack: Stack) -> None:
    """Also those who said at once what must not be said twice: the dead one has not heard it."""
    assert is_served(stack.doors["echo"])
    stack.relays["node-a"].kill()
    wait_until(lambda: not any(link["up"] for link in stack.live_relays()["node-a"]["links"]), SOON_S, "the gateway to notice")
    with contextlib.ExitStack() as clients:
        waiting = [clients.enter_context(dial(stack.doors["echo"])) for _ in range(20)]
        for number, client in enumerate(waiting):
            client.sendall(b"transfer %2d" % number if number % 2 else b"")
        stack.start_relay("node-a")
        for number, client in enumerate(waiting):
            client.settimeout(SOON_S)
            if not number % 2:
                client.sendall(b"transfer %2d" % number)
            assert read_exactly(client, 11) == b"transfer %2d" % number
    assert stack.live_relays()["node-a"]["epoch"] == 2


def test_after_a_killed_gateway_the_relay_comes_back_by_itself(stack: Stack) -> None:
    crowd = exchanges(stack.doors["swap"], 16, 4 * MIB, rate_bytes_per_s=MIB)
    time.sleep(1)
    assert crowd.running
    stack.gateway.kill()
    began = time.monotonic()
    stack.start_gateway()
    wait_until(lambda: is_served(stack.doors["echo"]), 60, "the relay back and a new client served")
    assert time.monotonic() - began < BACK_S * slowness()
    assert set(crowd.outcomes()) <= {Outcome.RIGHT, Outcome.RESET}


@pytest.mark.parametrize("size_bytes", [0, 100_000])
def test_a_killed_gateway_is_no_clean_end(stack: Stack, size_bytes: int) -> None:
    with dial(stack.doors["echo"]) as client:
        client.sendall(payload(1, size_bytes + 1))
        assert read_exactly(client, size_bytes + 1) == payload(1, size_bytes + 1)
        stack.gateway.kill()
        assert how_it_ends(client, SOON_S)[0] == "reset"


def test_a_killed_relay_is_no_clean_end_for_a_service(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("held")
    stack.start_gateway()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        stack.start_relay("node-a", {"held": f"127.0.0.1:{listener.getsockname()[1]}"})
        with dial(stack.doors["held"]) as client:
            client.sendall(b"upload")
            service, _ = listener.accept()
            with service:
                service.settimeout(10)
                assert read_exactly(service, 6) == b"upload"
                stack.relays["node-a"].kill()
                assert how_it_ends(service, SOON_S)[0] == "reset"


@pytest.mark.slow
def test_both_daemons_killed_in_turn_under_load(stack: Stack) -> None:
    chance = random.Random(1)
    outcomes: list[Outcome] = []
    for turn in range(6):
        wait_until(lambda: is_served(stack.doors["echo"]), 15, "a new client served")
        crowd = exchanges(stack.doors["swap"], 12, 2 * MIB, rate_bytes_per_s=MIB)
        time.sleep(chance.uniform(0.1, 1.5))
        victim = stack.gateway if turn % 2 else stack.relays["node-a"]
        victim.kill()
        if turn % 2:
            stack.start_gateway()
        else:
            stack.start_relay("node-a")
        outcomes += crowd.outcomes()
    assert set(outcomes) <= {Outcome.RIGHT, Outcome.RESET}
    assert Outcome.RESET in outcomes
    wait_until(lambda: is_served(stack.doors["echo"]), 15, "a new client served")
    assert exchanges(stack.doors["swap"], 4, MIB).outcomes() == [Outcome.RIGHT] * 4
