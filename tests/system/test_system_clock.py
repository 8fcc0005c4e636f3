"""System: wall clocks that jump by five minutes (R20). No tunnel notices; a new one says by how much the clock is wrong, and heals."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clocks import LIBRARY, Clock
from tests.system.peers import Service, dial, read_exactly
from tests.system.stack import Stack, wait_until

pytestmark = [
    pytest.mark.system,
    pytest.mark.xdist_group("clock"),
    pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed (apt-get install faketime)"),
]

STEP_S = 300
DEAD_AFTER_S = 8
STEPS = ((STEP_S, 0), (-STEP_S, STEP_S), (0, -STEP_S))
"""Of the gateway's clock and the relay's."""


def test_a_clock_that_jumps(make_stack: Callable[..., Stack], echo_service: Service, home: Path) -> None:
    stack = make_stack("echo", extra=f"[liveness]\nheartbeat_s = 1\ndead_after_s = {DEAD_AFTER_S}\n")
    clocks = {"gateway": Clock(home / "gateway.clock"), "relay": Clock(home / "relay.clock")}
    stack.start_gateway(env=clocks["gateway"].env)
    extra = f"[liveness]\ndead_after_s = {DEAD_AFTER_S}\nmax_backoff_s = 1\n"
    relay = stack.start_relay("node-a", {"echo": echo_service.target}, extra, env=clocks["relay"].env)
    with dial(stack.doors["echo"]) as client:

        def echoes() -> bool:
            client.sendall(b"hello")
            return read_exactly(client, 5) == b"hello"

        assert echoes()
        for steps in STEPS:
            for name, offset_s in zip(("gateway", "relay"), steps, strict=True):
                clocks[name].step(offset_s)
            ends = time.monotonic() + DEAD_AFTER_S + 0.5
            while time.monotonic() < ends:
                assert echoes()
                time.sleep(0.1)
        assert stack.live_relays()["node-a"]["state"] == "up"
        log = relay.log.read_text()
        assert "clock" not in log, log
        assert log.count("connected to gateway") == 1
        # Now the relay's clock is five minutes behind. Its tunnel lives on; its next control link is another matter.
        assert stack.cutter.cut()
        wait_until(lambda: "s behind the gateway's: set it" in relay.log.read_text(), 15, "a word about the clock")
        assert any(f"clock is {seconds} s behind" in relay.log.read_text() for seconds in range(STEP_S - 3, STEP_S + 4))
        clocks["relay"].step(0)
        stack.wait_for_relays("node-a")
        assert echoes()
