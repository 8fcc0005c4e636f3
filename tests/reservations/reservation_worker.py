"""One relay's reservations in a process of its own, with clients that log in and out at random; everything is written down.

    python -m tests.reservations.reservation_worker CONFIG.json

Lines of the log, times on the machine's monotonic clock:
    ask   user server t                     somebody wants in
    in    user server fence epoch call t    somebody was let in
    no    user server reason holder call t  somebody was not
    out   user server t                     about to log out
    lost  user server t                     was told that the server is somebody else's
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import trio

from fxrelay.cluster.broker import load_broker
from fxrelay.cluster.follow import FollowConfig, Follower
from fxrelay.cluster.members import Ages
from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView, NullListener
from fxrelay.reserving.leases import LeaseTerms
from fxrelay.reserving.reservation_cache import ReservingConfig
from fxrelay.reserving.reservations import NotEntered, Reservations
from fxtunnel.model import RelayId


def open_both(config: dict[str, Any]) -> tuple[Store, Transporter]:
    if "sqlite" in config:
        return SqliteStore(Path(config["sqlite"])), SqliteTransporter(Path(config["sqlite"]))
    broker = load_broker(Path(config["broker"]))
    return RedisStore(RedisClient(broker)), RedisTransporter(RedisClient(broker))


class Worker(NullListener):
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.store, transporter = open_both(config)
        self.view = ClusterView(Ages(), listener=self)
        self.follower = Follower(self.store, transporter, self.view, Threads(), FollowConfig(resync_s=5, max_backoff_s=0.5))
        reserving = ReservingConfig(RelayId(config["relay"]), config["lease_s"])
        self.reservations = Reservations(reserving, self.store, transporter, self.view)
        self.log = os.open(config["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.rng = random.Random()

    def ask_store(self) -> None:
        self.follower.ask_store()

    def hear_reservation(self, text: str) -> bool:
        return self.reservations.hear(text)

    def write(self, event: str, **fields: Any) -> None:
        os.write(self.log, (json.dumps({"event": event, "relay": self.config["relay"], "t": time.monotonic(), **fields}) + "\n").encode())

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.follower.run)
            await nursery.start(self.reservations.run)
            for number in range(self.config["clients"]):
                nursery.start_soon(self.client, f"{self.config['relay']}-user{number}")

    async def client(self, user: str) -> None:
        servers = [RelayId(name) for name in self.config["servers"]]
        while True:
            await trio.sleep(self.rng.uniform(0, self.config["pause_s"]))
            # Half of them choose by what they know, as a balancer does; the others come with a list that is old.
            taken = self.reservations.holders.users(self.view.now_ms)
            free = [server for server in servers if server not in taken]
            server = self.rng.choice(free if free and self.rng.random() < 0.5 else servers)
            call = time.monotonic()
            self.write("ask", user=user, server=server)
            answer = await self.reservations.take(server, user, "192.0.2.1", LeaseTerms())
            if isinstance(answer, NotEntered):
                self.write("no", user=user, server=server, reason=str(answer.reason), holder=answer.holder, call=call)
                await trio.sleep(0.5 if answer.is_final else 0)
                continue
            is_lost = trio.Event()

            def lost(server: str = server, is_lost: trio.Event = is_lost) -> None:
                self.write("lost", user=user, server=server)
                is_lost.set()

            self.write("in", user=user, server=server, fence=answer.token.fence, epoch=answer.token.epoch, call=call)
            answer.watch(lost)
            with trio.move_on_after(self.rng.uniform(0, self.config["stay_s"])):
                await is_lost.wait()
            if not is_lost.is_set():
                self.write("out", user=user, server=server)
                answer.on_lost.clear()
                self.reservations.release(answer)


if __name__ == "__main__":
    trio.run(Worker(json.loads(Path(sys.argv[1]).read_text())).run)
