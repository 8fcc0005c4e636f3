"""`fxrelay nodes`: what it shows of a relay that has ended; with --watch it stays while the store is away."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import fxrelay.cli
import fxrelay.cluster_cli
from benchmarks.nodes import server_text
from fxrelay.cluster.ports import SERVERS
from fxrelay.cluster.sqlite_store import SqliteStore


def test_watching_goes_on_while_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "relay.toml"
    path.write_text('[relay]\nid = "admin"\nstate_dir = "state"\n[cluster]\nstore = "sqlite:cluster.db"\n')
    database = tmp_path / "cluster.db"
    database.write_bytes(b"no database" * 1_000)
    database.chmod(0o600)
    looks = 0

    def look_again(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            database.unlink()
            store = SqliteStore(database)
            store.put(SERVERS, "node-00001", server_text(1, 1, 1))
            store.close()
        elif looks == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(fxrelay.cluster_cli.time, "sleep", look_again)
    watched = CliRunner().invoke(fxrelay.cli.main, ["nodes", "--config", str(path), "--watch"])
    assert watched.stderr.count("the store does not answer") == 1, watched.output
    assert watched.stdout.count("node-00001") == 2
    assert (watched.exit_code, "Aborted" in watched.stderr) == (0, False), "Ctrl-C is how one stops watching"
    database.write_bytes(b"no database" * 1_000)
    once = CliRunner().invoke(fxrelay.cli.main, ["nodes", "--config", str(path)])
    assert once.exit_code == 1


@pytest.mark.parametrize(("is_over", "shown"), [(False, " up (off: drain) "), (True, " ended ")])
def test_a_relay_that_has_ended_is_not_shown_as_up(tmp_path: Path, is_over: bool, shown: str) -> None:
    path = tmp_path / "relay.toml"
    path.write_text('[relay]\nid = "admin"\nstate_dir = "state"\n[cluster]\nstore = "sqlite:cluster.db"\n')
    text = json.loads(server_text(1, 1, 1))
    text["agent"] |= {"ended": True} if is_over else {}
    store = SqliteStore(tmp_path / "cluster.db")
    store.put(SERVERS, "node-00001", json.dumps(text | {"draining": True}))
    store.close()
    table = CliRunner().invoke(fxrelay.cli.main, ["nodes", "--config", str(path)], env={"COLUMNS": "250"}).stdout
    assert (shown in table, "(off: drain)" in table) == (True, not is_over), table
    listed = CliRunner().invoke(fxrelay.cli.main, ["nodes", "--config", str(path), "--json"]).stdout
    assert json.loads(listed)[0]["state"] == ("ended" if is_over else "up")
