"""Task: one relay's part in reservations as it runs in a relay, for `benchmarks.reservations`: logins made and ended as fast as they go.

With everything a relay does about them: worker threads, audit lines (to a file), news to the other relays, and theirs.
"""

import random
import time
from pathlib import Path
from typing import Final

import trio

from fxrelay.cluster.broker import load_broker
from fxrelay.cluster.follow import FollowConfig, Follower
from fxrelay.cluster.members import Ages
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.leases import Hold, Terms
from fxrelay.reserving.reservations import Reservations, ReservingConfig
from fxtunnel.kit.logs import configure
from fxtunnel.model import RelayId

CLIENTS: Final = 24
SERVERS: Final = 300
LEASE_S: Final = 2.0


async def keep_logging_in(reservations: Reservations, name: str, client: int, ends: float) -> int:
    """Logins of one client, each made and ended before the next."""
    made = 0
    rng = random.Random(f"{name}-{client}")
    while time.perf_counter() < ends:
        server = RelayId(f"server-{rng.randrange(SERVERS)}")
        hold = await reservations.take(server, f"{name}-{client}", "192.0.2.1", Terms())
        if isinstance(hold, Hold):
            made += 1
            reservations.release(hold)
            while reservations.leases.is_ending(hold.login_id):
                await trio.sleep(0.01)
    return made


async def relay(broker: Path, name: str, seconds: float) -> tuple[int, float]:
    """Logins made and ended in that time, and this process' milliseconds of processor time for each."""
    log = (broker.parent / f"{name}.log").open("w")
    configure("info", "json", log)
    view = ClusterView(Ages())
    store, transporter = RedisStore(RedisClient(load_broker(broker))), RedisTransporter(RedisClient(load_broker(broker)))
    reservations = Reservations(ReservingConfig(RelayId(name), LEASE_S), store, transporter, view)
    counts: list[int] = []

    async def one(number: int) -> None:
        counts.append(await keep_logging_in(reservations, name, number, began + seconds))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Follower(store, transporter, view, Threads(), FollowConfig()).run)
        await nursery.start(reservations.run)
        while not isinstance(await reservations.take(RelayId(f"first-{name}"), name, "", Terms()), Hold):
            await trio.sleep(0.1)
        began, cpu_s = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as clients:
            for number in range(CLIENTS):
                clients.start_soon(one, number)
        cpu_s = time.process_time() - cpu_s
        nursery.cancel_scope.cancel()
    store.close()
    transporter.close()
    configure("error", "json")
    log.close()
    return sum(counts), 1e3 * cpu_s / max(1, sum(counts))
