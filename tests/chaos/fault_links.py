"""One of several data links dies, and one of several gateways."""

import shutil
import time

from tests.chaos.figures import Outcome
from tests.chaos.stage import LIVELY, LIVELY_RELAY, MIB, Fault, Stage, judge, served_again_s, timed
from tests.system.peers import is_served
from tests.system.stack import Stack, wait_until

LINKS = 4
CONTROL_LINKS = 1
SLOW = MIB / 8


def links(stage: Stage, outcome: Outcome) -> None:
    """`[relay] links = 4`; each data link falls silent in turn, and comes back by another connection."""
    services, (swap, echo) = stage.services("swap", "echo")
    stack = stage.stack("swap", "echo", extra=LIVELY)
    stack.start_gateway()
    config = stack.write_relay_config("node-a", {"swap": swap, "echo": echo}, LIVELY_RELAY)
    config.write_text(config.read_text().replace("[relay]\n", f"[relay]\nlinks = {LINKS}\n"))
    stack.start_relay("node-a")
    wait_until(lambda: up_links(stack) == LINKS, 20, "all links up")
    load = stage.load(stack.doors["swap"], 40, size_bytes=2 * MIB, rate_bytes_per_s=SLOW)
    load.wait_running()
    carried = [link["streams"] for link in stack.live_relays()["node-a"]["links"]]
    outcome.add("data links", len(carried), f"= {LINKS}")
    outcome.add("streams on the fullest of them", max(carried), f"≤ {40 // LINKS + 2}")
    silent = stage.pick(1, LINKS)
    for number in range(silent):
        stage.show(f"data link {number + 1} is silent", number / silent)
        # The oldest connection is the control link; the oldest data link is always the next one to die.
        stack.cutter.freeze_one(CONTROL_LINKS)
        served = [served_again_s(stack.doors["echo"]) for _ in range(8)]
        outcome.add(f"link {number + 1} silent: s until served, 8 new clients, longest", max(served), "≤ 15")
        wait_until(lambda number=number: resumed(stack) == number + 1, 20, "the link resumed")
    tally = load.finish()
    judge(outcome, tally, services)
    outcome.add("streams that waited for more than 2 s", tally["stalled"], f"≤ {(40 // LINKS + 2) * silent}")
    outcome.add("s that a stream waited, longest", tally["stalled_s"], "≤ 15")


def gateways(stage: Stage, outcome: Outcome) -> None:
    """Two gateways, one relay at both. One is killed under load, stays away, and comes back."""
    services, (swap, echo) = stage.services("swap", "echo")
    north, south = (stage.stack("swap", "echo", extra=LIVELY) for _ in range(2))
    for stack in (north, south):
        stack.start_gateway()
    config = north.write_relay_config("node-a", {"swap": swap, "echo": echo}, LIVELY_RELAY)
    shutil.copy(south.directory / "gateway.json", config.parent / "south.json")
    config.write_text(config.read_text().replace("[[service]]", '[[gateway]]\nfile = "south.json"\n[[service]]', 1))
    north.start_relay("node-a")
    for stack in (north, south):
        stack.wait_for_relays("node-a")
    outcome.add("gateways by which the service is reached", sum(is_served(stack.doors["echo"]) for stack in (north, south)), "= 2")
    loads = [stage.load(stack.doors["swap"], 20, size_bytes=MIB, rate_bytes_per_s=SLOW, repeat=True) for stack in (north, south)]
    for load in loads:
        load.wait_running(19)
    time.sleep(1)  # so that something has moved
    stage.show("one gateway killed", 0.2)
    north.gateway.kill()
    with timed() as since:
        served = [served_again_s(south.doors["echo"]) for _ in range(20)]
        outcome.add("one gateway dead: s until served by the other, 20 new clients, longest", max(served), "≤ 2")
        stage.show("the relay restarted meanwhile", 0.4)
        south_tally = loads[1].finish()
        north.relays["node-a"].kill()
        north.start_relay("node-a")
        south.wait_for_relays("node-a")
        outcome.add("a relay restarted meanwhile serves by the other", int(is_served(south.doors["echo"])), "= 1")
        time.sleep(max(0.0, stage.pick(0, 20) - since()))
    stage.show("the gateway comes back", 0.8)
    north.start_gateway()
    outcome.add("s until served by the gateway that was away", served_again_s(north.doors["echo"]), f"≤ {stage.pick(15, 10)}")
    judge(outcome, south_tally, services, title="at the other gateway: ")
    outcome.add("at the other gateway: s that a stream waited, longest", south_tally["stalled_s"], "≤ 2")
    judge(outcome, loads[0].finish(), services, lost="> 0", title="at the killed gateway: ")


def up_links(stack: Stack) -> int:
    """Data links that work."""
    return sum(link["up"] for relay in stack.live_relays().values() for link in relay["links"])


def resumed(stack: Stack) -> int:
    """How often data links were continued."""
    return sum(link["resumed"] for relay in stack.live_relays().values() for link in relay["links"])


LINKS_FAULT = Fault("links", "one of four data links dead: the streams of the others do not notice, its own are resumed", links)
GATEWAYS = Fault("gateways", "one of two gateways dead: clients reach the same service by the other, which does not notice", gateways)
