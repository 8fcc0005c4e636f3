"""Task: the SQLite file in which the relays of one machine keep their cluster: made, checked, and opened again when it was replaced.

The journal mode is PERSIST and synchronous FULL with every SQLite: a commit is on the disk when it returns, and costs a fifth of one in
mode DELETE, which makes and removes a file each time; connections in other rollback modes do no harm. Not WAL: before 3.51.3 it can lose
committed writes when two connections write and checkpoint at once (sqlite.org/wal.html, "the WAL-reset bug"), and a mode that depends on
the version would let relays with different ones meet in one file. Blocking.
"""

import contextlib
import os
import secrets
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from fxtunnel.errors import ConfigError, StoreError
from fxtunnel.kit.files import make_private_dir

T = TypeVar("T")

APPLICATION_ID: Final = 0x46584757
SCHEMA_VERSION: Final = 1
BUSY_S: Final = 2.0
"""How long a call waits for another process, and again for another thread, to finish its writing."""
MAX_JOURNAL_BYTES: Final = 4 << 20
"""Of the journal file that stays between two transactions."""
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
_SCHEMA: Final = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE documents (collection TEXT, key BLOB, updated_ms INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (collection, key))",
    "CREATE TABLE counters (name BLOB PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, sent_ms INTEGER NOT NULL, topic TEXT NOT NULL, body BLOB NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


class SqliteFile:
    """One connection to the file, for one thread after the other. Nothing is opened before the first call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened = 0
        """Connections made so far: who counts on what an earlier one saw can tell that it is gone."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._closed = False

    def run(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """`call` with the connection, to which it is alone. What it began and did not commit is rolled back when it raises.

        Raises:
            StoreError: closed, locked, full, unwritable, damaged, or not ours; the text says what to do. The file is as it was before.
        """
        self._check_open()
        if not self._lock.acquire(timeout=BUSY_S):
            raise StoreError(f"{self.path}: other calls have kept it busy for {BUSY_S:g} s")
        try:
            return self._run(call)
        finally:
            self._lock.release()
            if self._closed:
                self._let_go()

    def close(self) -> None:
        """Let go of the file. Never blocks; a call under way is interrupted. May be repeated."""
        self._closed = True
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # the other thread may have closed it meanwhile
                connection.interrupt()
        self._let_go()

    def _let_go(self) -> None:
        # Who holds the lock comes here after releasing it, so one of the two does the closing.
        if self._lock.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._lock.release()

    def _run(self, call: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._current()
            self._check_open()
            return call(connection)
        except sqlite3.Error as exc:
            self._drop()  # rolls back, and the next call sees the file as it is then
            raise StoreError(f"{self.path}: {'was closed' if self._closed else _explain(exc)}") from exc
        except BaseException:
            if self._connection is not None and self._connection.in_transaction:
                self._drop()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.path}: was closed")

    def _current(self) -> sqlite3.Connection:
        """The connection to the file that is there now: it may have been removed, or put back from a backup."""
        facts = _stat(self.path)
        if self._connection is not None:
            if facts is not None and (facts.st_dev, facts.st_ino) == self._inode:
                return self._connection
            self._drop()
        if facts is None:
            _make(self.path)
            facts = _stat(self.path)
        _check_private(self.path, facts)
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, self.path)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._inode = (facts.st_dev, facts.st_ino) if facts is not None else (0, 0)
        self.opened += 1
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StoreError(f"{path}: cannot be reached: {exc.strerror or exc}") from exc


def _make(path: Path) -> None:
    """An empty file that only we may read: SQLite itself would ask the umask.

    It comes in by a link under its name: closing a descriptor of the database itself would drop the locks that SQLite holds on it in this
    process (sqlite.org/howtocorrupt.html, 2.2).
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        if not path.parent.exists():
            make_private_dir(path.parent)
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another relay was quicker
        finally:
            os.unlink(draft)
    except ConfigError as exc:
        raise StoreError(str(exc)) from exc
    except OSError as exc:
        raise StoreError(f"{path}: cannot be made: {exc.strerror or exc}") from exc


def _check_private(path: Path, facts: os.stat_result | None) -> None:
    if facts is None or not stat.S_ISREG(facts.st_mode):
        raise StoreError(f"{path}: is not a regular file; name another one, or move it away")
    mode = stat.S_IMODE(facts.st_mode)
    if facts.st_uid not in (os.geteuid(), 0):
        raise StoreError(f"{path}: belongs to uid {facts.st_uid}; run: chown -h {os.geteuid()} {path}")
    if mode & 0o077:
        raise StoreError(f"{path}: is accessible by others (mode {mode:04o}); run: chmod 600 {path}")


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA journal_size_limit = {MAX_JOURNAL_BYTES}")
    (mode,) = connection.execute("PRAGMA journal_mode = PERSIST").fetchone()
    if mode != "persist":
        raise StoreError(f"{path}: is in journal mode {mode}, and another program that has it open keeps it there; end that program")
    if _ids(connection) == (0, 0):
        connection.execute("BEGIN EXCLUSIVE")
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if _ids(connection) == (0, 0) and tables == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("INSERT INTO facts VALUES ('epoch', ?)", (secrets.token_hex(16),))
        connection.execute("COMMIT")
    application, version = _ids(connection)
    if application != APPLICATION_ID:
        raise StoreError(f"{path}: is a database of another program; name another file")
    if version != SCHEMA_VERSION:
        raise StoreError(f"{path}: has format {version}, and this fxrelay reads format {SCHEMA_VERSION}: update all relays of this machine")


def _ids(connection: sqlite3.Connection) -> tuple[int, int]:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return application, version


def _explain(exc: sqlite3.Error) -> str:
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process has kept it locked for {BUSY_S:g} s"
    if code == sqlite3.SQLITE_FULL:
        return "no space is left on the file system"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"cannot be written: {exc}; the file and its directory must be writable by uid {os.geteuid()}"
    if code in _DAMAGED:
        return (
            f"is damaged, or no SQLite file ({exc}): stop the relays of this machine and move it away; they make a new one and report again"
        )
    return " ".join(str(exc).split())[:300]
