"""One ticket, one stream: what a relay remembers, what the relays of a cluster do, and what happens when the store fails them."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.admitting.memory import SharedMemory, Use
from fxrelay.admitting.spent import MAX_IN_BUCKET, SpentHere, bucket_of, give_back_in, read_bucket, spend_in
from fxrelay.admitting.ticket import Ticket
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, TICKETS, Change, Present
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.cluster.threads import Threads
from fxtunnel.errors import StoreError

NOW = 1_700_000_000
IDS = st.text("0123456789abcdef", min_size=32, max_size=32)


def ticket(number: int = 0, issued: int = NOW + 1, expires: int = NOW + 71) -> Ticket:
    return Ticket("alice", (), None, f"{number:032x}", issued, expires)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


class FakeStore:
    """`update` of a store, in memory. `fails`: it does not answer; `hangs`: not soon."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, str], str] = {}
        self.now_unix = NOW
        self.memory = "one"
        self.fails = False
        self.hangs: threading.Event | None = None
        self.number = 0

    def update(self, collection: str, key: str, change: Change) -> Present:
        if self.hangs is not None:
            self.hangs.wait(10)
        if self.fails:
            raise StoreError("the store is away")
        self.number += 1
        present = Present(self.texts.get((collection, key)), self.number, self.now_unix * 1000, self.memory)
        text = change(present)
        if text is not None:
            self.texts[collection, key] = text
        return present


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def memory_of(store: object, clock: Clock | None = None, threads: Threads | None = None) -> SharedMemory:
    return SharedMemory(store, threads or Threads(), clock=clock or Clock())  # a fake clock


async def spend(memory: SharedMemory, *numbers: int) -> list[Use]:
    return [await memory.spend(ticket(number)) for number in numbers]


async def test_a_ticket_is_used_once(store: FakeStore) -> None:
    assert await spend(memory_of(store), 1, 2, 1) == [Use.FIRST, Use.FIRST, Use.AGAIN]


async def test_another_relay_knows_it(store: FakeStore) -> None:
    first, second = memory_of(store), memory_of(store)
    assert await spend(first, 1) == [Use.FIRST]
    assert await spend(second, 1, 2) == [Use.AGAIN, Use.FIRST]
    assert await spend(first, 2) == [Use.AGAIN]


async def test_what_is_given_back_is_as_if_it_had_not_been_shown(store: FakeStore) -> None:
    first, second = memory_of(store), memory_of(store)
    assert await spend(first, 1) == [Use.FIRST]
    await first.give_back(ticket(1))
    assert await spend(second, 1) == [Use.FIRST]
    assert await spend(first, 1) == [Use.AGAIN]


async def test_before_the_beginning_nothing_is_known(store: FakeStore) -> None:
    memory = memory_of(store)
    assert await memory.spend(ticket(1, issued=NOW - 1)) is Use.FORGOTTEN
    assert await memory.spend(ticket(1, issued=NOW)) is Use.FIRST


async def test_the_store_is_away(store: FakeStore) -> None:
    store.fails = True
    memory = memory_of(store)
    assert await spend(memory, 1, 1, 2) == [Use.UNKNOWABLE] * 3
    assert [memory.spend_here(ticket(2)), memory.spend_here(ticket(2))] == [Use.FIRST, Use.AGAIN]
    store.fails = False
    assert await spend(memory, 1, 2) == [Use.FIRST, Use.AGAIN]


async def test_a_store_that_hangs_holds_nobody_up_for_long(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.admitting.memory.STORE_TIMEOUT_S", 0.05)
    store.hangs = threading.Event()
    doubts: list[None] = []
    with trio.fail_after(5):
        assert await spend(memory_of(store, threads=Threads(lambda: doubts.append(None))), 1) == [Use.UNKNOWABLE]
    assert len(doubts) == 1
    store.hangs.set()


async def test_nobody_waits_for_a_store_that_is_known_to_be_away(store: FakeStore) -> None:
    away = [True]
    memory = SharedMemory(store, Threads(), lambda: away[0], Clock())  # a fake clock
    assert await spend(memory, 1, 1) == [Use.UNKNOWABLE] * 2
    assert store.number == 0
    away[0] = False
    assert await spend(memory, 1, 1) == [Use.FIRST, Use.AGAIN]
    away[0] = True
    assert await spend(memory, 1) == [Use.AGAIN]  # that can be told without the store


async def test_a_store_that_lost_its_memory_is_noticed(store: FakeStore) -> None:
    clock = Clock()
    memory = memory_of(store, clock)
    assert await spend(memory, 1) == [Use.FIRST]
    store.texts.clear()
    store.memory = "two"
    clock.now += 5
    # Whoever comes first finds it out, and is refused as all from before are; the others' tickets were made before as well.
    assert await spend(memory, 2, 3) == [Use.FORGOTTEN, Use.FORGOTTEN]
    assert await memory.spend(ticket(4, issued=NOW + 6)) is Use.FIRST


async def test_all_relays_of_a_machine_share_a_file(tmp_path: Path) -> None:
    stores = [SqliteStore(tmp_path / "cluster.db") for _ in range(3)]
    memories = [memory_of(store) for store in stores]
    numbers, uses = range(20), {number: [] for number in range(20)}

    async def hammer(memory: SharedMemory) -> None:
        for number in numbers:
            now_unix = stores[0].now_ms() // 1000
            use = await memory.spend(ticket(number << 8, expires=now_unix + 60))
            uses[number].append(use)

    try:
        async with trio.open_nursery() as nursery:
            for memory in memories:
                nursery.start_soon(hammer, memory)
        assert [found.count(Use.FIRST) for found in uses.values()] == [1] * len(numbers)
        assert [found.count(Use.AGAIN) for found in uses.values()] == [2] * len(numbers)
        assert stores[0].get(TICKETS, bucket_of(ticket(0).use_id)) is not None
    finally:
        for store in stores:
            store.close()


def test_this_relays_memory_is_bounded_and_forgets_what_has_expired() -> None:
    spent = SpentHere(limit=3)
    assert [spent.spend(f"{n}", NOW + n, NOW) for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert not spent.spend("1", NOW + 1, NOW + 1)
    assert spent.spend("5", NOW + 9, NOW + 2.5)
    assert len(spent) == 2
    spent.give_back("5")
    spent.give_back("unknown")
    assert spent.spend("5", NOW + 9, NOW + 2.5)


def test_a_bucket_is_bounded_and_fits_the_store() -> None:
    text: str | None = None
    for number in range(MAX_IN_BUCKET):
        text = spend_in(text, f"{number:032x}", (NOW + 60) * 1000, NOW * 1000)
        assert text is not None
    assert len(text or "") < MAX_DOCUMENT_BYTES
    assert spend_in(text, "f" * 32, (NOW + 60) * 1000, NOW * 1000) is None
    assert spend_in(text, "f" * 32, (NOW + 99) * 1000, (NOW + 61) * 1000) == json.dumps({"f" * 32: (NOW + 99) * 1000}).replace(" ", "")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_a_bucket_does_what_a_set_with_expiry_would(steps: list[tuple[bool, int, int]]) -> None:
    text, model, now = None, {}, 0
    for is_use, number, wait in steps:
        now += wait
        model = {use_id: ms for use_id, ms in model.items() if ms >= now}
        use_id = f"{number:032x}"
        if is_use:
            found = spend_in(text, use_id, now + 10, now)
            assert (found is None) == (use_id in model)
            model.setdefault(use_id, now + 10)
        else:
            found = give_back_in(text, use_id, now)
            assert (found is None) == (use_id not in model)
            model.pop(use_id, None)
        text = found if found is not None else text
        assert read_bucket(text, now) == model


HOSTILE = ["", "[]", "null", "1", '{"a":1}', '{"' + "0" * 32 + '":"x"}', '{"' + "0" * 32 + '":1e999}', "[" * 100_000, "\ud800"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_bucket_that_somebody_else_wrote(text: str) -> None:
    assert read_bucket(text, 0) == {}
    assert spend_in(text, "f" * 32, 10, 0) == '{"' + "f" * 32 + '":10}'


@given(st.text())
def test_any_bucket_can_be_read(text: str) -> None:
    assert isinstance(read_bucket(text, 0), dict)


@pytest.fixture(autouse=True)
def _no_thread_is_left(store: FakeStore) -> Iterator[None]:
    yield
    if store.hangs is not None:
        store.hangs.set()
