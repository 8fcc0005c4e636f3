"""System: whatever happens, at the chattiest level, no secret and no byte of a client is in a log."""

import json
import time
from collections.abc import Callable

import pytest

from tests.system.peers import MIB, Outcome, Service, dial, exchanges, read_exactly
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("logs")]

CANARY = b"canary-7f3a9e"


def test_no_secret_is_logged(make_stack: Callable[..., Stack], echo_service: Service, swap_service: Service) -> None:
    debug = '[log]\nlevel = "debug"\n'
    stack = make_stack("echo", "swap", extra=debug)
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target, "swap": swap_service.target}, debug)
    stack.write_relay_config("stranger", {"echo": echo_service.target}, debug)
    path = stack.directory / "stranger" / "gateway.json"
    invitation = json.loads(path.read_text())
    token = invitation["enrolment"]["token"]
    wrong_token = token[:-6] + "CANARY"
    invitation["enrolment"]["token"] = wrong_token
    path.write_text(json.dumps(invitation))
    assert stack.launch_relay("stranger").wait() == 1
    with dial(stack.doors["echo"]) as client:
        client.sendall(CANARY)
        assert read_exactly(client, len(CANARY)) == CANARY
        crowd = exchanges(stack.doors["swap"], 8, MIB, rate_bytes_per_s=MIB)
        for _ in range(3):
            time.sleep(0.2)
            stack.cutter.cut()
        assert crowd.outcomes() == [Outcome.RIGHT] * 8
    stack.gateway_cli("revoke", "node-a")
    assert stack.relays["node-a"].wait() == 1
    assert stack.gateway.stop() == 0
    text = stack.logs()
    assert len(text.splitlines()) > 20
    key = (stack.directory / "node-a" / "state" / "relay.key").read_text().splitlines()[1]
    for secret in (token, wrong_token, key, CANARY.decode(), "Bearer ", "fxt_"):
        assert secret not in text


def test_daemons_serve_where_nothing_can_be_written(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    """Both outputs are on a disk that is full. What is logged is lost, and nothing else."""
    stack = make_stack("echo")
    nowhere = ("sh", "-c", 'exec "$@" > /dev/full 2>&1', "sh")
    gateway = stack.launch_gateway(prefix=nowhere)
    stack.relay_prefix = nowhere
    stack.write_relay_config("node-a", {"echo": echo_service.target})
    relay = stack.launch_relay("node-a")
    stack.wait_for_relays("node-a")
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"heard")
        assert read_exactly(client, 5) == b"heard"
    time.sleep(0.2)  # for the relay's word that it is ready
    assert gateway.process.poll() is None
    assert relay.process.poll() is None
    assert relay.stop() == 0
    assert gateway.stop() == 0
