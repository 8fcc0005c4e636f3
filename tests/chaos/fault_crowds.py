"""Too many clients for the descriptors there are; very many that do nothing; very many that do not read."""

import resource
import socket
import time
from contextlib import ExitStack

from tests.chaos.figures import Outcome
from tests.chaos.stage import MIB, Fault, Stage, Unplayable, judge, served_again_s, usage
from tests.system.peers import dial, is_served, say
from tests.system.stack import Daemon, wait_until

KIB = 1024
FILES = 100
TO_RECOVER_S = 3
SOURCES = 100
"""Addresses of this machine from which idle clients come: one has ports for fewer than there are, with those of others."""


def descriptors(stage: Stage, outcome: Outcome) -> None:
    """A gateway with 100 descriptors, and 300 clients that stay (R19)."""
    services, (swap, echo) = stage.services("swap", "echo")
    stack = stage.stack("swap", "echo")
    stack.start_gateway(prefix=("prlimit", f"--nofile={FILES}:{FILES}"))
    stack.start_relay("node-a", {"swap": swap, "echo": echo})
    stack.wait_for_relays("node-a")
    load = stage.load(stack.doors["swap"], 10, size_bytes=MIB // 2, rate_bytes_per_s=MIB / 16)
    load.wait_running()
    with ExitStack() as crowd, dial(stack.doors["echo"], 20) as before:
        say(before)
        for _ in range(300):
            client = crowd.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", stack.doors["echo"]))
        time.sleep(1)
        began, cpu_s = time.monotonic(), usage(stack.gateway.pid).cpu_s
        time.sleep(stage.pick(2, 10))
        outcome.add("gateway's CPU meanwhile, percent", 100 * (usage(stack.gateway.pid).cpu_s - cpu_s) / (time.monotonic() - began), "≤ 10")
        outcome.add("descriptors", usage(stack.gateway.pid).files, f"≤ {FILES}")
        say(before)  # whoever was there stays
        outcome.add("status is served", int(bool(stack.page("/healthz"))), "= 1")
        stack.cutter.cut()  # and the tunnel can be made anew
        wait_until(lambda: any(link["up"] for link in stack.live_relays()["node-a"]["links"]), 20, "the tunnel resumed")
        say(before)
    outcome.add("s until a new client is served when they have left", served_again_s(stack.doors["echo"]), f"≤ {TO_RECOVER_S}")
    judge(outcome, load.finish(), services)


def idle(stage: Stage, outcome: Outcome) -> None:
    """10,000 clients that have said one word (R6)."""
    count = stage.pick(500, 10_000)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < count * 5 // 4 + 500:  # the gateway keeps a tenth for itself
        raise Unplayable(f"a process may not have the descriptors for {count} clients (ulimit -Hn)")
    _, (echo,) = stage.services("echo")
    stack = stage.stack("echo", extra="[limits]\nmemory_bytes = 419430400\n")
    gateway = stack.start_gateway()
    relay = stack.start_relay("node-a", {"echo": echo}, "[limits]\nmemory_bytes = 419430400\n")
    stack.wait_for_relays("node-a")
    for _ in range(20):
        assert is_served(stack.doors["echo"])
    pids = (gateway.pid, relay.pid)
    before = [usage(pid) for pid in pids]
    crowd = ExitStack()
    with crowd:
        for number in range(count):
            client = crowd.enter_context(dial(stack.doors["echo"], 20, f"127.0.0.{2 + number % SOURCES}"))
            say(client, b"x")
            if number % 500 == 0:
                stage.show(f"{number} clients", number / count)
        full = [usage(pid) for pid in pids]
        time.sleep(stage.pick(2, 10))
        rested = [usage(pid) for pid in pids]
        outcome.add("idle clients", count)
        grown = sum(after.rss_bytes - first.rss_bytes for first, after in zip(before, full, strict=True))
        outcome.add("KiB each, both daemons", grown / count / KIB, f"≤ {stage.pick(12, 2)}")
        cpu_s = sum(after.cpu_s - first.cpu_s for first, after in zip(full, rested, strict=True))
        outcome.add("CPU of both, percent", 100 * cpu_s / stage.pick(2, 10), "≤ 4")
        outcome.add("new clients served of 50", sum(is_served(stack.doors["echo"]) for _ in range(50)), "= 50")
    began = time.monotonic()
    wait_until(lambda: all(usage(p).files <= b.files + 5 for p, b in zip(pids, before, strict=True)), 20, "descriptors given back")
    outcome.add("s until the descriptors are back", time.monotonic() - began, "≤ 5")


def stalled(stage: Stage, outcome: Outcome) -> None:
    """1,000 clients that ask for an endless file and never read (R5)."""
    count = stage.pick(100, 1_000)
    _, (source, echo) = stage.services("source", "echo")
    stack = stage.stack("source", "echo")
    gateway = stack.start_gateway()
    relay = stack.start_relay("node-a", {"source": source, "echo": echo})
    stack.wait_for_relays("node-a")
    before = {name: usage(daemon.pid).rss_bytes for name, daemon in (("gateway", gateway), ("relay", relay))}
    daemons: dict[str, Daemon] = {"gateway": gateway, "relay": relay}
    with ExitStack() as crowd:
        for _ in range(count):
            client = crowd.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * KIB)
            client.connect(("127.0.0.1", stack.doors["source"]))
        time.sleep(stage.pick(2, 10))
        outcome.add("stalled readers", count)
        for name, daemon in daemons.items():
            grown = usage(daemon.pid).rss_bytes - before[name]
            outcome.add(f"MiB that the {name} grew", grown / MIB, f"≤ {max(16.0, count * 77 / 1000):g}")
        cpu_s = usage(gateway.pid).cpu_s
        served = [served_again_s(stack.doors["echo"]) for _ in range(50)]
        outcome.add("ms until served, 50 other clients, longest", 1000 * max(served), f"≤ {stage.pick(5000, 250)}")
        outcome.add("gateway's CPU meanwhile, s", usage(gateway.pid).cpu_s - cpu_s)
        assert stack.live_relays()["node-a"]["state"] == "up"
    wait_until(lambda: not sum(link["streams"] for link in stack.live_relays()["node-a"]["links"]), 20, "no stream left")


DESCRIPTORS = Fault(
    "descriptors", "100 descriptors, 300 clients: who is there stays, tunnel and status work, all well 3 s later", descriptors
)
IDLE = Fault("idle", "10,000 idle clients: 2 KiB each, no CPU, new ones are served, descriptors come back", idle)
STALLED = Fault("stalled", "1,000 clients that never read: memory within 77 MiB in each daemon, others are served at once", stalled)
