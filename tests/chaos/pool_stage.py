"""Two relays with pools `desk` (swap) and `echo` on a store that they share, all of which can be killed, stopped and started again."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path

from fxtunnel.kit.certificates import new_authority
from tests.chaos.stage import Helper, Load, Stage, Unplayable
from tests.cluster_store.store_rig import REDIS, RedisServer, broker_content, plain, write_broker
from tests.ports import free_port
from tests.system.cluster import Cluster
from tests.system.peers import is_served
from tests.system.stack import wait_until

NODES = ("node-2", "node-3")
TIMES = "publish_s = 1\nstale_s = 8\ndown_s = 16\nresync_s = 2"


class Nodes:
    """The stage, set. `stores` has the line of each node's [cluster] that names the store."""

    def __init__(
        self, stage: Stage, stores: Mapping[str, str], gateway_extra: str = "", relay_extra: str = "", relay_prefix: tuple[str, ...] = ()
    ) -> None:
        self.stack = stage.straight("desk", "echo", extra=gateway_extra)
        self.stack.relay_prefix = relay_prefix
        self.stack.start_gateway()
        self.cluster = Cluster(self.stack, TIMES)
        echo_port = free_port()
        addresses = [f"127.0.0.{name.removeprefix('node-')}" for name in NODES]
        listens = [f"{a}:{self.cluster.port}=swap" for a in addresses] + [f"{a}:{echo_port}=echo" for a in addresses]
        self.services: Helper = stage.services(*listens)[0]
        for name, address in zip(NODES, addresses, strict=True):
            echo = f'[[service]]\nname = "echo"\nport = {echo_port}\nhost = "{address}"\n'
            self.cluster.node(int(name.removeprefix("node-")), serve=False, extra=f"{stores[name]}\n{echo}{relay_extra}")
        self.cluster.wait_until_known(NODES, NODES)
        self.stage = stage

    @property
    def echo(self) -> int:
        """The door of `echo`."""
        return self.stack.doors["echo"]

    def load(self, streams: int, rate_bytes_per_s: float, size_bytes: int = 1 << 20) -> Load:
        """Clients of `desk` that begin anew whenever they have ended."""
        return self.stage.load(
            self.stack.doors["desk"], streams, size_bytes=size_bytes, rate_bytes_per_s=rate_bytes_per_s, repeat=True, stuck_s=100.0
        )

    def is_ready(self) -> bool:
        """Whether everything is as it should be."""
        relays = self.stack.live_relays()
        up = all(name in relays and relays[name]["state"] == "up" for name in NODES)
        return up and is_served(self.echo) and all("fxrelay_store_up 1" in self.cluster.metrics(name) for name in NODES)


class Pools(Nodes):
    """On a Redis. Every part can be hurt by its name: a node's, "gateway" or "store"."""

    def __init__(self, stage: Stage, gateway_extra: str = "", relay_extra: str = "") -> None:
        self.redis = a_redis(stage)
        broker = write_broker(self.redis.directory, broker_content(self.redis))
        super().__init__(stage, dict.fromkeys(NODES, f'broker = "{broker}"'), gateway_extra, relay_extra)

    def kill(self, victim: str) -> float:
        """SIGKILL, started again at once; the seconds until all is ready: a new client served, relays up, the store in use."""
        began = time.monotonic()
        if victim == "store":
            self.redis.kill()
            self.redis.start()
        elif victim == "gateway":
            self.stack.gateway.kill()
            self.stack.start_gateway()
        else:
            self.stack.relays[victim].kill()
            self.stack.start_relay(victim)
        wait_until(self.is_ready, 60, f"ready after {victim} was killed")
        return time.monotonic() - began

    def stop_and_count(self, relay: str) -> int:
        """Stop a relay that is about to be killed: how many streams go with it, also those that it has not accepted."""
        self.signal(relay, signal.SIGSTOP)
        return sum(link["streams"] for link in self.stack.live_relays()[relay]["links"])

    def signal(self, victim: str, number: signal.Signals) -> None:
        """To the process of that name."""
        if victim == "store":
            self.redis.signal(number)
        elif victim == "gateway":
            self.stack.gateway.signal(number)
        else:
            self.stack.relays[victim].signal(number)


def a_redis(stage: Stage) -> RedisServer:
    """One that runs, until the stage is cleared."""
    if not Path(REDIS).exists():
        raise Unplayable("redis-server is not installed")
    redis = RedisServer(stage.directory / "redis", new_authority("chaos"), *plain())

    def end() -> None:
        if redis.process is not None and redis.process.poll() is None:
            redis.signal(signal.SIGCONT)
        redis.kill()

    stage.later(end)
    redis.start()
    return redis
