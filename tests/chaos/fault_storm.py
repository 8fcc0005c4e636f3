"""The gateway restarts, and two thousand relays come back at once."""

import json
import threading
import time
from dataclasses import asdict, dataclass, field

from tests.chaos.figures import Outcome
from tests.chaos.relays import Order, name_of, record_of
from tests.chaos.stage import Fault, Helper, Stage, served_again_s, usage
from tests.system.stack import Stack, wait_until

PROCESSES = 2
PENDING = 512


@dataclass
class Watch:
    """Looks at the gateway all the time: what it holds, and whether it answers."""

    stack: Stack
    most_files: int = 0
    most_rss_bytes: int = 0
    slowest_s: float = 0.0
    is_over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run)
        thread.start()
        return thread

    def _run(self) -> None:
        while not self.is_over.wait(0.2):
            began = time.monotonic()
            if self.stack.page("/healthz"):
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            now = usage(self.stack.gateway.pid)
            self.most_files, self.most_rss_bytes = max(self.most_files, now.files), max(self.most_rss_bytes, now.rss_bytes)


def storm(stage: Stage, outcome: Outcome, sources: int = 250) -> None:
    """`sources` addresses, as if they sat in that many places."""
    count = stage.pick(100, 2_000)
    _, (echo,) = stage.services("echo")
    stack = stage.stack("echo")
    identities = stack.directory / "relays.json"
    known = json.loads(identities.read_text())
    known["relays"] = {name_of(number): record_of(name_of(number)) for number in range(count)}
    identities.write_text(json.dumps(known))
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo})
    file = str(stack.directory / "gateway.json")
    each = count // PROCESSES
    crowds: list[Helper] = []
    for number in range(PROCESSES):
        order = Order(file, stack.tunnel_port, number * each, each, sources)
        crowds.append(Helper([json.dumps(asdict(order))], stage.directory / "sim.log", "tests.chaos.relays"))
        stage.later(crowds[-1].close)

    def all_back(show_at: float) -> bool:
        up = sum(crowd.ask()["up"] for crowd in crowds)
        stage.show(f"{up} of {count} relays", show_at + 0.5 * up / count)
        return up == count

    began = time.monotonic()
    wait_until(lambda: all_back(0.0), 170, f"{count} relays up: {[crowd.ask() for crowd in crowds]}")
    outcome.add("relays", count)
    outcome.add("s until all are up, the first time", time.monotonic() - began, "≤ 60")
    outcome.add("ms of the gateway's CPU for each until then", 1000 * usage(stack.gateway.pid).cpu_s / count)
    outcome.add("ms of the simulated relays' own", 1000 * cpu_of(crowds) / count)
    time.sleep(stage.pick(2, 5))
    before = usage(stack.gateway.pid)
    idle_s = stage.pick(2, 10)
    time.sleep(idle_s)
    outcome.add("gateway's CPU with idle relays, percent", 100 * (usage(stack.gateway.pid).cpu_s - before.cpu_s) / idle_s)
    stack.gateway.kill()
    relays_cpu_s = cpu_of(crowds)
    began = time.monotonic()
    stack.start_gateway()
    ready_s = time.monotonic() - began
    watch = Watch(stack)
    thread = watch.start()
    try:
        outcome.add("s until a client of a relay among them is served", served_again_s(stack.doors["echo"]), "≤ 60")
        wait_until(lambda: all_back(0.5), 170, "all relays back")
    finally:
        watch.is_over.set()
        thread.join()
    outcome.add("s until all are back, the gateway's start included", time.monotonic() - began, "≤ 60")
    outcome.add("of which its start", ready_s)
    outcome.add("ms of the gateway's CPU for each, its start included", 1000 * usage(stack.gateway.pid).cpu_s / count)
    outcome.add("ms of the simulated relays' own, after the restart", 1000 * (cpu_of(crowds) - relays_cpu_s) / count)
    outcome.add("told to come again, before TLS", told_to_come_again(stack))
    outcome.add("files of the gateway, most", watch.most_files, f"≤ {2 * count + PENDING + 100}")
    outcome.add("files of each relay that is up", usage(stack.gateway.pid).files / count)
    outcome.add("MiB of the gateway, most", watch.most_rss_bytes / 2**20)
    outcome.add("s for /healthz meanwhile, longest", watch.slowest_s, "≤ 2")
    log = (stack.directory / "gateway.log").read_text()
    outcome.add("log lines about strangers who made room", log.count("made room for newer"))
    outcome.add("relays that gave up", sum(len(crowd.ask()["failures"]) for crowd in crowds), "= 0")


def cpu_of(crowds: list[Helper]) -> float:
    """Seconds that simulated relays have used."""
    return sum(usage(crowd.process.pid).cpu_s for crowd in crowds)


def told_to_come_again(stack: Stack) -> int:
    """As the gateway counts them."""
    lines = stack.page("/metrics").splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("fxgateway_relays_refused_total") and '"busy"' in line)


STORM = Fault("storm", "2,000 relays dial a gateway that has restarted: all back in 60 s, what waits is bounded", storm)
NAT_STORM = Fault("nat-storm", "the same from one address, as behind a NAT", lambda stage, outcome: storm(stage, outcome, sources=1))
