"""`fxrelay pick` decides as a relay would, takes nothing from it, and decides the same again from what it has recorded."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import fxrelay.cli
from benchmarks.nodes import server_text
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.balance.settling import Mark, encode_mark
from fxrelay.cluster.ports import RESERVATION_MARKS, SERVERS
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.reserving.ledger import MARK, Ledger
from fxtunnel.model import RelayId

CONFIG = '[relay]\nid = "admin"\nstate_dir = "state"\n[cluster]\nstore = "sqlite:cluster.db"\n[[service]]\nname = "desk"\nport = 5901\n'
NODES = ("node-00001", "node-00002", "node-00003")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """Three nodes, of which the first has the fewest sessions and the second the most memory."""
    (tmp_path / "state").mkdir(mode=0o700)
    store = SqliteStore(tmp_path / "cluster.db")
    for number, name in enumerate(NODES, 1):
        store.put(SERVERS, name, server_text(number, 1, 1, sessions=100 * number, availmem=(2 - abs(number - 2)) << 36))
    yield store
    store.close()


def pick(tmp_path: Path, *arguments: str, more: str = "", env: dict[str, str] | None = None) -> str:
    path = tmp_path / "relay.toml"
    path.write_text(CONFIG + more)
    result = CliRunner().invoke(fxrelay.cli.main, ["pick", "--config", str(path), "desk", *arguments], env=env)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_without_entries_fastx_env_says_which(tmp_path: Path, store: SqliteStore) -> None:
    assert pick(tmp_path) == NODES[0]
    (tmp_path / "fastx.env").write_text('LOAD_BALANCER="Most Available Memory"\n')
    assert pick(tmp_path) == NODES[1]
    script = tmp_path / "last.sh"
    script.write_text("#!/bin/sh\necho node-00003\n")
    script.chmod(0o700)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "fastx.env").write_text(f"LOAD_BALANCER=custom\nLOAD_BALANCER_SCRIPT={script}\n")
    (tmp_path / "fastx.env").write_text("METADATA_A=1\n")
    elsewhere = {"FX_CONFIG_DIR": str(tmp_path / "etc")}
    assert pick(tmp_path, env=elsewhere) == NODES[2]
    assert pick(tmp_path, env={**elsewhere, "LOAD_BALANCER": "fewest"}) == NODES[0]
    assert pick(tmp_path, more='balance = ["builtin:most-available-memory"]', env=elsewhere) == NODES[1]


@pytest.mark.parametrize(("more", "said"), [([], "fxrelay: ZeroDivisionError"), (["--explain"], "no server: ZeroDivisionError")])
def test_why_nobody_is_chosen_is_said_once(tmp_path: Path, store: SqliteStore, more: list[str], said: str) -> None:
    (tmp_path / "site_bad.py").write_text("def pick(question):\n    return 1 / 0\n")
    path = tmp_path / "relay.toml"
    path.write_text(CONFIG + 'balance = ["python:site_bad:pick"]')
    done = subprocess.run(
        [sys.executable, "-m", "fxrelay.cli", "pick", "--config", str(path), "desk", *more], capture_output=True, text=True, timeout=60
    )
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("fxrelay:", "no server:"))]
    assert (done.returncode, len(told)) == (1, 1)
    assert told[0].startswith(said)


def test_what_was_meant_is_recorded_not_what_the_environment_says_later(tmp_path: Path, store: SqliteStore) -> None:
    record = str(tmp_path / "question.json")
    assert pick(tmp_path, "--record", record, env={"LOAD_BALANCER": "memory"}) == NODES[1]
    assert pick(tmp_path, "--replay", record) == NODES[1]


def test_looking_takes_no_number_from_the_relays_and_is_repeated_with_the_same(tmp_path: Path, store: SqliteStore) -> None:
    turns = 'balance = ["builtin:round-robin"]'
    record = str(tmp_path / "question.json")
    assert [pick(tmp_path, more=turns) for _ in range(2)] == [NODES[0]] * 2
    store.add("round-robin:desk", 1)
    assert pick(tmp_path, "--record", record, more=turns) == NODES[1]
    store.add("round-robin:desk", 1)
    assert pick(tmp_path, more=turns) == NODES[2]
    store.close()
    (tmp_path / "cluster.db").unlink()
    assert pick(tmp_path, "--replay", record, more=turns) == NODES[1]
    assert not (tmp_path / "cluster.db").exists()


def test_a_user_gets_his_own_node_and_others_not_one_where_somebody_is_logging_in(tmp_path: Path, store: SqliteStore) -> None:
    ledger = Ledger(store, RelayId("n1"), 600)
    store.put(RESERVATION_MARKS, MARK, encode_mark(Mark(store.epoch(), 0, store.now_ms())))
    ledger.do(ledger.updates.take(NODES[2], "login-1", "ann", "192.0.2.1", OwnerRelogin.PREFER))
    ledger.do(ledger.updates.enter(NODES[0], "entry-1", "cid", "192.0.2.3"))
    pool = "reservations = true"
    record = str(tmp_path / "question.json")
    told = pick(tmp_path, "--user", "ann", "--explain", "--record", record, more=pool)
    assert told.splitlines()[0].startswith(f"reservations  among 3: left 1: {NODES[2]}")
    assert told.endswith(NODES[2])
    assert pick(tmp_path, "--user", "bob", more=pool) == NODES[1]
    assert pick(tmp_path, "--user", "ann", more=f'{pool}\nowner_relogin = "deny"') == NODES[1]
    assert pick(tmp_path, "--user", "ann", "--action", "session/start", more=pool) == NODES[0]
    store.delete("reservations", NODES[2])
    assert pick(tmp_path, "--replay", record, more=pool) == NODES[2]
