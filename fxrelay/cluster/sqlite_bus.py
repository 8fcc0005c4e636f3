"""Task: how the relays of one machine tell each other of changes: a table of messages in their SQLite file. Blocking: for worker threads.

A look costs a few microseconds while nothing was written (PRAGMA data_version), so everyone looks five times a second.
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from fxrelay.cluster.content import MAX_BATCH, MAX_BATCH_BYTES, decode_text, encode_collection, encode_text
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Message
from fxrelay.cluster.sqlite_file import SqliteFile
from fxrelay.cluster.subscribers import Subscribers
from fxtunnel.errors import StoreError, TransporterError

T = TypeVar("T")

POLL_S: Final = 0.2
KEPT_MS: Final = 60_000
MAX_KEPT: Final = 20_000
"""Messages; a member that never stops talking must not fill the disk."""
_CLEAN_S: Final = 5.0
_ADD: Final = "INSERT INTO messages (sent_ms, topic, body) VALUES (?, ?, ?)"
_NEW: Final = """
SELECT id, CASE WHEN typeof(topic) = 'text' THEN CAST(substr(topic, 1, 65) AS BLOB) END,
CASE WHEN typeof(body) = 'blob' AND length(body) <= ? THEN body END
FROM messages WHERE id > ? ORDER BY id LIMIT ?
"""


class SqliteTransporter:
    """`Transporter` in an SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = SqliteFile(path)
        self._clean_at = 0.0
        self._subscribers = Subscribers[SqliteSubscription](str(path))

    def publish(self, topic: str, *texts: str) -> None:
        """Tell everyone who listens. Raises TransporterError: nobody was told."""

        def write(database: sqlite3.Connection) -> None:
            now_ms = time.time_ns() // 1_000_000
            database.execute("BEGIN IMMEDIATE")
            sent = 0
            for body in bodies:
                sent = database.execute(_ADD, (now_ms, name, body)).lastrowid or 0
            if time.monotonic() >= self._clean_at:
                # A clock that was set back must not make messages eternal.
                database.execute(
                    "DELETE FROM messages WHERE id <= ? OR sent_ms NOT BETWEEN ? AND ?",
                    (sent - MAX_KEPT, now_ms - KEPT_MS, now_ms + KEPT_MS),
                )
                self._clean_at = time.monotonic() + _CLEAN_S
            database.execute("COMMIT")

        try:
            name, bodies = encode_collection(topic), [encode_text(text) for text in texts]
            self._file.run(write)
        except StoreError as exc:
            raise TransporterError(str(exc)) from exc

    def subscribe(self, topics: tuple[str, ...]) -> "SqliteSubscription":
        """Listen. Raises TransporterError."""
        return self._subscribers.start(SqliteSubscription(self._path, topics, self._subscribers.forget))

    def close(self) -> None:
        """Let go of the file; subscriptions end."""
        self._subscribers.close()
        self._file.close()


class SqliteSubscription:
    """`Subscription` in an SQLite file. Made by `SqliteTransporter.subscribe`."""

    def __init__(self, path: Path, topics: tuple[str, ...], forget: Callable[["SqliteSubscription"], None]) -> None:
        self._file = SqliteFile(path)
        self._topics = {topic.encode(): topic for topic in topics}
        self._forget = forget
        self._closed = threading.Event()
        self._opened = 0
        self._version = 0
        self._last = 0
        self._is_behind = False

    def start(self) -> None:
        """From now on messages are heard. Raises TransporterError."""

        def begin(database: sqlite3.Connection) -> None:
            self._version = _version(database)
            self._last = _last_id(database)
            self._opened = self._file.opened

        self._run(begin)

    def next_batch(self, timeout_s: float) -> list[Message]:
        """What has come. Raises TransporterError."""
        deadline = time.monotonic() + timeout_s
        while True:
            batch = self._run(self._look)
            left_s = deadline - time.monotonic()
            if batch or (left_s <= 0 and not self._is_behind):
                return batch
            if not self._is_behind and self._closed.wait(min(POLL_S, left_s)):
                raise TransporterError(f"{self._file.path}: was closed")

    def close(self) -> None:
        """Stop listening, at once."""
        self._closed.set()
        self._file.close()
        self._forget(self)

    def _look(self, database: sqlite3.Connection) -> list[Message]:
        if self._file.opened != self._opened:
            raise TransporterError(f"{self._file.path}: was replaced")
        version = _version(database)
        if version == self._version and not self._is_behind:
            return []
        # What is read now may be newer than `version`; then the next look is for nothing.
        self._version = version
        database.execute("BEGIN")
        batch, read, size = [], 0, 0
        for found, topic, body in database.execute(_NEW, (MAX_DOCUMENT_BYTES, self._last, MAX_BATCH)):
            if found != self._last + 1:
                raise TransporterError(f"{self._file.path}: messages were removed before they were read")
            self._last = found
            read += 1
            name, text = self._topics.get(topic), decode_text(body)
            if name is not None and text is not None:
                batch.append(Message(name, text))
                size += len(body)
                if size > MAX_BATCH_BYTES:
                    break
        self._is_behind = read == MAX_BATCH or size > MAX_BATCH_BYTES
        if not self._is_behind and _last_id(database) != self._last:
            raise TransporterError(f"{self._file.path}: messages were removed before they were read")
        database.execute("COMMIT")
        return batch

    def _run(self, call: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return self._file.run(call)
        except StoreError as exc:
            raise TransporterError(str(exc)) from exc


def _version(database: sqlite3.Connection) -> int:
    """Changes with every commit of another connection."""
    (version,) = database.execute("PRAGMA data_version").fetchone()
    return int(version)


def _last_id(database: sqlite3.Connection) -> int:
    """Of the last message that was ever sent, kept or not."""
    row = database.execute("SELECT CASE WHEN typeof(seq) = 'integer' THEN seq END FROM sqlite_sequence WHERE name = 'messages'").fetchone()
    return int(row[0] or 0) if row is not None else 0
