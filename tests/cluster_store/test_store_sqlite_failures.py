"""An SQLite file that is locked, full, unwritable, damaged, somebody else's, replaced, or whose process is killed."""

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_rig import wait_until

from fxrelay.cluster import sqlite_file
from fxrelay.cluster.ports import SERVERS
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxtunnel.errors import StoreError, TransporterError

SOURCE = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "cluster.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    yield store
    store.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fill(store: SqliteStore, count: int) -> None:
    for number in range(count):
        store.put(SERVERS, f"n{number}", "x" * 50_000)


def is_sound(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as database:
        return list(database.execute("PRAGMA integrity_check")) == [("ok",)]


def test_nothing_is_made_before_the_first_call_and_then_it_is_private(store: SqliteStore, path: Path) -> None:
    assert not path.parent.exists()
    old = os.umask(0)
    try:
        store.put(SERVERS, "n", "x")
    finally:
        os.umask(old)
    assert (mode(path.parent), mode(path)) == (0o700, 0o600)
    assert {found.name: mode(found) for found in path.parent.iterdir()} == {path.name: 0o600, f"{path.name}-journal": 0o600}


def test_a_directory_that_is_there_stays_as_it_is(path: Path, store: SqliteStore) -> None:
    path.parent.mkdir(mode=0o755)
    store.put(SERVERS, "n", "x")
    assert (mode(path.parent), mode(path)) == (0o755, 0o600)


def test_the_journal_mode_is_safe_with_every_sqlite(path: Path, store: SqliteStore) -> None:
    store.now_ms()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    again = SqliteStore(path)
    again.put(SERVERS, "n", "x")
    again.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",), "any but WAL"
    settings = store._file.run(
        lambda database: [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "trusted_schema")]
    )
    assert settings == ["persist", 2, 0]


@pytest.mark.parametrize("content", [b"no database\n" * 500, b"SQLite format 3\0" + b"\xff" * 5_000], ids=["foreign", "damaged"])
def test_a_file_that_is_no_database_is_left_alone(path: Path, store: SqliteStore, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    for _ in range(2):
        with pytest.raises(StoreError, match="move it away"):
            store.put(SERVERS, "n", "x")
    assert path.read_bytes() == content
    path.unlink()
    store.put(SERVERS, "n", "x")


def test_a_database_of_another_program_is_left_alone(path: Path, store: SqliteStore) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE documents (x)")
    path.chmod(0o600)
    content = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        store.now_ms()
    assert path.read_bytes() == content


def test_a_newer_format_is_not_touched(path: Path, store: SqliteStore) -> None:
    store.now_ms()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    again = SqliteStore(path)
    with pytest.raises(StoreError, match="update all relays"):
        again.now_ms()
    again.close()


def test_a_file_others_may_read_is_refused(path: Path, store: SqliteStore) -> None:
    store.now_ms()
    path.chmod(0o640)
    again = SqliteStore(path)
    with pytest.raises(StoreError, match="chmod 600"):
        again.now_ms()
    path.chmod(0o600)
    assert again.now_ms()
    again.close()


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_what_is_no_file_is_refused(path: Path, store: SqliteStore, kind: str) -> None:
    path.parent.mkdir()
    match kind:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("elsewhere")
        case "fifo":
            os.mkfifo(path)
    with pytest.raises(StoreError, match="is not a regular file"):
        store.now_ms()


def test_a_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SqliteStore(tmp_path / "file" / "state" / "cluster.db")
    with pytest.raises(StoreError):
        store.now_ms()
    store.close()


def test_a_lock_that_is_held_too_long_is_a_store_error(path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.2)
    transporter = SqliteTransporter(path)
    store.put(SERVERS, "n", "x")
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        store.close()
        busy = SqliteStore(path)
        with pytest.raises(StoreError, match="locked"):
            busy.put(SERVERS, "n", "y")
        with pytest.raises(TransporterError, match="locked"):
            transporter.publish(SERVERS, "y")
        other.execute("ROLLBACK")
    assert busy.get(SERVERS, "n") is not None
    busy.close()
    transporter.close()


def test_a_full_disk_is_a_store_error_and_the_file_stays_intact(path: Path, store: SqliteStore) -> None:
    store.put(SERVERS, "kept", "x")
    store._file.run(lambda database: database.execute("PRAGMA max_page_count = 100").fetchone())
    with pytest.raises(StoreError, match="no space is left"):
        fill(store, 100)
    assert store.get(SERVERS, "kept") is not None
    assert is_sound(path)
    store.put(SERVERS, "kept", "y" * 200_000)


def test_a_file_that_was_replaced_is_opened_again_and_has_another_epoch(path: Path, store: SqliteStore) -> None:
    epoch = store.epoch()
    store.put(SERVERS, "n", "x")
    path.unlink()
    assert store.epoch() != epoch
    assert store.get(SERVERS, "n") is None
    store.put(SERVERS, "n", "y")
    other = SqliteStore(path)
    assert [found.text for found in other.documents(SERVERS)] == ["y"]
    other.close()


def test_a_file_that_was_put_back_from_a_copy_is_the_one_that_counts(path: Path, store: SqliteStore) -> None:
    store.put(SERVERS, "n", "before")
    copy = path.with_name("copy.db")
    shutil.copy2(path, copy)
    store.put(SERVERS, "n", "after")
    os.replace(copy, path)
    found = store.get(SERVERS, "n")
    assert found is not None
    assert found.text == "before"


def test_damage_under_way_is_a_store_error(path: Path, store: SqliteStore) -> None:
    for number in range(300):
        store.put(SERVERS, f"n{number}", "x" * 500)
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    with path.open("r+b") as file:
        file.write(data)
    again = SqliteStore(path)
    with pytest.raises(StoreError):
        list(again.documents(SERVERS))
    with pytest.raises(StoreError):
        again.put(SERVERS, "n", "x")
    again.close()


def test_a_process_that_is_killed_while_it_writes_loses_nothing_it_was_told_is_written(path: Path, store: SqliteStore) -> None:
    """kill -9 again and again; every put that returned is there, and the file is sound."""
    program = (
        "import sys; from pathlib import Path; from fxrelay.cluster.sqlite_store import SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    store.put('servers', 'n', str(number)); store.add('count', 1); print(number, flush=True)\n"
    )
    counted = 0
    for round_ in range(5):
        child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, cwd=SOURCE)
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(10 + 7 * round_)]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        last = int(lines[-1])
        found = store.get(SERVERS, "n")
        assert found is not None
        assert int(found.text) in (last, last + 1)
        counted += last + 1
        counter = store.add("count", 0)
        assert counted <= counter <= counted + 1
        counted = counter
        assert is_sound(path)


def test_two_processes_at_once_lose_nothing(path: Path, store: SqliteStore) -> None:
    program = (
        "import sys; from pathlib import Path; from fxrelay.cluster.sqlite_store import SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "sys.stdin.readline()\n"
        "for number in range(200): store.add('count', 1)\n"
        "for number in range(50): store.put('servers', sys.argv[2] + str(number), 'x')\n"
        "store.close()\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(path), name], cwd=SOURCE, stdin=subprocess.PIPE) for name in "ab"]
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    wait_until(lambda: all(child.poll() is not None for child in children))
    assert [child.returncode for child in children] == [0, 0]
    assert store.add("count", 0) == 400
    assert len(list(store.documents(SERVERS))) == 100


def test_closing_never_waits_for_a_call_that_waits_for_a_lock(path: Path, store: SqliteStore) -> None:
    store.now_ms()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ends: list[BaseException] = []

        def work() -> None:
            try:
                store.put(SERVERS, "n", "x")
            except StoreError as exc:
                ends.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 0.75 * sqlite_file.BUSY_S
        thread.join(20)
        assert [type(end) for end in ends] == [StoreError]
