"""Used tickets in real stores: one use among all relays, and what a Redis that forgot everything is taken for."""

import time
from collections.abc import Callable

import pytest
import trio
from store_rig import NEEDS_REDIS, SYSTEM, Backend, RedisServer, plain, redis_client

from fxrelay.admitting.memory import SharedMemory, Use
from fxrelay.admitting.ticket import Ticket
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.threads import Threads

pytestmark = SYSTEM
RELAYS, TICKETS = 3, 24


def ticket(number: int, issued_s: float = 60.0) -> Ticket:
    now = int(time.time())
    # Two of them share a part of the store each, so that relays get in each other's way.
    return Ticket("alice", (), None, f"{number // 2:02x}{number:030x}", int(now + issued_s), now + 120)


async def test_each_ticket_lets_in_once_among_all_relays(backend: Backend) -> None:
    memories = [SharedMemory(backend.store(), Threads()) for _ in range(RELAYS)]
    uses: list[list[Use]] = [[] for _ in range(TICKETS)]

    async def show(memory: SharedMemory, number: int) -> None:
        uses[number].append(await memory.spend(ticket(number)))

    with trio.fail_after(60):
        for start in range(0, TICKETS, 4):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 4):
                    for memory in memories:
                        nursery.start_soon(show, memory, number)
    assert [sorted(found, key=lambda use: use.value) for found in uses] == [[Use.AGAIN, Use.AGAIN, Use.FIRST]] * TICKETS


async def test_a_ticket_that_is_given_back_lets_in_at_another_relay(backend: Backend) -> None:
    first, second = (SharedMemory(backend.store(), Threads()) for _ in range(2))
    assert await first.spend(ticket(1)) is Use.FIRST
    await first.give_back(ticket(1))
    assert await second.spend(ticket(1)) is Use.FIRST
    assert await first.spend(ticket(1)) is Use.AGAIN


@NEEDS_REDIS
@pytest.mark.parametrize("how", ["killed", "flushed"])
async def test_a_redis_that_forgot_takes_no_tickets_from_before(make_server: Callable[..., RedisServer], how: str) -> None:
    server = make_server(*plain())
    client = redis_client(server)
    store = RedisStore(client)
    memory, other = (SharedMemory(store, Threads()) for _ in range(2))
    for number, each in enumerate((memory, other)):
        assert await each.spend(ticket(100 + number, 0)) is Use.FIRST
    assert await memory.spend(ticket(7, 0)) is Use.FIRST
    if how == "killed":
        server.kill()
        server.start()
    else:
        client.ask(lambda redis: redis.flushall())
    # The other relay does not remember it, and the store neither.
    assert await other.spend(ticket(7, 0)) in (Use.FORGOTTEN, Use.UNKNOWABLE)
    assert await other.spend(ticket(7, 0)) in (Use.FORGOTTEN, Use.UNKNOWABLE, Use.AGAIN)
    fresh = iter(range(200, 500))
    with trio.fail_after(20):
        while await other.spend(ticket(next(fresh))) is not Use.FIRST:
            await trio.sleep(0.1)
    store.close()
