"""R10: an exception at every await of what a relay does for its reservations. Logins come in and end as before, and no server is left."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from cluster_fakes import NoThreads
from sabotage import FAULTS, Fault, lines_about, sabotage

from fxrelay.cluster.members import Ages
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.cluster.view import ClusterView
from fxrelay.reserving.leases import Hold, LeaseTerms
from fxrelay.reserving.reservation_cache import ReservingConfig
from fxrelay.reserving.reservations import Reservations
from fxtunnel.model import RelayId

SERVERS = [RelayId(f"s{number}") for number in range(4)]
LEASE_S = 3.0
"""Longer than a loop pauses after a fault."""
WAITS = 24
"""After so many each of the loops has been round."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / "cluster.db")
    yield made
    made.close()


@pytest.fixture
def transporter(tmp_path: Path, store: SqliteStore) -> Iterator[SqliteTransporter]:
    made = SqliteTransporter(tmp_path / "cluster.db")
    yield made
    made.close()


async def taken(reservations: Reservations, server: RelayId, user: str) -> Hold:
    """Take, again and again, until it is granted."""
    with trio.fail_after(60):
        while True:
            answer = await reservations.take(server, user, "192.0.2.1", LeaseTerms())
            if isinstance(answer, Hold):
                return answer
            await trio.sleep(0.05)


async def ended(reservations: Reservations) -> None:
    """Until every login that was released is out of its record."""
    with trio.fail_after(30):
        while reservations.leases.has_ending:
            await trio.sleep(0.05)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault()).__name__)
async def test_logins_come_and_go_on(
    autojump_clock: object,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    store: SqliteStore,
    transporter: SqliteTransporter,
    fault: Fault,
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr("fxrelay.reserving.reservation_cache.Threads", NoThreads)
    monkeypatch.setattr("fxrelay.cluster.sqlite_store._now_ms", lambda: int(1_000_000_000_000 + trio.current_time() * 1000))
    config = ReservingConfig(RelayId("a"), LEASE_S, on_lost_lease="end")
    hits = 0
    for nth in range(1, WAITS):
        reservations = Reservations(config, store, transporter, ClusterView(Ages(), trio.current_time))
        reservations.leases._monotonic = trio.current_time
        with sabotage(nth, "keep_going", faults=[fault]) as done:
            async with trio.open_nursery() as nursery:
                await nursery.start(reservations.run)
                for user in ("ann", "bob"):
                    holds = [await taken(reservations, server, user) for server in SERVERS]
                    await trio.sleep(LEASE_S)
                    assert not any(hold.is_lost for hold in holds), [tree.where for tree in done.hit]
                    for hold in holds:
                        reservations.release(hold)
                    await ended(reservations)
                    assert not any(hold.lock.locked() for hold in holds), [tree.where for tree in done.hit]
                nursery.cancel_scope.cancel()
        assert not reservations.leases.holds()
        hits += len(done.hit)
        for tree in done.hit:
            (line,) = lines_about(tree.fault, caplog)
            assert "begins again" in line.getMessage()
        caplog.clear()
    assert hits > 60
