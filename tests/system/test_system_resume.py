"""System: the tunnel is cut, falls silent, or stays away; the streams in it are continued byte for byte, or end in RST."""

import json
import signal
import socket
import time
from collections.abc import Callable

import pytest

from tests.system.peers import MIB, Outcome, Service, dial, exchanges, how_it_ends, payload, read_exactly
from tests.system.stack import Stack, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("resume")]

STREAMS = 64
CUTS = 20
SILENCE_FOUND_S = 15.0
"""Half of what streams are held for. See `slowness`."""
SOON_S = 15.0
"""On a busy machine; far below the 30 s for which streams are held where nothing else is said."""


def resumptions(stack: Stack) -> int:
    return sum(link["resumed"] for relay in stack.live_relays().values() for link in relay["links"])


def is_up(stack: Stack) -> bool:
    return any(link["up"] for relay in stack.live_relays().values() for link in relay["links"])


def events(stack: Stack, log: str, words: str) -> list[str]:
    lines = (stack.directory / log).read_text().splitlines()
    return [event for event in (json.loads(line)["event"] for line in lines) if words in event]


@pytest.mark.slow
def test_no_stream_is_lost_in_twenty_cuts(make_stack: Callable[..., Stack], swap_service: Service) -> None:
    stack = make_stack("swap")
    stack.start_gateway()
    stack.start_relay("node-a", {"swap": swap_service.target})
    crowd = exchanges(stack.doors["swap"], STREAMS, 4 * MIB, rate_bytes_per_s=MIB / 2)
    cuts_in_transfer = 0
    for _ in range(CUTS):
        time.sleep(0.1)
        wait_until(lambda: is_up(stack), 10, "the link")
        assert stack.cutter.cut() >= 2
        cuts_in_transfer += crowd.running > 0
    outcomes = crowd.outcomes()
    assert outcomes == [Outcome.RIGHT] * STREAMS
    assert cuts_in_transfer == CUTS
    assert resumptions(stack) >= CUTS / 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_that_drains_has_its_streams_resumed(make_stack: Callable[..., Stack], swap_service: Service, workers: int) -> None:
    stack = make_stack("swap", extra="[limits]\ndrain_s = 60\n")
    stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": str(workers)})
    stack.start_relay("node-a", {"swap": swap_service.target})
    before = swap_service.accepted
    crowd = exchanges(stack.doors["swap"], 8, MIB, rate_bytes_per_s=MIB / 4)
    wait_until(lambda: swap_service.accepted == before + 8, what="all streams open")
    stack.gateway.signal(signal.SIGTERM)
    wait_until(lambda: events(stack, "gateway.log", "draining for at most"), what="the drain")
    for count in (1, 2):
        assert stack.cutter.cut() >= 2
        wait_until(lambda count=count: len(events(stack, "node-a.log", "resumed")) == count, what=f"resumption {count}")
    assert crowd.running
    assert crowd.outcomes() == [Outcome.RIGHT] * 8
    assert stack.gateway.wait() == 0


def test_a_silent_path_is_found_on_both_sides_and_left(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"], 2 * SILENCE_FOUND_S) as client:
        client.sendall(b"before")
        assert read_exactly(client, 6) == b"before"
        frozen_at = time.monotonic()
        assert stack.cutter.freeze() == 2
        client.sendall(bytes(payload(1, 100_000)))
        assert read_exactly(client, 100_000) == payload(1, 100_000)
        assert time.monotonic() - frozen_at < SILENCE_FOUND_S * slowness()
        remaining_s = max(0.0, SILENCE_FOUND_S - (time.monotonic() - frozen_at))
        wait_until(
            lambda: bool(events(stack, "gateway.log", "control link of node-a ended")), remaining_s, "the gateway to see the silence"
        )
        assert resumptions(stack) == 1
        stack.cutter.thaw()  # what comes late on the old path harms nothing
        client.sendall(b"after")
        assert read_exactly(client, 5) == b"after"


def test_when_the_hold_is_over_both_ends_are_reset(make_stack: Callable[..., Stack]) -> None:
    hold_s = 2.0
    stack = make_stack("held", extra=f"[resume]\nhold_s = {hold_s:g}\n")
    stack.start_gateway()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        stack.start_relay("node-a", {"held": f"127.0.0.1:{listener.getsockname()[1]}"}, f"[resume]\nhold_s = {hold_s:g}\n")
        with dial(stack.doors["held"]) as client:
            client.sendall(b"!")
            service, _ = listener.accept()
            with service:
                service.settimeout(10)
                assert service.recv(1) == b"!"
                stack.cutter.close()  # for good
                end, took_s = how_it_ends(client, hold_s + SOON_S)
                assert end == "reset"
                assert took_s > hold_s - 0.5
                assert how_it_ends(service, SOON_S)[0] == "reset"


def test_with_resumption_switched_off_a_cut_is_a_reset(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra="[resume]\nenabled = false\n")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"before")
        assert read_exactly(client, 6) == b"before"
        stack.cutter.cut()
        assert how_it_ends(client, SOON_S)[0] == "reset"
    stack.wait_for_relays("node-a")
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"again")
        assert read_exactly(client, 5) == b"again"
