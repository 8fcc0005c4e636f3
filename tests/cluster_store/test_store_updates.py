"""Updates of many documents at once, and of two in one step, asked of all stores."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from store_rig import SYSTEM, Backend

from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Both, Document, Present, Store, Update
from fxrelay.cluster.sqlite_store import SqliteStore
from fxtunnel.errors import StoreError

pytestmark = SYSTEM


def test_several_updates_at_once_are_each_a_step_by_itself(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    store.update("reservations", "n1", lambda present: "old")

    def fail(present: Present) -> str:
        raise KeyError("a rule's own error")

    count = 200
    results = store.update_all(
        [
            Update("reservations", "n1", lambda present: f"{present.text}, new"),
            Update("reservations", "n2", fail),
            Update("reservations", "n3", lambda present: None),
            Update("reservations", "", lambda present: "x"),
            Update("reservations", "n4", lambda present: "x" * (MAX_DOCUMENT_BYTES + 1)),
            *(Update("reservations", f"m{number}", lambda present: str(present.number)) for number in range(count)),
        ]
    )
    kinds = [type(result) for result in results]
    assert kinds == [Present, KeyError, Present, StoreError, StoreError] + [Present] * count
    assert [(result.text, result.number) for result in results if isinstance(result, Present)][:2] == [("old, new", 2), (None, 0)]
    found = {document.key: document.text for document in other.documents("reservations")}
    assert found == {"n1": "old, new"} | {f"m{number}": "1" for number in range(count)}
    assert store.update_all([]) == []


def test_several_updates_of_one_document_follow_each_other(backend: Backend) -> None:
    store = backend.store()
    store.update("reservations", "n", lambda present: "0")
    results = store.update_all([Update("reservations", "n", lambda present: str(int(present.text or 0) + 1)) for _ in range(20)])
    assert sorted(result.number for result in results if isinstance(result, Present)) == list(range(2, 22))
    assert store.update("reservations", "n", lambda present: None).text == "20"


def test_batches_of_many_threads_and_members_lose_nothing(backend: Backend) -> None:
    stores = [backend.store(), backend.store()]

    def work(worker: int) -> None:
        for turn in range(10):
            updates = [
                Update("reservations", f"n{(worker + turn + place) % 5}", lambda present: str(int(present.text or 0) + 1))
                for place in range(3)
            ]
            for result in stores[worker % 2].update_all(updates):
                assert isinstance(result, Present), result
                assert result.text == str(result.number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sum(int(document.text) for document in stores[0].documents("reservations")) == 4 * 10 * 3


def test_two_documents_are_written_in_one_step(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    beside = ("users", "ann")
    seen: list[str | None] = []

    def change(text: str | Both | None) -> Callable[[Present], str | Both | None]:
        def changed(present: Present) -> str | Both | None:
            seen.append(present.beside)
            return text

        return changed

    def update(store: Store, text: str | Both | None) -> Present:
        (result,) = store.update_all([Update("reservations", "n", change(text), beside)])
        assert isinstance(result, Present)
        return result

    assert (update(store, Both("1", "first")).beside, seen[-1]) == ("first", None)
    assert other.get("users", "ann") == Document("ann", "first", other.get("reservations", "n").updated_ms)
    assert (update(other, "2").beside, seen[-1]) == ("first", "first")
    assert (update(store, Both("3", "second")).number, seen[-1]) == (3, "first")
    assert (update(other, None).text, seen[-1]) == ("3", "second")
    assert (update(store, Both("4", None)).beside, seen[-1]) == (None, "second")
    assert other.get("users", "ann") is None
    assert (update(other, Both("5", None)).text, seen[-1]) == ("5", None)
    assert (update(store, Both("6", "third")).text, other.get("users", "ann").text) == ("6", "third")


def test_an_update_goes_by_the_second_document_as_it_is_when_it_writes(backend: Backend) -> None:
    store, other = backend.store(), backend.store()
    if isinstance(store, SqliteStore):
        pytest.skip("a transaction lets nobody in between")
    asked: list[str | None] = []

    def change(present: Present) -> Both:
        asked.append(present.beside)
        if len(asked) in (1, 2):
            other.put("users", "ann", f"theirs {len(asked)}")
        return Both("mine", f"{present.beside} and mine")

    (result,) = store.update_all([Update("reservations", "n", change, ("users", "ann"))])
    assert isinstance(result, Present)
    assert (result.beside, asked) == ("theirs 2 and mine", [None, "theirs 1", "theirs 2"])
    (result,) = store.update_all([Update("reservations", "n", lambda present: Both("more", present.beside), ("users", "ann"))])
    assert isinstance(result, Present)
    assert (result.beside, result.number) == ("theirs 2 and mine", 2)
    other.delete("users", "ann")
    (result,) = store.update_all([Update("reservations", "n", lambda present: Both("most", present.beside), ("users", "ann"))])
    assert isinstance(result, Present)
    assert (result.text, result.beside) == ("most", None)


def test_a_second_document_that_no_member_wrote_counts_as_nothing_and_is_written_over(backend: Backend) -> None:
    store = backend.store()
    store.now_ms()
    if isinstance(store, SqliteStore):
        with closing(sqlite3.connect(backend.path)) as database, database:
            database.execute("INSERT INTO documents (collection, key, body, updated_ms) VALUES ('users', ?, 7, 1)", (b"ann",))
    else:
        store._client.ask(lambda redis: redis.hset("{fx-test}:c:users", "ann", "no stamp"))
    (result,) = store.update_all([Update("reservations", "n", lambda present: Both("x", f"{present.beside}!"), ("users", "ann"))])
    assert isinstance(result, Present)
    assert result.beside == "None!"
    assert store.get("users", "ann").text == "None!"


def test_updates_of_a_closed_store_say_so(backend: Backend) -> None:
    store = backend.store()
    store.now_ms()
    store.close()
    results = store.update_all([Update("reservations", "n", lambda present: "x"), Update("reservations", "m", lambda present: "x")])
    assert [type(result) for result in results] == [StoreError, StoreError]
    assert all("was closed" in str(result) for result in results)
