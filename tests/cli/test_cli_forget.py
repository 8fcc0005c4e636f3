"""Nodes that are gone leave the store: by themselves after a while, at once by `fxrelay forget`; never one that has come back."""

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

import fxrelay.cli
from benchmarks.nodes import server_text
from fxrelay.balance.reservations import Granted, OwnerRelogin
from fxrelay.balance.settling import Mark, encode_mark
from fxrelay.cluster.ports import CONTROLS, RESERVATION_MARKS, RESERVATIONS, SERVERS, Document
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.cluster.threads import Threads
from fxrelay.forgetting import Forgetter, forget_node, forget_silent
from fxrelay.reserving.ledger import MARK, Ledger
from fxrelay.settings import load
from fxtunnel.errors import ConfigError, FxError
from fxtunnel.model import RelayId

CONFIG = '[relay]\nid = "admin"\nstate_dir = "{folder}"\n[cluster]\nstore = "sqlite:{folder}/cluster.db"\n'
GONE, HERE = "node-00001", "node-00002"
WEEK_S = 7 * 86_400.0


def text_of(server_id: str, seq: int = 1) -> str:
    return server_text(int(server_id[-5:]), seq, 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / "cluster.db")
    yield made
    made.close()


def older(tmp_path: Path, key: str, by_s: float) -> None:
    """As if the node had reported for the last time so long ago."""
    with closing(sqlite3.connect(tmp_path / "cluster.db")) as database, database:
        changed = database.execute(
            "UPDATE documents SET updated_ms = updated_ms - ? WHERE collection = 'servers' AND key = ?", (int(by_s * 1000), key.encode())
        )
        assert changed.rowcount == 1


def there(store: SqliteStore, collection: str = SERVERS) -> list[str]:
    return sorted(document.key for document in store.documents(collection))


def two_nodes(store: SqliteStore, tmp_path: Path, silent_s: float = WEEK_S + 60) -> None:
    for server_id in (GONE, HERE):
        store.put(SERVERS, server_id, text_of(server_id))
        store.put(CONTROLS, server_id, '{"draining": true, "disable": []}')
    older(tmp_path, GONE, silent_s)


def test_only_who_was_silent_long_enough_goes_and_what_was_switched_off_stays(store: SqliteStore, tmp_path: Path) -> None:
    two_nodes(store, tmp_path)
    assert not forget_silent(store, WEEK_S + 3_600)
    (gone,) = forget_silent(store, WEEK_S)
    assert (gone.server_id, round(gone.silent_s / 60)) == (GONE, round(WEEK_S / 60) + 1)
    assert there(store) == [HERE]
    assert there(store, CONTROLS) == [GONE, HERE]
    assert not forget_silent(store, WEEK_S)
    store.close()


class ComesBack(SqliteStore):
    """Between somebody's reading of the node and his removing it, the node reports."""

    def delete_if_same(self, collection: str, document: Document) -> bool:
        if collection == SERVERS:
            self.put(SERVERS, document.key, text_of(document.key, 2))
        return super().delete_if_same(collection, document)


def test_a_node_that_comes_back_at_that_moment_stays(tmp_path: Path) -> None:
    store = ComesBack(tmp_path / "cluster.db")
    two_nodes(store, tmp_path)
    assert not forget_silent(store, WEEK_S)
    older(tmp_path, GONE, WEEK_S)
    settings = load(config(tmp_path), {})
    transporter = SqliteTransporter(tmp_path / "cluster.db")
    with pytest.raises(FxError, match="at work, and stays"):
        forget_node(settings, store, transporter, GONE)
    assert there(store) == there(store, CONTROLS) == [GONE, HERE]
    transporter.close()
    store.close()


def reserve(store: SqliteStore, ttl_ms: int) -> None:
    store.put(RESERVATION_MARKS, MARK, encode_mark(Mark(store.epoch(), 0, store.now_ms())))  # a store that has settled
    ledger = Ledger(store, RelayId("admin"), 600)
    ledger.look()
    ledger.do(ledger.updates.enter(GONE, "entry", "ann", ""))
    granted, _ = ledger.do(ledger.updates.commit(GONE, "entry", "login", "ann", OwnerRelogin.PREFER, ttl_ms))
    assert isinstance(granted, Granted)


@pytest.mark.parametrize(("ttl_ms", "left"), [(600_000, [GONE]), (1, [])])
def test_a_node_that_somebody_has_goes_when_the_rules_have_ended_that(
    store: SqliteStore, tmp_path: Path, ttl_ms: int, left: list[str]
) -> None:
    two_nodes(store, tmp_path)
    reserve(store, ttl_ms)
    time.sleep(0.005)  # longer than the short one
    number = store.update(RESERVATIONS, GONE, lambda present: None).number
    forget_silent(store, WEEK_S)
    assert [server_id for server_id in there(store) if server_id == GONE] == left
    assert there(store, RESERVATIONS) == left
    assert store.update(RESERVATIONS, GONE, lambda present: None).number == number, "a grant's number is never given twice"
    store.close()


def config(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(CONFIG.format(folder=tmp_path) + more)
    return path


def forget(tmp_path: Path, node: str) -> tuple[int, str]:
    result = CliRunner().invoke(fxrelay.cli.main, ["forget", "--config", str(config(tmp_path)), node])
    return result.exit_code, result.output


def test_an_administrator_forgets_a_node_at_once(store: SqliteStore, tmp_path: Path) -> None:
    two_nodes(store, tmp_path, silent_s=120)
    reserve(store, 600_000)
    code, output = forget(tmp_path, HERE)
    assert code == 1
    assert "it is at work" in output
    code, output = forget(tmp_path, GONE)
    assert code == 0
    assert re.fullmatch(rf"{GONE}: forgotten; it last reported 2 min \d+ s ago, and was reserved for ann\n", output)
    assert (there(store), there(store, CONTROLS), there(store, RESERVATIONS)) == ([HERE], [HERE], [])
    code, output = forget(tmp_path, GONE)
    assert code == 1
    assert f"knows no node '{GONE}'; it knows: {HERE}" in output
    left = json.loads(text_of(HERE, 2)) | {"draining": True}
    store.put(SERVERS, HERE, json.dumps(left))
    assert forget(tmp_path, HERE)[0] == 0, "one that has said that it leaves need not be waited for"
    store.close()


def test_an_export_marks_what_was_forgotten_as_deleted(store: SqliteStore, tmp_path: Path) -> None:
    two_nodes(store, tmp_path, silent_s=120)
    export = ["store", "export", "--config", str(config(tmp_path)), str(tmp_path / "files")]
    assert CliRunner().invoke(fxrelay.cli.main, export).exit_code == 0
    assert forget(tmp_path, GONE)[0] == 0
    assert CliRunner().invoke(fxrelay.cli.main, export).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "files" / "controls-store.db").read_text().splitlines()]
    assert {line["_id"]: line.get("$$deleted", False) for line in lines} == {GONE: True, HERE: False}
    store.put(CONTROLS, GONE, '{"draining": true, "disable": []}')
    assert CliRunner().invoke(fxrelay.cli.main, ["store", "import", *export[2:]]).exit_code == 0
    assert there(store, CONTROLS) == [HERE]
    store.close()


async def test_a_relay_forgets_while_it_runs(store: SqliteStore, tmp_path: Path) -> None:
    two_nodes(store, tmp_path, silent_s=60)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Forgetter(store, Threads(), 30.0).run)
            while GONE in await trio.to_thread.run_sync(there, store):
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
    assert there(store) == [HERE]
    store.close()


@pytest.mark.parametrize(("value", "is_good"), [(0, True), (90, False), (91, True), (-1, False)])
def test_a_node_is_down_before_it_is_forgotten(tmp_path: Path, value: float, is_good: bool) -> None:
    path = config(tmp_path, f"forget_after_s = {value}\n")
    if is_good:
        assert load(path, {}).cluster.forget_after_s == value
    else:
        with pytest.raises(ConfigError):
            load(path, {})
