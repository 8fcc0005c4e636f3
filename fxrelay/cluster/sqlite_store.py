"""Task: the store of the relays of one machine: an SQLite file, no server. Blocking: for worker threads."""

import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from fxrelay.cluster.content import MAX_COUNT, MAX_KEY_BYTES, decode_document, encode_amount, encode_collection, encode_key, encode_text
from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Change, Document, Present, Update
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
        self.doubt = ""

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
        (result,) = self.update_all([Update(collection, key, change)])
        if isinstance(result, Exception):
            raise result
        return result

    def update_all(self, updates: Sequence[Update]) -> list[Present | Exception]:
        """See `Store`: all within one transaction, so that the disk is waited for once. Where the file fails, nothing of any is written."""

        def work(database: sqlite3.Connection) -> list[Present | Exception]:
            database.execute("BEGIN IMMEDIATE")
            before, epoch = database.total_changes, self._epoch(database)
            results = [self._updated(database, update, epoch) for update in updates]
            database.execute("COMMIT" if database.total_changes != before else "ROLLBACK")
            return results

        try:
            return self._file.run(work)
        except StoreError as exc:
            return [exc if number == 0 else StoreError(str(exc)) for number in range(len(updates))]

    def _updated(self, database: sqlite3.Connection, update: Update, epoch: str) -> Present | Exception:
        """One update within a transaction: written whole, or not at all and why."""
        try:
            where = (encode_collection(update.collection), encode_key(update.key))
            number = self._number(database, where)
            beside = (encode_collection(update.beside[0]), encode_key(update.beside[1])) if update.beside is not None else None
            row = database.execute(_GET, (MAX_DOCUMENT_BYTES, *beside)).fetchone() if beside is not None else None
            second = self._document(row) if row is not None else None
            beside_text = second.text if second is not None else None
            present = Present(self._text(database, where), number + 1, _now_ms(), epoch, beside_text)
            change = update.change(present)
            if change is None:
                return replace(present, number=number)
            after = replace(present, text=change) if isinstance(change, str) else replace(present, text=change.text, beside=change.beside)
            rows = [(*where, encode_text(after.text or ""), present.now_ms)]
            if beside is not None and after.beside is not None and after.beside != present.beside:
                rows.append((*beside, encode_text(after.beside), present.now_ms))
        except sqlite3.Error:
            raise
        except Exception as exc:
            return exc
        database.executemany("INSERT OR REPLACE INTO documents (collection, key, body, updated_ms) VALUES (?, ?, ?, ?)", rows)
        if beside is not None and after.beside is None and present.beside is not None:
            database.execute("DELETE FROM documents WHERE collection = ? AND key = ?", beside)
        database.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (_counter(where), number + 1))
        return after

    def _text(self, database: sqlite3.Connection, where: tuple[str, bytes]) -> str | None:
        row = database.execute(_GET, (MAX_DOCUMENT_BYTES, *where)).fetchone()
        document = self._document(row) if row is not None else None
        if row is not None and document is None:
            raise StoreError(f"{self._file.path}: {where[0]} {_shown(where)} holds something that is not ours")
        return document.text if document is not None else None

    def _number(self, database: sqlite3.Connection, where: tuple[str, bytes]) -> int:
        found = database.execute("SELECT value FROM counters WHERE name = ?", (_counter(where),)).fetchone()
        number = found[0] if found is not None else 0
        if type(number) is not int or not 0 <= number < MAX_COUNT:
            raise StoreError(f"{self._file.path}: the version of {where[0]} {_shown(where)} is no number")
        return number

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


def _counter(where: tuple[str, bytes]) -> bytes:
    return b"version:" + where[0].encode() + b":" + where[1]


def _shown(where: tuple[str, bytes]) -> str:
    return repr(where[1].decode(errors="replace")[:80])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
