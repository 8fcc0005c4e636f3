"""Task: one relay's part in reservations as it runs in a relay, for `benchmarks.reservations`: logins made and ended as fast as they go.

With everything a relay does about them: worker threads, audit lines (to a file), news to the other relays, and theirs.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import trio

from fxrelay.balance.login_attempt import Attempt
from fxrelay.balance.reservations import Record
from fxrelay.cluster.broker import load_broker
from fxrelay.cluster.follow import FollowConfig, Follower
from fxrelay.cluster.members import Ages
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.leases import Hold, Leases, LeaseTerms
from fxrelay.reserving.reservations import NotEntered, Reservations, ReservingConfig
from fxtunnel.kit.logs import configure
from fxtunnel.model import RelayId

CLIENTS: Final = 24
SERVERS: Final = 300
LEASE_S: Final = 2.0
ALONE: Final = 1_200
"""Logins of the clients that log in to nothing."""


class Endings:
    """Waits for logins to be out of their records. Who takes them out says so: looking for them was up to a third of what was measured."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._events: dict[str, trio.Event] = {}
        self._ended = leases.ended
        vars(leases)["ended"] = self._tell

    def _tell(self, hold: Hold) -> None:
        self._ended(hold)
        event = self._events.pop(hold.login_id, None)
        if event is not None:
            event.set()

    async def wait(self, login_id: str) -> None:
        """Until this login has ended."""
        if not self._leases.is_ending(login_id):
            await trio.lowlevel.checkpoint()
            return
        await self._events.setdefault(login_id, trio.Event()).wait()


class Desk(Protocol):
    """Where clients log in and out."""

    async def take(self, server_id: RelayId, user: str, address: str, terms: LeaseTerms) -> Hold | NotEntered:
        """Log in."""

    def release(self, hold: Hold) -> None:
        """Log out."""


class NoDesk:
    """Lets everybody in at once: what is left is the clients' own work."""

    def __init__(self) -> None:
        self._hold = Hold(RelayId("server"), "nobody", Attempt("attempt"), LeaseTerms(), Record().token, 0, 0.0)

    async def take(self, server_id: RelayId, user: str, address: str, terms: LeaseTerms) -> Hold | NotEntered:
        """See `Desk`."""
        await trio.lowlevel.checkpoint()
        return self._hold

    def release(self, hold: Hold) -> None:
        """See `Desk`."""


async def keep_logging_in(desk: Desk, endings: Endings, name: str, client: int, goes_on: Callable[[], bool]) -> int:
    """Logins of one client, each made and ended before the next."""
    made = 0
    rng = random.Random(f"{name}-{client}")
    while goes_on():
        server = RelayId(f"server-{rng.randrange(SERVERS)}")
        hold = await desk.take(server, f"{name}-{client}", "192.0.2.1", LeaseTerms())
        if isinstance(hold, Hold):
            made += 1
            desk.release(hold)
            await endings.wait(hold.login_id)
    return made


async def clients_cpu_ms() -> float:
    """Milliseconds of processor time that the clients themselves take for a login."""
    left = iter(range(ALONE))
    endings, desk = Endings(Leases()), NoDesk()
    cpu_s = time.process_time()
    async with trio.open_nursery() as clients:
        for number in range(CLIENTS):
            clients.start_soon(keep_logging_in, desk, endings, "nobody", number, lambda: next(left, None) is not None)
    cpu_s = time.process_time() - cpu_s
    return 1e3 * cpu_s / ALONE


async def relay(broker: Path, name: str, seconds: float) -> tuple[int, float, float]:
    """Logins made and ended in that time, and this process' milliseconds of processor time for each; of these the clients' own."""
    log = (broker.parent / f"{name}.log").open("w")
    configure("info", "json", log)
    view = ClusterView(Ages())
    store, transporter = RedisStore(RedisClient(load_broker(broker))), RedisTransporter(RedisClient(load_broker(broker)))
    reservations = Reservations(ReservingConfig(RelayId(name), LEASE_S), store, transporter, view)
    endings = Endings(reservations.leases)
    counts: list[int] = []

    async def one(number: int) -> None:
        counts.append(await keep_logging_in(reservations, endings, name, number, lambda: time.perf_counter() < began + seconds))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Follower(store, transporter, view, Threads(), FollowConfig()).run)
        await nursery.start(reservations.run)
        while not isinstance(await reservations.take(RelayId(f"first-{name}"), name, "", LeaseTerms()), Hold):
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
    return sum(counts), 1e3 * cpu_s / max(1, sum(counts)), await clients_cpu_ms()
