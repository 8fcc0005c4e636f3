"""Wall clocks jump by five minutes, the gateway's and a relay's. Nothing that runs may notice; what is new says by how much, and heals."""

import re
import time

from tests.chaos.fault_cuts import resumptions
from tests.chaos.figures import Outcome
from tests.chaos.stage import LIVELY, LIVELY_RELAY, MIB, Fault, Stage, Unplayable, judge, served_again_s
from tests.system.clocks import LIBRARY, Clock
from tests.system.peers import is_served
from tests.system.stack import wait_until

STEP_S = 300
STEPS = ((STEP_S, 0), (-STEP_S, STEP_S), (0, -STEP_S))
"""Of the gateway's clock and the relay's."""
STREAMS = 30


def clocks(stage: Stage, outcome: Outcome) -> None:
    """Each step lasts longer than a path may be silent. In the end the relay's clock is wrong when its tunnel is cut."""
    if LIBRARY is None:
        raise Unplayable("libfaketime is not installed")
    ours, theirs = Clock(stage.directory / "gateway.clock"), Clock(stage.directory / "relay.clock")
    services, (swap, echo) = stage.services("swap", "echo")
    stack = stage.stack("swap", "echo", extra=LIVELY)
    stack.start_gateway(env=ours.env)
    relay = stack.start_relay("node-a", {"swap": swap, "echo": echo}, f"{LIVELY_RELAY}max_backoff_s = 1\n", env=theirs.env)
    load = stage.load(stack.doors["swap"], STREAMS, size_bytes=MIB, rate_bytes_per_s=MIB / 4, repeat=True)
    load.wait_running()
    visits = served = 0
    steps = STEPS * stage.pick(1, 3)
    for number, (gateway_s, relay_s) in enumerate(steps):
        stage.show(f"clocks {gateway_s:+d} and {relay_s:+d} s", number / len(steps))
        ours.step(gateway_s)
        theirs.step(relay_s)
        ends = time.monotonic() + stage.pick(4, 8)
        while time.monotonic() < ends:
            visits += 1
            served += is_served(stack.doors["echo"])
            time.sleep(0.2)
    log = relay.log.read_text()
    assert "clock" not in log, f"a word about the clock though nothing asks for it: {log[-2000:]}"
    outcome.add("steps of 300 s", len(steps))
    outcome.add(f"new clients served of {visits}", served, f"= {visits}")
    outcome.add("control links lost", log.count("connected to gateway") - 1, "= 0")
    outcome.add("data links lost", resumptions(stack), "= 0")
    began = time.monotonic()
    stack.cutter.cut()
    wait_until(lambda: is_told(relay.log.read_text()), 15, "a word about the clock")
    outcome.add("s from a cut until the log says by how much the relay's clock is behind", time.monotonic() - began, "≤ 5")
    theirs.step(0)
    outcome.add("s from a right clock until a new client is served", served_again_s(stack.doors["echo"]), "≤ 5")
    judge(outcome, load.finish(), services)
    outcome.add("data links resumed", resumptions(stack), "≥ 1")


def is_told(log: str) -> bool:
    """Whether it says by how much the clock is wrong."""
    return any(STEP_S - 3 <= int(seconds) <= STEP_S + 3 for seconds in re.findall(r"clock is (\d+) s behind", log))


CLOCKS = Fault("clocks", "wall clocks of both ends jump by 300 s: nothing is lost; a wrong one is told, and heals when it is right", clocks)
