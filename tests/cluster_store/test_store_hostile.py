"""A member that writes what it likes under our keys: others skip it or get a StoreError, and never anything else."""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_rig import NEEDS_REDIS, SYSTEM, RedisServer, redis_client

from fxrelay.cluster.content import MAX_KEY_BYTES
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, SERVERS, TOPICS, Document, Store
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxtunnel.errors import StoreError, TransporterError

pytestmark = SYSTEM
WHERE = "{fx-test}:c:servers"
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "cluster.db")
    store.put(SERVERS, "good", "x")
    yield store
    store.close()


@pytest.fixture
def redis_store(server: RedisServer) -> Iterator[RedisStore]:
    store = RedisStore(redis_client(server))
    store._client.ask(lambda redis: redis.flushall())
    store.put(SERVERS, "good", "x")
    yield store
    store.close()


def look(store: Store, key: str = "n") -> None:
    """Everything a reader does: only StoreErrors may come of it."""
    calls: tuple[Callable[[], Any], ...] = (
        lambda: store.get(SERVERS, key),
        lambda: list(store.documents(SERVERS)),
        lambda: store.add("n", 1),
        store.epoch,
        store.now_ms,
    )
    for call in calls:
        found: Any = None
        with contextlib.suppress(StoreError):
            found = call()
        for document in found if isinstance(found, list) else [found]:
            if isinstance(document, Document):
                assert len(document.text.encode()) <= MAX_DOCUMENT_BYTES
                assert 0 <= document.updated_ms <= 1 << 53


VALUES = st.one_of(
    st.none(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    st.binary(max_size=30),
)


@MANY
@given(rows=st.lists(st.tuples(VALUES, VALUES, VALUES, VALUES), max_size=5), facts=VALUES, counter=VALUES)
def test_any_rows_in_the_file(tmp_path: Path, rows: list[tuple[Any, ...]], facts: Any, counter: Any) -> None:
    path = tmp_path / "cluster.db"
    path.unlink(missing_ok=True)
    store = SqliteStore(path)
    store.put(SERVERS, "good", "x")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM facts")
        database.execute("INSERT OR IGNORE INTO facts VALUES ('epoch', ?)", (facts,))
        database.execute("INSERT OR IGNORE INTO counters VALUES (?, ?)", (b"n", counter))
        for collection, key, updated_ms, body in rows:
            for name in (collection, SERVERS):
                database.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", (name, key, updated_ms, body))
    look(store)
    assert "good" in {document.key for document in store.documents(SERVERS)}
    store.close()


def test_what_is_no_document_is_skipped_in_the_file(sqlite_store: SqliteStore, tmp_path: Path) -> None:
    rows: list[tuple[Any, Any, Any]] = [
        (b"long", 1, b"x" * (MAX_DOCUMENT_BYTES + 1)),
        (b"text", 1, "text"),
        (b"binary", 1, b"\xff"),
        (b"time", "soon", b"x"),
        (b"negative", -1, b"x"),
        (b"\xff", 1, b"x"),
        (b"", 1, b"x"),
        (b"k" * (MAX_KEY_BYTES + 1), 1, b"x"),
        ("text", 1, b"x"),
        (7, 1, b"x"),
    ]
    with closing(sqlite3.connect(tmp_path / "cluster.db")) as database, database:
        database.executemany("INSERT INTO documents (collection, key, updated_ms, body) VALUES ('servers', ?, ?, ?)", rows)
    assert [found.key for found in sqlite_store.documents(SERVERS)] == ["good"]
    assert sqlite_store.skipped == 6
    assert sqlite_store.get(SERVERS, "long") is None
    sqlite_store.put(SERVERS, "long", "short")
    assert {found.key for found in sqlite_store.documents(SERVERS)} == {"good", "long"}


@MANY
@given(rows=st.lists(st.tuples(VALUES, VALUES), max_size=5))
def test_any_messages_in_the_file(tmp_path: Path, rows: list[tuple[Any, Any]]) -> None:
    path = tmp_path / "cluster.db"
    path.unlink(missing_ok=True)
    transporter = SqliteTransporter(path)
    subscription = transporter.subscribe(TOPICS)
    with closing(sqlite3.connect(path)) as database, database:
        for topic, body in rows:
            for name in (topic, SERVERS):
                database.execute("INSERT INTO messages (sent_ms, topic, body) VALUES (?, ?, ?)", (topic or 1, name or 0, body or b""))
        database.execute("INSERT INTO messages (sent_ms, topic, body) VALUES (1, 'servers', CAST('last' AS BLOB))")
    heard = subscription.next_batch(0)
    assert heard[-1].text == "last"
    assert {message.topic for message in heard} <= set(TOPICS)
    transporter.close()


@pytest.mark.parametrize(
    "statement", ["INSERT INTO messages VALUES (9223372036854775807, 1, 'servers', x'')", "UPDATE sqlite_sequence SET seq = 'x'"]
)
def test_numbers_of_messages_that_are_not_ours(tmp_path: Path, statement: str) -> None:
    transporter = SqliteTransporter(tmp_path / "cluster.db")
    transporter.publish(SERVERS, "x")
    subscription = transporter.subscribe(TOPICS)
    with closing(sqlite3.connect(tmp_path / "cluster.db")) as database, database:
        database.execute(statement)
    with pytest.raises(TransporterError):
        subscription.next_batch(0)
    with contextlib.suppress(TransporterError):
        transporter.publish(SERVERS, "y")
    transporter.close()


@NEEDS_REDIS
@MANY
@given(
    entries=st.dictionaries(st.binary(max_size=20), st.one_of(st.binary(max_size=40), st.from_regex(rb"[0-9]{0,20}:.{0,5}")), max_size=5)
)
def test_any_entries_in_redis(redis_store: RedisStore, entries: dict[bytes, bytes]) -> None:
    redis_store._client.ask(lambda redis: redis.delete(WHERE))
    for key, value in entries.items():
        redis_store._client.ask(lambda redis, key=key, value=value: redis.hset(WHERE, key, value))
        look(redis_store, key.decode(errors="ignore") or "n")
    redis_store.put(SERVERS, "good", "x")
    assert "good" in {document.key for document in redis_store.documents(SERVERS)}


@NEEDS_REDIS
@pytest.mark.parametrize("command", [("SET", "x"), ("RPUSH", "x"), ("SADD", "x"), ("ZADD", "1", "x"), ("HSET", "n", "no number")])
def test_other_kinds_of_keys_in_redis(redis_store: RedisStore, command: tuple[str, ...]) -> None:
    for key in (WHERE, "{fx-test}:n", "{fx-test}:epoch"):
        redis_store._client.ask(lambda redis, key=key: redis.delete(key))
        redis_store._client.ask(lambda redis, key=key: redis.execute_command(command[0], key, *command[1:]))
    look(redis_store)


@NEEDS_REDIS
def test_what_is_no_document_is_skipped_in_redis(redis_store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[Any, Any] = {
        "long": b"1:" + b"x" * (MAX_DOCUMENT_BYTES + 100),
        "huge": b"1:" + b"x" * 50_000_000,
        "binary": b"1:\xff",
        "unstamped": b"x",
        "time": b"99999999999999999999:x",
        b"\xff": b"1:x",
        b"k" * (MAX_KEY_BYTES + 1): b"1:x",
        "": b"1:x",
    }
    redis_store._client.ask(lambda redis: redis.hset(WHERE, mapping=entries))
    answers: list[str] = []
    ask = redis_store._client.ask
    monkeypatch.setattr(redis_store._client, "ask", lambda call: (answer := ask(call), answers.append(repr(answer)))[0])
    assert [found.key for found in redis_store.documents(SERVERS)] == ["good"]
    assert redis_store.skipped == 8
    assert sum(map(len, answers)) < 10_000, "what is too long came to the reader"
    assert redis_store.get(SERVERS, "huge") is None
    redis_store.put(SERVERS, "huge", "small")
    assert {found.key for found in redis_store.documents(SERVERS)} == {"good", "huge"}


@NEEDS_REDIS
def test_patterns_and_replies_of_other_kinds_do_not_disturb_a_subscription(server: RedisServer) -> None:
    transporter = RedisTransporter(redis_client(server))
    subscription = transporter.subscribe(TOPICS)
    subscription._connection.send_command("PSUBSCRIBE", "*")
    subscription._connection.send_command("PING", "x")
    transporter.publish(SERVERS, "x")
    assert [message.text for message in subscription.next_batch(20)] == ["x"]
    transporter.close()
