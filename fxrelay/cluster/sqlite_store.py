"""Task: the store of the relays of one machine: an SQLite file, no server. Blocking: for worker threads."""

import re
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from fxrelay.cluster.content import MAX_COUNT, MAX_KEY_BYTES, decode_document, encode_amount, encode_collection, encode_key, encode_text
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Change, Document, Present
from fxrelay.cluster.sqlite_file import SqliteFile
from fxtunnel.errors import StoreError

PART: Final = 256
_EPOCH: Final = re.compile(r"[0-9a-f]{32}")
# The length of a blob is known without reading it: a huge one is never in memory. A blob is greater than anything else SQLite can hold, so
# that keys of other types are not seen.
_GET: Final = """
SELECT key, CASE WHEN typeof(body) = 'blob' AND length(body) <= ? THEN body END,
    CASE WHEN typeof(updated_ms) = 'integer' THEN updated_ms END
FROM documents WHERE collection = ? AND key = ?
"""
_READ: Final = """
SELECT key, CASE WHEN typeof(body) = 'blob' AND length(body) <= ? THEN body END,
    CASE WHEN typeof(updated_ms) = 'integer' THEN updated_ms END
FROM documents WHERE collection = ? AND key > ? AND length(key) <= ? ORDER BY key LIMIT ?
"""


class SqliteStore:
    """`Store` in an SQLite file. The clock is the machine's. `skipped`: documents read that no relay of ours would have written."""

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path)
        self.skipped = 0

    def epoch(self) -> str:
        """Written into the file when it was made. Raises StoreError."""
        return self._file.run(self._epoch)

    def now_ms(self) -> int:
        """The machine's clock; asked of the file first, so that who can tell the time can also read the store. Raises StoreError."""
        self._file.run(lambda database: database.execute("SELECT count(*) FROM facts").fetchone())
        return _now_ms()

    def put(self, collection: str, key: str, text: str) -> int:
        """Write a document and sync it to the disk. Raises StoreError: nothing was written."""
        row = (encode_collection(collection), encode_key(key), encode_text(text))

        def write(database: sqlite3.Connection) -> int:
            now_ms = _now_ms()
            database.execute(
                "INSERT INTO documents (collection, key, body, updated_ms) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (collection, key) DO UPDATE SET body = excluded.body, updated_ms = excluded.updated_ms",
                (*row, now_ms),
            )
            return now_ms

        return self._file.run(write)

    def get(self, collection: str, key: str) -> Document | None:
        """One document; None as well for what is too long or no text. Raises StoreError."""
        wanted = (MAX_DOCUMENT_BYTES, encode_collection(collection), encode_key(key))
        row = self._file.run(lambda database: database.execute(_GET, wanted).fetchone())
        return self._document(row) if row is not None else None

    def delete(self, collection: str, key: str) -> None:
        """Remove a document. Raises StoreError."""
        wanted = (encode_collection(collection), encode_key(key))
        self._file.run(lambda database: database.execute("DELETE FROM documents WHERE collection = ? AND key = ?", wanted).close())

    def delete_if_same(self, collection: str, document: Document) -> bool:
        """Remove what was read, unless it was written again. Raises StoreError: nothing was removed."""
        found = (encode_collection(collection), encode_key(document.key), encode_text(document.text), document.updated_ms)
        statement = "DELETE FROM documents WHERE collection = ? AND key = ? AND body = ? AND updated_ms = ?"
        return self._file.run(lambda database: database.execute(statement, found).rowcount) == 1

    def documents(self, collection: str) -> Iterator[Document]:
        """All documents, each at most once. The file is not locked between two parts. Raises StoreError, at any step."""
        name = encode_collection(collection)
        return self._documents(name)

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter. Raises StoreError: nothing was added."""
        name, change = encode_key(counter), encode_amount(amount)

        def count(database: sqlite3.Connection) -> int:
            database.execute("BEGIN IMMEDIATE")
            row = database.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
            before = row[0] if row is not None else 0
            if type(before) is not int or abs(before + change) > MAX_COUNT:
                raise StoreError(f"{self._file.path}: the counter {counter[:80]!r} cannot go that far, or is no number")
            database.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (name, before + change))
            database.execute("COMMIT")
            return before + change

        return self._file.run(count)

    def update(self, collection: str, key: str, change: Change) -> Present:
        """Read, decide and write within one transaction, in which the file is ours alone. Raises StoreError: nothing was written."""
        where = (encode_collection(collection), encode_key(key))
        counter = b"version:" + where[0].encode() + b":" + where[1]

        def work(database: sqlite3.Connection) -> Present:
            database.execute("BEGIN IMMEDIATE")
            row = database.execute(_GET, (MAX_DOCUMENT_BYTES, *where)).fetchone()
            document = self._document(row) if row is not None else None
            if row is not None and document is None:
                raise StoreError(f"{self._file.path}: {collection} {key[:80]!r} holds something that is not ours")
            found = database.execute("SELECT value FROM counters WHERE name = ?", (counter,)).fetchone()
            number = found[0] if found is not None else 0
            if type(number) is not int or not 0 <= number < MAX_COUNT:
                raise StoreError(f"{self._file.path}: the version of {collection} {key[:80]!r} is no number")
            present = Present(document.text if document is not None else None, number + 1, _now_ms(), self._epoch(database))
            text = change(present)
            if text is None:
                database.execute("ROLLBACK")
                return replace(present, number=number)
            body = encode_text(text)
            database.execute(
                "INSERT OR REPLACE INTO documents (collection, key, body, updated_ms) VALUES (?, ?, ?, ?)", (*where, body, present.now_ms)
            )
            database.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (counter, number + 1))
            database.execute("COMMIT")
            return replace(present, text=text)

        return self._file.run(work)

    def close(self) -> None:
        """Let go of the file, at once."""
        self._file.close()

    def _epoch(self, database: sqlite3.Connection) -> str:
        row = database.execute("SELECT value FROM facts WHERE name = 'epoch'").fetchone()
        if row is None or not isinstance(row[0], str) or not _EPOCH.fullmatch(row[0]):
            raise StoreError(f"{self._file.path}: has no epoch: stop the relays of this machine and move it away; they make a new one")
        return row[0]

    def _documents(self, collection: str) -> Iterator[Document]:
        last = b""
        while rows := self._part(collection, last):
            for row in rows:
                document = self._document(row)
                if document is not None:
                    yield document
            last = rows[-1][0]

    def _part(self, collection: str, last: bytes) -> list[tuple[bytes, object, object]]:
        wanted = (MAX_DOCUMENT_BYTES, collection, last, MAX_KEY_BYTES, PART)
        return self._file.run(lambda database: database.execute(_READ, wanted).fetchall())

    def _document(self, row: tuple[object, object, object]) -> Document | None:
        document = decode_document(*row)
        self.skipped += document is None
        return document


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
