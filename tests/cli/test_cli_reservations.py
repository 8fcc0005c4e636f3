"""Settings of reservations, and the commands that show and release them, on a store that no relay runs on."""

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

import fxrelay.cli
from fxrelay.balance.reservations import Granted, OwnerRelogin
from fxrelay.balance.settling import Mark, encode_mark
from fxrelay.cluster.ports import RESERVATION_MARKS
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.reserving.ledger import MARK, Ledger
from fxrelay.settings import load
from fxtunnel.errors import ConfigError
from fxtunnel.kit.logs import RateLimited
from fxtunnel.model import RelayId

POOL = '[relay]\nid = "n1"\nstate_dir = "{state}"\n[cluster]\nlease_s = 600\n[[service]]\nname = "desk"\nport = 22\n'


def config(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(POOL.format(state=tmp_path / "state") + more)
    return path


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ('reservations = true\naction = "session/start"', "a stream that reserves a node is a user/login"),
        ("linger_s = 3", "only for a pool with reservations"),
        ("queue = {max = 1, wait_s = 1}", "only for a pool with reservations"),
        ("reservations = true\nguard_start = true", "only for a pool whose action is session/start"),
        ("reservations = true\nqueue = {max = 0}", "at least 1"),
        ('reservations = true\n[[service]]\nname = "x"\ntarget = "127.0.0.1:1"\nreservations = true', "only for a pool"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, more: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(config(tmp_path, more), {})


def test_settings_of_a_pool_with_reservations(tmp_path: Path) -> None:
    (service,) = load(config(tmp_path, "reservations = true\nlinger_s = 5\nqueue = {wait_s = 9}"), {}).services
    assert service.is_login
    assert service.queue is not None
    assert (service.linger_s, service.queue.max, service.queue.wait_s) == (5, 100, 9)


def test_reservations_are_shown_and_released(tmp_path: Path) -> None:
    path = config(tmp_path, "reservations = true")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(fxrelay.cli.main, [arguments[0], "--config", str(path), *arguments[1:]])
        assert result.exit_code == 0, result.output
        return result.output

    assert json.loads(run("reservations", "--json")) == []
    store = SqliteStore(tmp_path / "state" / "cluster.db")
    store.put(RESERVATION_MARKS, MARK, encode_mark(Mark(store.epoch(), 0, store.now_ms())))  # a store that has settled
    ledger = Ledger(store, RelayId("n1"), 600)
    outcome, _ = ledger.do(ledger.updates.take("n7", "login-1", "ann", "192.0.2.1", OwnerRelogin.PREFER))
    assert isinstance(outcome, Granted)
    ledger.do(ledger.updates.enter("n8", "entry-1", "bob", "192.0.2.2"))
    held, pending = json.loads(run("reservations", "--json"))
    assert (held["serverId"], held["user"], held["logins"], held["epoch"]) == ("n7", "ann", 1, outcome.token.fence)
    assert (pending["serverId"], pending["user"], pending["entries"]) == ("n8", None, 1)
    assert "ann" in run("reservations")
    assert "reserved for ann" in run("release", "n7")
    assert "was not reserved" in run("release", "n7")
    store.put("reservations", "n7", "{damaged")
    assert "was not reserved" in run("release", "n7")
    assert ledger.do(ledger.updates.take("n7", "login-2", "bob", "192.0.2.1", OwnerRelogin.PREFER))[1].record.fence > outcome.token.fence
    store.close()


def test_audit_lines_are_never_left_out() -> None:
    limited = RateLimited(limit=1)
    records = [logging.makeLogRecord({"name": "a", "msg": "m", "audit": True}) for _ in range(5)]
    assert all(limited.filter(record) for record in records)
    assert records[-1].msg == "m"
