"""System: a gateway of several processes, with real relays and clients: it does what one process would."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable

import pytest

from tests.system.peers import Service, dial, read_exactly
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("workers")]

MakeStack = Callable[..., Stack]


def workers(stack: Stack) -> dict[int, dict]:
    """The gateway's processes, as its status page shows them."""
    return {worker["worker"]: worker for worker in json.loads(stack.page("/relays"))["gateway"]["workers"]}


def start(make_stack: MakeStack, services: dict[str, str], relays: int, count: int = 2, extra: str = "") -> Stack:
    """A gateway of so many workers and so many relays, each with all these services."""
    stack = make_stack(*services, extra=extra)
    stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": str(count)})
    for number in range(relays):
        stack.start_relay(f"node-{number}", services)
    stack.wait_for_relays(*(f"node-{number}" for number in range(relays)))
    return stack


def test_any_worker_takes_a_client_for_any_relay(make_stack: MakeStack, echo_service: Service) -> None:
    stack = start(make_stack, {"echo": echo_service.target}, relays=2)
    assert {worker["relays"] for worker in workers(stack).values()} == {1}
    clients = [dial(stack.doors["echo"]) for _ in range(200)]
    for number, client in enumerate(clients):
        client.sendall(b"%06d" % number)
    for number, client in enumerate(clients):
        assert read_exactly(client, 6) == b"%06d" % number
    streams = [sum(link["streams"] for link in relay["links"]) for relay in stack.live_relays().values()]
    assert sum(streams) == 200
    assert min(streams) > 60, streams
    for client in clients:
        client.close()
