"""Processes are stopped (SIGSTOP) for a while, and for longer than anything is held for them."""

import signal
import time
from contextlib import ExitStack

from tests.chaos.figures import Outcome
from tests.chaos.pool_stage import NODES, Pools
from tests.chaos.stage import LIVELY, LIVELY_RELAY, MIB, Fault, Stage, judge, served_again_s
from tests.system.peers import dial, how_it_ends, is_served, say
from tests.system.stack import wait_until

OLD = 5


def stops(stage: Stage, outcome: Outcome) -> None:
    """Relay, gateway and store in turn. Shorter than the hold: nothing may be lost. Longer: right bytes or RST."""
    hold_s, short_s, long_s = stage.pick((30.0, 4.0, 0.0), (30.0, 20.0, 45.0))
    hold = f"[resume]\nhold_s = {hold_s:g}\n"
    pools = Pools(stage, LIVELY + hold, LIVELY_RELAY + hold)
    total = short_s * 3 + long_s * 2
    done = 0.0
    load = pools.load(30, MIB / 4)
    load.wait_running()
    for victim in (NODES[0], "gateway", "store"):
        stage.show(f"{victim} stopped for {short_s:g} s", done / total)
        name = "relay" if victim in NODES else victim
        pools.signal(victim, signal.SIGSTOP)
        began = time.monotonic()
        if victim != "gateway":
            outcome.add(f"{name} stopped: s until a new client is served", served_again_s(pools.echo), "≤ 15")
        time.sleep(max(0.0, began + short_s - time.monotonic()))
        pools.signal(victim, signal.SIGCONT)
        outcome.add(f"{name} stopped {short_s:g} s: s until ready again", ready_again_s(pools), f"≤ {stage.pick(15, 5)}")
        done += short_s
    judge(outcome, load.finish(), pools.services)
    if not long_s:
        return
    load = pools.load(30, MIB / 4)
    load.wait_running()
    for victim in (NODES[1], "gateway"):
        stage.show(f"{victim} stopped for {long_s:g} s", done / total)
        name = "relay" if victim in NODES else victim
        with ExitStack() as crowd:
            old = [crowd.enter_context(dial(pools.echo)) for _ in range(OLD if victim == "gateway" else 0)]
            for client in old:
                say(client)
            pools.signal(victim, signal.SIGSTOP)
            time.sleep(long_s)
            pools.signal(victim, signal.SIGCONT)
            began = time.monotonic()
            outcome.add(f"{name} stopped {long_s:g} s, past the hold: s until ready again", ready_again_s(pools), f"≤ {stage.pick(15, 5)}")
            ends = [how_it_ends(client, hold_s)[0] for client in old]
            assert set(ends) <= {"reset"}, f"streams of before end so: {ends}"
            if old:
                outcome.add("s until streams of before have ended", time.monotonic() - began, "≤ 5")
        done += long_s
    judge(outcome, load.finish(), pools.services, lost="> 0", title="past the hold: ")


def ready_again_s(pools: Pools) -> float:
    """Seconds until all is as it should be; what a stopped process has not noticed yet does not count."""
    began = time.monotonic()
    wait_until(lambda: is_served(pools.echo) and pools.is_ready(), 60, "ready again")
    return time.monotonic() - began


STOPS = Fault("stops", "relay, gateway and store stopped for 20 s: nothing lost; past every hold: RST, and back by themselves", stops)
