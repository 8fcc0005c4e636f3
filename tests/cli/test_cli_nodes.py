"""`fxrelay nodes --watch` stays while the store is away."""

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
