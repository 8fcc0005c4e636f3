"""System: restarts, reloads and upgrades of both daemons as a service manager does them: nobody is cut off, nobody is turned away."""

import os
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.system.peers import MIB, Outcome, Service, dial, exchanges, is_served, say
from tests.system.stack import Stack, wait_until
from tests.system.test_system_activation import Visitors
from tests.system.units import Unit

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("systemd")]

RESTARTS = int(os.environ.get("FX_UPGRADES", "5"))
TRANSFERS = 6
BACK_S = 5.0
GATEWAY_LIMITS = "[limits]\ndrain_s = 60\n"
RELAY_LIMITS = "[limits]\ndrain_s = 60\n"


class Managed:
    """A stack whose daemons are units."""

    def __init__(self, stack: Stack, services: dict[str, str], *, with_store: bool = True) -> None:
        self.stack = stack
        relay = stack.write_relay_config("node-a", services, RELAY_LIMITS)
        self.gateway = Unit(
            ["fxgateway.cli", "launch", "--config", str(stack.gateway_config)],
            stack.directory / "gateway.log",
            stack.directory,
            with_store=with_store,
        )
        self.relay = Unit(["fxrelay.cli", "launch", "--config", str(relay)], stack.directory / "node-a.log", stack.directory)

    def start(self) -> None:
        """Until a client would be served."""
        self.gateway.start()
        self.relay.start()
        self.stack.wait_for_relays("node-a")

    def close(self) -> None:
        self.relay.close()
        self.gateway.close()


@pytest.fixture
def managed(make_stack: Callable[..., Stack], echo_service: Service, swap_service: Service) -> Iterator[Managed]:
    managed = Managed(make_stack("echo", "swap", extra=GATEWAY_LIMITS), {"echo": echo_service.target, "swap": swap_service.target})
    managed.start()
    yield managed
    managed.close()


def through(managed: Managed, happening: Callable[[], None]) -> None:
    """Transfers and 50 visits a second while something happens RESTARTS times; nothing may be lost or refused."""
    stack = managed.stack
    with dial(stack.doors["echo"]) as kept:
        say(kept)
        transfers = exchanges(stack.doors["swap"], TRANSFERS, 6 * MIB, rate_bytes_per_s=0.5 * MIB, timeout_s=90)
        visitors = Visitors(stack.doors["echo"])
        began = time.monotonic()
        try:
            for _ in range(RESTARTS):
                time.sleep(0.3)
                happening()
            took_s = time.monotonic() - began
            say(kept)
            running = transfers.running
            outcomes = transfers.outcomes()
        finally:
            visitors.stop()
        say(kept)
    figures = (
        f"{RESTARTS} in {took_s:.1f} s, {running} transfers ran on: {dict((o.value, outcomes.count(o)) for o in set(outcomes))}; "
        f"visits {dict(visitors.ends)}, the longest {visitors.longest_s:.2f} s"
    )
    sys.stdout.write(f"\n{figures}\n")
    assert set(outcomes) == {Outcome.RIGHT}, figures
    assert set(visitors.ends) == {"served"}, figures
    assert running, figures
    assert visitors.ends["served"] > took_s * 10, figures


def test_restarts_of_the_gateway(managed: Managed) -> None:
    through(managed, managed.gateway.restart)
    wait_until(lambda: not managed.gateway.left_over(), 30, "the end of the old processes")


def test_restarts_of_the_relay(managed: Managed) -> None:
    through(managed, managed.relay.restart)
    wait_until(lambda: not managed.relay.left_over(), 30, "the end of the old processes")
    assert "fenced" not in managed.stack.logs()
    assert is_served(managed.stack.doors["echo"])
