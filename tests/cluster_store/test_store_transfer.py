"""Export and import of the original's store files: what a file says, what would change, and that it then has changed."""

import json
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.cluster import nedb
from fxrelay.cluster.members import Control
from fxrelay.cluster.ports import CONTROLS, MAX_DOCUMENT_BYTES
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.cluster.transfer import Changes, apply_import, export_store, plan_export, plan_import, tell_controls
from fxtunnel.errors import ConfigError

BOOKMARKS = b"""{"_id":"xterm","data":{"name":"xterm","command":"xterm -ls","geometry":"rootless","icon":"data:x"}}
{"$$indexCreated":{"fieldName":"name","unique":true}}
{"_id":"old","data":1}
{"_id":"gone","data":2}
{"_id":"xterm","data":{"name":"xterm","command":"xterm","at":{"$$date":1700000000000}}}
{"_id":"gone","$$deleted":true}

{"_id":"back","$$deleted":true}
{"_id":"back","data":3}
"""
CONFIG = b'{"_id":"motd","motd":"Gr\xc3\xbc\xc3\x9fe"}\n'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "cluster.db")
    yield store
    store.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "system-bookmark-store.db").write_bytes(BOOKMARKS)
    (directory / "config-store.db").write_bytes(CONFIG)
    (directory / "other.txt").write_text("no store")
    return directory


def contents(store: SqliteStore, collection: str) -> dict[str, Any]:
    return {found.key: json.loads(found.text) for found in store.documents(collection)}


def test_the_last_line_of_an_id_wins_and_deleted_is_deleted() -> None:
    content, broken = nedb.parse(BOOKMARKS)
    assert broken == []
    assert content.documents.keys() == {"xterm", "old", "back"}
    assert content.documents["xterm"]["data"] == {"name": "xterm", "command": "xterm", "at": {"$$date": 1700000000000}}
    assert content.deleted == {"gone"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"7", "is not a JSON object"),
        (b"{}", "has no _id"),
        (b'{"_id":7}', "has no _id"),
        (b'{"_id":""}', "expected 1 to 1024"),
        (b'{"_id":"\xff"}', "is not UTF-8"),
        (b'{"_id":"a","x":NaN}', "NaN"),
        (b'{"_id":"a","x":1e999}', "not JSON compliant"),
        (b'{"_id":"\\ud800"}', "surrogate"),
        (b'{"_id":"a","x":"\\ud800"}', "surrogate"),
        (b'{"_id":"a","$$deleted":false}', "must be true"),
        (b'{"$$deleted":true}', "has no _id"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"_id":"a","x":' + b"[" * 100_000, "nested too deeply"),
        (b'{"_id":"a","x":' + b"9" * 5_000 + b"}", "digits"),
        (b'{"_id":"a","x":"' + b"x" * MAX_DOCUMENT_BYTES + b'"}', "at most"),
    ],
)
def test_a_broken_line_is_told_with_its_number(line: bytes, message: str) -> None:
    content, broken = nedb.parse(b'{"_id":"good"}\n\n' + line + b'\r\n{"_id":"fine"}')
    assert content.documents.keys() == {"good", "fine"}
    assert [found.number for found in broken] == [3]
    assert message in broken[0].message
    assert len(broken[0].message) < 200


TEXT = st.text(st.characters(exclude_categories=("Cs",)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
IDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
FIELDS = st.dictionaries(IDS.filter(lambda key: not key.startswith("$$") and key != "_id"), JSON, max_size=3)


@given(st.binary(max_size=200) | st.lists(st.sampled_from(BOOKMARKS.splitlines()) | st.binary(max_size=20)).map(b"\n".join))
def test_any_bytes_are_parsed_or_told(data: bytes) -> None:
    content, broken = nedb.parse(data)
    assert not content.documents.keys() & content.deleted
    assert all(1 <= line.number <= data.count(b"\n") + 1 for line in broken)
    again, broken = nedb.parse(nedb.encode(content))
    assert (again, broken) == (content, [])


@given(st.dictionaries(IDS, FIELDS, max_size=4), st.sets(IDS, max_size=3))
def test_what_is_encoded_is_parsed(documents: dict[str, dict[str, Any]], deleted: set[str]) -> None:
    content = nedb.Content({key: {"_id": key, **fields} for key, fields in documents.items()}, deleted - documents.keys())
    assert nedb.parse(nedb.encode(content)) == (content, [])


@given(IDS, st.text(max_size=30) | JSON.map(json.dumps))
def test_any_stored_text_becomes_a_line_or_none(key: str, text: str) -> None:
    found = nedb.from_store(key, text)
    if found is not None:
        assert found["_id"] == key
        assert nedb.parse(nedb.encode(nedb.Content({key: found}))) == (nedb.Content({key: found}), [])


def test_an_import_is_planned_and_then_done(store: SqliteStore, directory: Path) -> None:
    store.put("system-bookmark", "old", '{"data": 1, "_id": "old"}')
    store.put("system-bookmark", "gone", '{"data": 2}')
    store.put("system-bookmark", "xterm", '{"data": true}')
    store.put("system-bookmark", "ours", '{"data": 9}')
    before = list(store.documents("system-bookmark"))
    plan = plan_import(store, directory)
    assert plan.collections == (
        Changes("config", added=("motd",)),
        Changes("system-bookmark", added=("back",), changed=("xterm",), deleted=("gone",), unchanged=1),
    )
    assert plan.lines() == [
        "config: 1 added, 0 changed, 0 deleted, 0 unchanged",
        "  + motd",
        "system-bookmark: 1 added, 1 changed, 1 deleted, 1 unchanged",
        "  + back",
        "  ~ xterm",
        "  - gone",
    ]
    assert list(store.documents("system-bookmark")) == before
    apply_import(store, plan)
    assert contents(store, "config") == {"motd": {"_id": "motd", "motd": "Grüße"}}
    assert contents(store, "system-bookmark").keys() == {"old", "xterm", "ours", "back"}
    again = plan_import(store, directory)
    assert again.texts == {}
    assert [(changes.added, changes.changed, changes.deleted) for changes in again.collections] == [((), (), ())] * 2


def test_nothing_is_imported_while_a_line_is_broken(store: SqliteStore, directory: Path) -> None:
    (directory / "permissions-store.db").write_bytes(b'{"_id":"admin-group","data":["root"]}\nbroken\n{}\n')
    (directory / "bad name-store.db").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        plan_import(store, directory)
    path = str(directory / "permissions-store.db")
    assert [(found.file, found.key) for found in caught.value.problems] == [
        (str(directory / "bad name-store.db"), ""),
        (path, "line 2"),
        (path, "line 3"),
    ]
    assert contents(store, "config") == {}


def test_a_directory_without_files_is_told(store: SqliteStore, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            plan_import(store, directory)


def test_what_is_exported_can_be_imported_elsewhere(store: SqliteStore, tmp_path: Path) -> None:
    store.put("config", "motd", '{"motd":"Grüße"}')
    store.put("permissions", "admin-group", '{"data":["root"]}')
    store.put(CONTROLS, "n1", Control(draining=True).encode())
    store.put("servers", "n1", "{}")
    target = tmp_path / "out" / "deep"
    assert export_store(store, target) == {"controls": 1, "config": 1, "permissions": 1, "system-bookmark": 0}
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {
        "config-store.db": 0o600,
        "controls-store.db": 0o600,
        "permissions-store.db": 0o600,
    }
    assert (target / "config-store.db").read_bytes() == '{"_id":"motd","motd":"Grüße"}\n'.encode()
    other = SqliteStore(tmp_path / "other.db")
    apply_import(other, plan_import(other, target))
    assert contents(other, "permissions") == {"admin-group": {"_id": "admin-group", "data": ["root"]}}
    control = other.get(CONTROLS, "n1")
    assert control is not None
    assert Control.parse(control.text) == Control(draining=True)
    assert plan_import(store, target).texts == {}
    other.close()


def test_what_relays_keep_by_themselves_is_not_imported(store: SqliteStore, directory: Path) -> None:
    live = ("servers", "reservations", "reservation-marks", "tickets", "imported-collections")
    for name in live:
        (directory / f"{name}-store.db").write_bytes(b'{"_id":"n1","user":"eve"}\n')
    plan = plan_import(store, directory)
    assert plan.lines()[-5:] == [f"{name}: left out, relays keep it by themselves" for name in sorted(live)]
    apply_import(store, plan)
    assert [contents(store, name) for name in live] == [{}] * 5


def test_other_collections_that_were_imported_are_exported_again(store: SqliteStore, directory: Path, tmp_path: Path) -> None:
    (directory / "profile-store.db").write_bytes(b'{"_id":"full","data":[1]}\n')
    apply_import(store, plan_import(store, directory))
    assert plan_import(store, directory).texts == {}
    store.put("imported-collections", "reservations", "{}")  # somebody who writes the store
    store.put("imported-collections", "../etc", "{}")
    store.put("reservations", "n1", "{}")
    out = tmp_path / "out"
    assert list(export_store(store, out)) == ["controls", "config", "permissions", "system-bookmark", "profile"]
    assert (out / "profile-store.db").read_bytes() == b'{"_id":"full","data":[1]}\n'


def test_what_is_switched_off_by_an_import_is_told_at_once(store: SqliteStore, directory: Path, tmp_path: Path) -> None:
    store.put(CONTROLS, "n2", Control(draining=True).encode())
    (directory / "controls-store.db").write_bytes(b'{"_id":"n1","draining":true,"disable":[]}\n{"_id":"n2","$$deleted":true}\n')
    plan = plan_import(store, directory)
    apply_import(store, plan)
    with closing(SqliteTransporter(tmp_path / "cluster.db")) as transporter:
        subscription = transporter.subscribe((CONTROLS,))
        tell_controls(transporter, plan)
        tell_controls(transporter, plan_import(store, directory))
        heard = [json.loads(message.text) for message in subscription.next_batch(5)]
        subscription.close()
    assert [(each["serverId"], each["control"]["draining"]) for each in heard] == [("n1", True), ("n2", False)]


def test_an_export_keeps_what_is_marked_as_deleted_and_is_repeatable(store: SqliteStore, directory: Path) -> None:
    store.put("system-bookmark", "xterm", '{"data":{"name":"xterm","command":"xterm","at":{"$$date":1700000000000}}}')
    store.put("system-bookmark", "gone", '{"data":"again"}')
    names = ["system-bookmark", "config"]
    plan = plan_export(store, directory, names)
    assert plan.collections == (
        Changes("system-bookmark", added=("gone",), deleted=("back", "old"), unchanged=1),
        Changes("config", deleted=("motd",)),
    )
    assert (directory / "config-store.db").read_bytes() == CONFIG
    export_store(store, directory, names)
    assert (directory / "system-bookmark-store.db").read_text().splitlines() == [
        '{"_id":"gone","data":"again"}',
        '{"_id":"xterm","data":{"name":"xterm","command":"xterm","at":{"$$date":1700000000000}}}',
        '{"_id":"back","$$deleted":true}',
        '{"_id":"old","$$deleted":true}',
    ]
    before = (directory / "system-bookmark-store.db").read_bytes()
    inode = (directory / "config-store.db").stat().st_ino
    export_store(store, directory, names)
    assert (directory / "system-bookmark-store.db").read_bytes() == before
    assert (directory / "config-store.db").stat().st_ino == inode
    assert plan_export(store, directory, names).collections == (Changes("system-bookmark", unchanged=2), Changes("config"))


def test_an_export_leaves_out_what_no_line_can_hold(store: SqliteStore, tmp_path: Path) -> None:
    for key, text in {"good": "{}", "list": "[]", "text": "x", "marked": '{"$$deleted":true}', "number": '{"x":NaN}'}.items():
        store.put("config", key, text)
    plan = plan_export(store, tmp_path / "out", ["config"])
    assert plan.collections[0].skipped == ("list", "marked", "number", "text")
    assert export_store(store, tmp_path / "out", ["config"]) == {"config": 1}


def test_nothing_is_exported_over_a_broken_file(store: SqliteStore, directory: Path) -> None:
    store.put("config", "motd", "{}")
    (directory / "permissions-store.db").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="line 1"):
        export_store(store, directory)
    assert (directory / "config-store.db").read_bytes() == CONFIG


def test_an_export_to_where_nothing_can_be_written(store: SqliteStore, tmp_path: Path) -> None:
    store.put("config", "motd", "{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        export_store(store, tmp_path / "file" / "x")
