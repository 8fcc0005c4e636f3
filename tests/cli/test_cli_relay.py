"""The `fxrelay` command: what it refuses, and what it says."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_samples import RELAY_TOML
from click.testing import CliRunner, Result

from fxrelay.cli import main


def fx(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], env=env)


def refused(result: Result) -> list[str]:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


@pytest.fixture
def relay(made: Path) -> Path:
    """The path of a relay.toml beside a good gateway.json."""
    path = made / "relay.toml"
    path.write_text(RELAY_TOML)
    return path


def test_check_is_content(relay: Path) -> None:
    result = fx("check", "--config", relay)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ok: ")
    assert result.stderr == ""
    assert not (relay.parent / "state").exists()


def test_every_wrong_file_in_one_go(relay: Path) -> None:
    state = relay.parent / "state"
    state.mkdir()
    state.chmod(0o755)
    (state / "relay.key").write_text("x")
    (state / "relay.key").chmod(0o644)
    (relay.parent / "gateway.json").chmod(0o644)
    lines = refused(fx("check", "--config", relay))
    assert len(lines) == 3
    for command in (f"chmod 600 {relay.parent / 'gateway.json'}", f"chmod 700 {state}", f"chmod 600 {state / 'relay.key'}"):
        assert any(command in line for line in lines), lines
    assert refused(fx("run", "--config", relay)) == lines


def test_a_missing_enrolment_file(relay: Path) -> None:
    (relay.parent / "gateway.json").unlink()
    lines = refused(fx("check", "--config", relay))
    assert len(lines) == 1
    assert "gateway.json" in lines[0]


def test_an_enrolment_file_without_its_token_is_enough(relay: Path) -> None:
    path = relay.parent / "gateway.json"
    content = json.loads(path.read_text())
    del content["enrolment"]
    path.write_text(json.dumps(content))
    assert fx("check", "--config", relay).exit_code == 0


def test_a_node_is_drained_without_being_watched(relay: Path) -> None:
    result = fx("drain", "node-b", "--timeout", "5", "--config", relay)
    assert result.exit_code == 2
    assert "nothing is watched" in result.stderr


def test_a_damaged_enrolment_file_does_not_show_its_token(relay: Path) -> None:
    path = relay.parent / "gateway.json"
    content = json.loads(path.read_text())
    content["urls"] = ["http://x"]
    path.write_text(json.dumps(content))
    lines = refused(fx("check", "--config", relay))
    assert "urls" in lines[0]
    assert content["enrolment"]["token"] not in "".join(lines)


def test_an_expired_token_is_warned_of_until_the_relay_is_enrolled(relay: Path) -> None:
    path = relay.parent / "gateway.json"
    content = json.loads(path.read_text())
    content["enrolment"]["expires_unix"] -= 10 * 86_400
    path.write_text(json.dumps(content))
    result = fx("check", "--config", relay)
    assert result.exit_code == 0
    assert "expired 3.0 days ago" in result.stderr
    state = relay.parent / "state"
    state.mkdir(mode=0o700)
    (state / f"enrolled-{content['gateway_id']}.json").write_text("{}")
    assert fx("check", "--config", relay).stderr == ""


def test_what_cannot_be_reached_now_is_a_warning(relay: Path) -> None:
    text = RELAY_TOML.replace("127.0.0.1:22", "no-such-host.invalid:22")
    relay.write_text(f'{text}[[service]]\nname = "x"\ntarget = "unix:x.sock"\n')
    result = fx("check", "--config", relay)
    assert result.exit_code == 0
    assert "no-such-host.invalid does not resolve" in result.stderr
    assert f"{relay.parent / 'x.sock'} is not a socket" in result.stderr


def test_every_wrong_key_in_one_go(relay: Path) -> None:
    relay.write_text(RELAY_TOML.replace("node-a", "node a") + "[limits]\nstreams = 0\nwrong = 1\n")
    assert len(refused(fx("check", "--config", relay))) == 3


def test_a_status_socket_with_too_long_a_name(relay: Path) -> None:
    lines = refused(fx("check", "--config", relay, env={"FXRELAY__RELAY__STATUS": "x" * 120}))
    assert "relay.status" in lines[0]


def test_status_without_a_relay(relay: Path) -> None:
    result = fx("status", "--config", relay)
    assert result.exit_code == 1
    assert "is it running?" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@contextmanager
def answering(path: Path, content: object) -> Iterator[None]:
    """A status socket that answers with fixed JSON."""
    body = json.dumps(content).encode()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_status_of_a_running_relay(relay: Path) -> None:
    link = {"session": "a", "up": True, "streams": 3, "rtt_ms": 9.5, "bytes_in": 1, "bytes_out": 2, "resumed": 4}
    uplink = {
        "gateway_id": "gw-1", "url": "wss://gw:1", "state": "up", "epoch": 1, "connected_s": 3_700.0, "next_try_s": None, "last_error": "",
        "attempts": 1, "links": [link],
    }  # fmt: skip
    waiting = {**uplink, "gateway_id": "gw-2", "state": "waiting", "next_try_s": 12.3, "last_error": "refused\x1b[2J", "links": []}
    service = {
        "name": "ssh", "protocol": "tcp", "target": "127.0.0.1:22", "streams": 3, "opened": 9, "refused": {"busy": 1},
        "paths": {"direct": 4},
    }  # fmt: skip
    cluster = {
        "nodes": {"up": 2, "stale": 0, "down": 1}, "in_flight": 3, "store_down_s": 65.0, "last_error": "refused", "live": False,
        "quarrels": ["node-b"], "problems": ["static-data.json: no object"], "switched_off": {"node-c": ["drain", "login"]},
    }  # fmt: skip
    content = {"relay": {"relay_id": "node-a", "uptime_s": 61.0}, "uplinks": [uplink, waiting], "services": [service], "cluster": cluster}
    content["reservations"] = {"servers": 3, "held": 2, "waiting": {"desk": 4}, "events": {"committed": 9}, "last_error": "away"}
    state = relay.parent / "state"
    state.mkdir(mode=0o700)
    with answering(state / "status.sock", content):
        table = fx("status", "--config", relay)
        as_json = fx("status", "--json", "--config", relay)
    assert table.exit_code == 0, table.output
    assert "reservations: 3 servers; 2 logins by this relay; 4 wait" in table.output
    assert "reserved servers are given to nobody: away" in table.output
    for words in (
        "relay node-a, up for 1 min 1 s",
        "1 h 1 min",
        "1/1",
        "9.5 ms",
        "next in 12 s",
        "refused?[2J",
        "busy 1",
        "direct 4",
        "2 up, 1 down",
        "1 min 5 s",
        "node-b",
        "static-data.json: no object",
        "switched off on node-c: drain, login",
    ):
        assert words in table.stdout, table.stdout
    assert "\x1b" not in table.stdout
    assert json.loads(as_json.stdout) == content


def test_status_of_a_relay_that_drains_and_has_no_gateway(relay: Path) -> None:
    cluster = {
        "nodes": {"up": 1}, "in_flight": 0, "store_down_s": 0.0, "last_error": "", "live": True,
        "quarrels": [], "problems": [], "switched_off": {},
    }  # fmt: skip
    reservations = {"servers": 0, "held": 0, "waiting": {}, "events": {}, "last_error": ""}
    content = {"relay": {"relay_id": "node-a", "uptime_s": 61.0, "is_draining": True}, "uplinks": [], "services": [], "cluster": cluster}
    state = relay.parent / "state"
    state.mkdir(mode=0o700)
    with answering(state / "status.sock", {**content, "reservations": reservations}):
        lines = fx("status", "--config", relay).stdout.splitlines()
    assert lines[0] == "relay node-a, up for 1 min 1 s; draining: nothing new until it is restarted"
    assert lines[1].startswith("no gateway:")


def test_check_looks_at_chains_and_broker(relay: Path) -> None:
    (relay.parent / "broker.json").write_text('{"transporterType": "redis", "host": "127.0.0.1", "password": "p"}')
    (relay.parent / "broker.json").chmod(0o644)
    relay.write_text(
        relay.read_text()
        + '[cluster]\nbroker = "broker.json"\n'
        + '[[service]]\nname = "desk"\nport = 5901\nbalance = ["builtin:nearest", "exec:not-there"]\n'
    )
    result = fx("check", "--config", relay)
    assert result.exit_code == 2
    for words in ("chmod 600", "builtin:nearest", "fewest-sessions", "not-there"):
        assert words in result.stderr, result.stderr


def test_help_shows_how_to_begin() -> None:
    text = fx("--help").stdout
    for words in ("fxrelay run", "[[gateway]]", "Exit codes", "_FXRELAY_COMPLETE"):
        assert words in text
    for name in main.commands:
        assert fx(name, "--help").exit_code == 0


def test_as_a_process(relay: Path) -> None:
    def start(*args: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fxrelay.cli", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "FXRELAY_CONFIG": str(relay)})

    assert start("--version").stdout.startswith("fxrelay, version ")
    assert start("check").returncode == 0
    (relay.parent / "gateway.json").chmod(0o644)
    wrong = start("run")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "chmod 600" in wrong.stderr
