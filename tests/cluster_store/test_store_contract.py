"""What every store does, asked of all of them."""

import itertools
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from store_rig import SYSTEM, Backend

from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Document, Present, Store
from fxrelay.cluster.sqlite_store import SqliteStore
from fxtunnel.errors import StoreError

pytestmark = SYSTEM

TEXTS = ["{}", "", "\0", 'a "quoted" \n line', "ä€😀", "x" * MAX_DOCUMENT_BYTES]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_was_put_is_found(backend: Backend, text: str) -> None:
    store, other = backend.store(), backend.store()
    clock = store.put("servers", "n1", text)
    assert other.get("servers", "n1") == Document("n1", text, clock)
    assert list(other.documents("servers")) == [Document("n1", text, clock)]
    assert other.get("controls", "n1") is None
    assert other.get("servers", "n2") is None


def test_a_document_is_replaced_and_deleted(backend: Backend) -> None:
    store = backend.store()
    first = store.put("servers", "n1", "one")
    second = store.put("servers", "n1", "two")
    assert second >= first
    assert [found.text for found in store.documents("servers")] == ["two"]
    store.delete("servers", "n1")
    store.delete("servers", "n1")
    assert store.get("servers", "n1") is None
    assert list(store.documents("servers")) == []


@pytest.mark.parametrize("key", ["a", "../x", "with space", "ä€😀", "0", "x" * 1024, "\0", "{a}b", "*"])
def test_any_text_is_a_key(backend: Backend, key: str) -> None:
    store = backend.store()
    store.put("servers", key, "it")
    found = store.get("servers", key)
    assert found is not None
    assert (found.key, found.text) == (key, "it")
    assert [each.key for each in store.documents("servers")] == [key]
    store.delete("servers", key)
    assert store.get("servers", key) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.put("servers", "n", "x" * (MAX_DOCUMENT_BYTES + 1)),
        lambda store: store.put("servers", "n", "ä" * (MAX_DOCUMENT_BYTES // 2 + 1)),
        lambda store: store.put("servers", "n", "\ud800"),
        lambda store: store.put("servers", "", "x"),
        lambda store: store.put("servers", "x" * 1025, "x"),
        lambda store: store.put("servers", "\udfff", "x"),
        lambda store: store.get("servers", "\udfff"),
        lambda store: store.put("se:rvers", "n", "x"),
        lambda store: store.put("", "n", "x"),
        lambda store: list(store.documents("../x")),
        lambda store: store.add("counter", 1 << 63),
    ],
)
def test_what_cannot_be_stored_is_refused(backend: Backend, call: Callable[[Store], object]) -> None:
    store = backend.store()
    store.put("servers", "before", "stays")
    with pytest.raises(StoreError) as caught:
        call(store)
    assert "\n" not in str(caught.value)
    assert [found.key for found in store.documents("servers")] == ["before"]


def test_the_clock_is_shared_and_goes_on(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    before = time.time() * 1000
    clocks = [store.now_ms(), other.put("servers", "n", "x"), other.now_ms(), store.put("servers", "n", "y"), store.now_ms()]
    assert clocks == sorted(clocks)
    assert before - 2_000 <= clocks[0] <= clocks[-1] <= time.time() * 1000 + 2_000


def test_an_epoch_is_the_same_for_all_while_nothing_is_forgotten(backend: Backend) -> None:
    store = backend.store()
    epoch = store.epoch()
    assert len(epoch) >= 32
    assert [store.epoch(), backend.store().epoch()] == [epoch, epoch]


def test_counters_count_for_all_members(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    assert [store.add("a", 1), other.add("a", 5), store.add("a", -7), other.add("a", 0), store.add("b", 2)] == [1, 6, -1, -1, 2]
    assert store.add("c", (1 << 63) - 1) == (1 << 63) - 1
    with pytest.raises(StoreError):
        store.add("c", 1)
    assert store.add("c", 0) == (1 << 63) - 1


def test_threads_and_members_at_once_lose_nothing(backend: Backend) -> None:
    stores = [backend.store(), backend.store()]
    per_worker = 25

    def work(number: int) -> list[int]:
        store = stores[number % 2]
        values = []
        for step in range(per_worker):
            store.put("servers", f"n{number}.{step}", str(step))
            store.put("servers", "shared", f"{number}.{step}")
            values.append(store.add("count", 1))
            assert store.get("servers", f"n{number}.{step}") is not None
            time.sleep(0.005)  # members that never pause can starve each other of an SQLite file's lock
        return values

    with ThreadPoolExecutor(6) as pool:
        values = list(itertools.chain.from_iterable(pool.map(work, range(6))))
    assert sorted(values) == list(range(1, 6 * per_worker + 1))
    assert len(list(stores[0].documents("servers"))) == 6 * per_worker + 1


def test_many_documents_come_in_parts_while_others_write(backend: Backend) -> None:
    """Advanced by one thread after the other; what is there all the time is seen exactly once."""
    store, other = backend.store(), backend.store()
    count = 10_500
    backend.fill("servers", {f"node{number:05}": f'{{"n":{number}}}' for number in range(count)})
    found = store.documents("servers")
    seen: list[Document] = []
    with ThreadPoolExecutor(2) as pool:
        while part := pool.submit(lambda: list(itertools.islice(found, 700))).result():
            seen += part
            other.put("servers", f"new{len(seen)}", "came meanwhile")
            other.put("servers", "node00001", '{"n":1}')
    keys = [document.key for document in seen if document.key.startswith("node")]
    assert len(keys) == count
    assert len(set(keys)) == count
    assert len({document.key for document in seen}) == len(seen)
    assert all(document.text == f'{{"n":{int(document.key[4:])}}}' for document in seen if document.key.startswith("node"))


def test_a_reader_that_stops_half_way_keeps_nobody_from_writing(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    backend.fill("servers", {f"n{number}": "x" for number in range(1_000)})
    found = store.documents("servers")
    next(found)
    other.put("servers", "n1", "y")
    other.delete("servers", "n2")
    assert len(list(found)) >= 997


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.epoch(),
        lambda store: store.now_ms(),
        lambda store: store.put("servers", "n", "x"),
        lambda store: store.get("servers", "n"),
        lambda store: store.delete("servers", "n"),
        lambda store: list(store.documents("servers")),
        lambda store: store.add("n", 1),
    ],
)
def test_a_closed_store_says_so(backend: Backend, call: Callable[[Store], object]) -> None:
    store = backend.store()
    store.put("servers", "n", "x")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        call(store)


def test_a_store_may_be_closed_before_it_was_used(backend: Backend) -> None:
    store = backend.store()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.now_ms()


def test_closing_ends_calls_under_way_with_a_store_error(backend: Backend) -> None:
    store = backend.store()
    started = threading.Barrier(5)
    ends: list[object] = []
    begun: set[int] = set()

    def work(number: int) -> None:
        started.wait()
        try:
            for step in range(100_000):
                store.put("servers", f"n{number}", str(step))
                begun.add(number)
        except BaseException as exc:
            ends.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    until = time.monotonic() + 20
    while len(begun) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 8
    for thread in threads:
        thread.join(20)
    assert [type(end) for end in ends] == [StoreError] * 4
    assert len(list(backend.store().documents("servers"))) == 4


def test_an_update_sees_what_is_there_and_counts_its_writes(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    before = store.now_ms()
    seen: list[Present] = []

    def change(present: Present) -> str:
        seen.append(present)
        return (present.text or "") + "x"

    first = store.update("reservations", "n1", change)
    assert (seen[-1].text, seen[-1].number, seen[-1].epoch) == (None, 1, store.epoch())
    assert (first.text, first.number) == ("x", 1)
    assert before <= first.now_ms <= other.now_ms()
    assert other.update("reservations", "n1", change).text == "xx"
    assert other.get("reservations", "n1") == Document("n1", "xx", seen[-1].now_ms)
    unchanged = store.update("reservations", "n1", lambda present: None)
    assert (unchanged.text, unchanged.number) == ("xx", 2)
    assert store.update("reservations", "n2", change).number == 1


def test_the_number_of_an_update_outlives_the_document(backend: Backend) -> None:
    store = backend.store()
    for _ in range(3):
        store.update("reservations", "n1", lambda present: "x")
    store.delete("reservations", "n1")
    assert store.update("reservations", "n1", lambda present: "y" if present.text is None else None).number == 4
    store.put("reservations", "n1", "z")
    assert store.update("reservations", "n1", lambda present: f"{present.text}{present.number}").text == "z5"


def test_an_update_that_raises_writes_nothing_and_the_store_goes_on(backend: Backend) -> None:
    store = backend.store()
    store.update("reservations", "n1", lambda present: "x")

    def fail(present: Present) -> str:
        raise KeyError("a rule's own error")

    with pytest.raises(KeyError):
        store.update("reservations", "n1", fail)
    with pytest.raises(StoreError):
        store.update("reservations", "n1", lambda present: "x" * (MAX_DOCUMENT_BYTES + 1))
    assert store.update("reservations", "n1", lambda present: None).number == 1
    assert store.update("reservations", "n1", lambda present: "y").text == "y"


def test_updates_of_many_threads_and_members_lose_nothing(backend: Backend) -> None:
    stores = [backend.store(), backend.store()]
    numbers: list[int] = []

    def work(worker: int) -> None:
        for _ in range(20):
            present = stores[worker % 2].update("reservations", "n", lambda present: str(int(present.text or 0) + 1))
            assert present.text == str(present.number)
            numbers.append(present.number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(numbers) == list(range(1, 81))


def test_an_update_goes_by_what_is_there_when_it_writes(backend: Backend) -> None:
    """What others did between looking and writing is not overwritten; where nobody can come between, the rule is asked once."""
    store, other = backend.store(), backend.store()
    if isinstance(store, SqliteStore):
        pytest.skip("a transaction lets nobody in between")
    asked: list[str | None] = []

    def change(present: Present) -> str:
        asked.append(present.text)
        if len(asked) == 1:
            other.put("reservations", "n", "theirs")
        return f"{present.text} and mine"

    assert store.update("reservations", "n", change).text == "theirs and mine"
    assert asked == [None, "theirs"]


def test_an_update_of_what_no_member_wrote_is_refused(backend: Backend) -> None:
    store = backend.store()
    store.now_ms()
    if isinstance(store, SqliteStore):
        with closing(sqlite3.connect(backend.path)) as database, database:
            database.execute("INSERT INTO documents (collection, key, body, updated_ms) VALUES ('reservations', ?, 7, 1)", (b"n",))
    else:
        store._client.ask(lambda redis: redis.hset("{fx-test}:c:reservations", "n", "no stamp"))
    with pytest.raises(StoreError, match=r"ours|written"):
        store.update("reservations", "n", lambda present: "x")


def test_what_was_read_is_removed_unless_it_was_written_again(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    store.put("servers", "n1", "ä")
    store.put("servers", "n2", "two")
    read = other.get("servers", "n1")
    assert read is not None
    time.sleep(0.005)
    store.put("servers", "n1", "ä")  # the same text, later: the node is back
    assert not other.delete_if_same("servers", read)
    assert not other.delete_if_same("servers", Document("n1", "b", read.updated_ms))
    assert not other.delete_if_same("servers", Document("gone", "ä", read.updated_ms))
    read = other.get("servers", "n1")
    assert read is not None
    assert not other.delete_if_same("controls", read)
    assert other.delete_if_same("servers", read)
    assert not store.delete_if_same("servers", read)
    assert [found.key for found in store.documents("servers")] == ["n2"]


def test_of_many_who_remove_one_document_one_does(backend: Backend) -> None:
    stores = [backend.store() for _ in range(4)]
    for turn in range(20):
        stores[0].put("servers", "n", str(turn))
        read = stores[0].get("servers", "n")
        assert read is not None
        with ThreadPoolExecutor(4) as pool:
            removed = list(pool.map(lambda store, read=read: store.delete_if_same("servers", read), stores))
        assert removed.count(True) == 1
