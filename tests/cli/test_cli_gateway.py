"""The `fxgateway` command: what it refuses, what it says."""

import json
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_samples import GATEWAY_TOML
from click.testing import CliRunner, Result

import fxrelay.cli
from fxgateway.cli import main
from fxgateway.tunnels.identities import EnrolOutcome, Identities
from fxrelay.uplink.gateway_file import load_gateway_file
from fxtunnel.kit.tokens import new_key
from fxtunnel.model import RelayId

URL = "wss://gw.example.com:8443"
SECRETS = ("ca.key", "server.key", "gateway.json", "relays.json")


def fx(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], env=env)


def refused(result: Result) -> list[str]:
    """The lines of a refusal: exit 2, nothing on standard output, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("certificate", ["server.pem", "elsewhere/server.pem"])
def test_check_is_content_with_what_init_made_once_the_authority_key_is_away(made: Path, tmp_path: Path, certificate: str) -> None:
    (made / "elsewhere").mkdir()
    (made / "server.pem").rename(made / certificate)
    (made / "ca.key").rename((made / certificate).with_name("ca.key"))
    config = made / "gateway.toml"
    config.write_text(config.read_text().replace("[tunnel]\n", f'[tunnel]\ncertificate = "{certificate}"\n'))
    result = fx("check", "--config", config)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ok: ")
    (warning,) = result.stderr.splitlines()
    home = tmp_path / "fxgateway-ca"
    command = warning.partition("As root: ")[2].replace("/etc/fxgateway-ca", str(home))
    subprocess.run(["sh", "-euc", command], check=True, timeout=60)
    assert sorted(path.name for path in home.iterdir()) == ["ca.key", "ca.pem"]
    assert (mode(home), mode(home / "ca.key")) == (0o700, 0o600)
    again = fx("check", "--config", config)
    assert (again.exit_code, again.stderr) == (0, "")


def test_check_reports_every_wrong_key_in_one_go(made: Path) -> None:
    (made / "gateway.toml").write_text(GATEWAY_TOML + '[limits]\nconnections = "x"\nwrong = 1\n[log]\nlevel = "loud"\n')
    lines = refused(fx("check", "--config", made / "gateway.toml"))
    assert len(lines) == 3
    assert all(str(made / "gateway.toml") in line for line in lines)


def test_check_reports_every_wrong_file_in_one_go(made: Path) -> None:
    (made / "server.key").chmod(0o640)
    (made / "relays.json").chmod(0o644)
    (made / "gateway.json").chmod(0o604)
    lines = refused(fx("check", "--config", made / "gateway.toml"))
    assert len(lines) == 3
    for name in ("server.key", "relays.json", "gateway.json"):
        assert any(f"chmod 600 {made / name}" in line for line in lines)
    assert refused(fx("run", "--config", made / "gateway.toml")) == lines


@pytest.mark.parametrize("name", ["server.pem", "server.key"])
def test_a_missing_file_is_named(made: Path, name: str) -> None:
    (made / name).unlink()
    lines = refused(fx("check", "--config", made / "gateway.toml"))
    assert any(str(made / name) in line and "exist" in line for line in lines), lines


def test_a_certificate_that_is_a_directory(made: Path) -> None:
    (made / "server.pem").unlink()
    (made / "server.pem").mkdir()
    assert f"fxgateway: {made / 'server.pem'}: is not a regular file" in refused(fx("check", "--config", made / "gateway.toml"))


def test_the_first_steps_in_the_help_name_the_relays_configuration() -> None:
    assert "fxrelay run --config relay.toml" in fx("--help").stdout
    assert 'id = "node-a"' in CliRunner().invoke(fxrelay.cli.main, ["--help"]).stdout, "the help to which the other one points"


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), ("no certificate", "holds no certificate")])
def test_the_authority_is_checked_and_only_invite_needs_it(made: Path, content: str | None, words: str) -> None:
    (made / "ca.pem").unlink()
    if content is not None:
        (made / "ca.pem").write_text(content)
    for command in ("check", "invite"):
        (line,) = refused(fx(command, "--config", made / "gateway.toml"))
        assert (str(made / "ca.pem") in line, words in line) == (True, True), line


def test_revoking_says_that_the_enrolment_file_is_void(made: Path) -> None:
    identities = Identities(made / "relays.json")
    token = json.loads((made / "gateway.json").read_text())["enrolment"]["token"]
    for relay_id in ("node-a", "node-b"):
        assert identities.enrol(RelayId(relay_id), new_key().public_key(), token).outcome is EnrolOutcome.ENROLLED
    first = fx("revoke", "--config", made / "gateway.toml", "node-a")
    assert (first.exit_code, "A fresh one: fxgateway invite" in first.stdout) == (0, True), first.output
    second = fx("revoke", "--config", made / "gateway.toml", "node-b")
    assert (second.exit_code, "invite" in second.stdout) == (0, False), "it was void before"


def test_a_withdrawn_enrolment_file_lets_nobody_in(made: Path, tmp_path: Path) -> None:
    config, first, second = made / "gateway.toml", made / "gateway.json", tmp_path / "second.json"
    assert fx("invite", "--config", config, "--out", second).exit_code == 0
    tokens = [json.loads(path.read_text())["enrolment"]["token"] for path in (first, second)]
    identities = Identities(made / "relays.json")
    assert identities.enrol(RelayId("early"), new_key().public_key(), tokens[0]).outcome is EnrolOutcome.ENROLLED
    assert fx("withdraw", "--config", config, first).exit_code == 0
    again = fx("withdraw", "--config", config, first)
    assert (again.exit_code, "does not know the token" in again.stderr) == (1, True)
    assert identities.enrol(RelayId("late"), new_key().public_key(), tokens[0]).outcome is EnrolOutcome.BAD_TOKEN
    assert identities.enrol(RelayId("late"), new_key().public_key(), tokens[1]).outcome is EnrolOutcome.ENROLLED
    assert "2 had not expired" not in (everything := fx("withdraw", "--config", config, "--all").stdout)
    assert "1 had not expired" in everything
    assert identities.enrol(RelayId("later"), new_key().public_key(), tokens[1]).outcome is EnrolOutcome.BAD_TOKEN
    identities.load()
    assert {relay.relay_id for relay in identities.known()} == {"early", "late"}
    for wrong in ([], ["--all", str(first)], [str(made / "ca.pem")]):
        assert fx("withdraw", "--config", config, *wrong).exit_code == 2


def test_ports_in_use_are_named(made: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [first.getsockname()[1], second.getsockname()[1]]
        env = {"FXGATEWAY__DOOR__0__LISTEN": f"127.0.0.1:{ports[0]}", "FXGATEWAY__TUNNEL__LISTEN": f"127.0.0.1:{ports[1]}"}
        lines = refused(fx("check", "--config", made / "gateway.toml", env=env))
        assert len(lines) == 2
        assert all(any(str(port) in line for line in lines) for port in ports)
        assert fx("check", "--no-bind", "--config", made / "gateway.toml", env=env).exit_code == 0


def test_an_address_of_another_machine(made: Path) -> None:
    lines = refused(fx("check", "--config", made / "gateway.toml", env={"FXGATEWAY__DOOR__0__LISTEN": "192.0.2.1:2222"}))
    assert len(lines) == 1
    assert "192.0.2.1" in lines[0]


def test_unix_sockets_are_tried_and_taken_away_again(made: Path) -> None:
    env = {"FXGATEWAY__ADMIN__LISTEN": "unix:admin.sock", "FXGATEWAY__DOOR__0__LISTEN": "unix:door.sock"}
    assert fx("check", "--config", made / "gateway.toml", env=env).exit_code == 0
    assert not (made / "admin.sock").exists()
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(made / "door.sock"))
        live.listen()
        assert "door.sock" in refused(fx("check", "--config", made / "gateway.toml", env=env))[0]
    assert (made / "door.sock").exists()


def test_an_admin_address_for_everyone_is_warned_of(made: Path) -> None:
    result = fx("check", "--config", made / "gateway.toml", env={"FXGATEWAY__ADMIN__LISTEN": "0.0.0.0:0"})
    assert result.exit_code == 0
    assert "warning: admin.listen" in result.stderr


def test_the_configuration_is_found_by_the_environment(made: Path) -> None:
    assert fx("check", env={"FXGATEWAY_CONFIG": str(made / "gateway.toml")}).exit_code == 0


def test_no_configuration(tmp_path: Path) -> None:
    lines = refused(fx("check", "--config", tmp_path / "none.toml"))
    assert len(lines) == 1
    assert "none.toml" in lines[0]


@contextmanager
def answering(pages: dict[str, object]) -> Iterator[int]:
    """An admin address that answers with fixed JSON."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    path = connection.recv(65536).split()[1].decode()
                    body = json.dumps(pages.get(path, {})).encode()
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
                    connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


LINK = {"session": "a", "up": True, "streams": 3, "rtt_ms": 9.5, "bytes_in": 1, "bytes_out": 2, "resumed": 4}
RELAY = {
    "relay_id": "node-a",
    "instance": "i",
    "epoch": 2,
    "state": "up",
    "remote_address": "127.0.0.9:77",
    "connected_s": 90_061.0,
    "services": ["ssh", "[red]\x1b[31m"],
    "links": [LINK, {**LINK, "up": False, "streams": 2, "rtt_ms": 10.5}],
}
DOOR = {"name": "d", "listen": "0.0.0.0:2222", "service": "ssh", "connections": 7, "accepted": 70, "refused": {"no-relay": 3}}


def test_relays_of_a_running_gateway(made: Path) -> None:
    pages = {"/relays": {"gateway": {"gateway_id": "x"}, "relays": [RELAY], "doors": [DOOR], "not_ready": ["the gateway is draining"]}}
    with answering(pages) as port:
        env = {"FXGATEWAY__ADMIN__LISTEN": f"127.0.0.1:{port}"}
        table = fx("relays", "--config", made / "gateway.toml", env=env)
        as_json = fx("relays", "--json", "--config", made / "gateway.toml", env=env)
    assert table.exit_code == 0, table.output
    for words in ("node-a", "127.0.0.9:77", "1 d 1 h", "1/2", "9.5 ms", "no-relay 3", "[red]?[31m", "not ready: the gateway is draining"):
        assert words in table.stdout, table.stdout
    assert "\x1b" not in table.stdout
    found = json.loads(as_json.stdout)
    assert found["running"] is True
    assert found["relays"] == [RELAY]


def test_relays_that_are_enrolled_but_not_here_are_shown(node_a: Path) -> None:
    pages = {"/relays": {"gateway": {}, "relays": [{**RELAY, "relay_id": "node-b"}], "doors": []}}
    with answering(pages) as port:
        env = {"FXGATEWAY__ADMIN__LISTEN": f"127.0.0.1:{port}"}
        lines = fx("relays", "--config", node_a / "gateway.toml", env=env).stdout.splitlines()
        assert any(line.split()[:2] == ["node-a", "absent"] for line in lines), lines
        assert any(line.split()[:2] == ["node-b", "up"] for line in lines), lines
        (node_a / "relays.json").chmod(0o644)
        readable = fx("relays", "--config", node_a / "gateway.toml", env=env)
        assert readable.exit_code == 0
        assert "node-a" not in readable.stdout
    assert fx("relays", "--config", node_a / "gateway.toml", env=env).exit_code == 2


def test_check_beside_the_running_gateway(made: Path) -> None:
    """Before SIGHUP: its own addresses are in use by itself."""
    gateway_id = load_gateway_file(made / "gateway.json").gateway_id
    with socket.create_server(("127.0.0.1", 0)) as door:
        listen = f"127.0.0.1:{door.getsockname()[1]}"
        pages: dict[str, object] = {"/relays": {"gateway": {"gateway_id": gateway_id, "listening": [listen]}}}
        with answering(pages) as port:
            pages["/relays"]["gateway"]["listening"].append(f"127.0.0.1:{port}")
            env = {"FXGATEWAY__ADMIN__LISTEN": f"127.0.0.1:{port}", "FXGATEWAY__DOOR__0__LISTEN": listen}
            assert fx("check", "--config", made / "gateway.toml", env=env).exit_code == 0
            pages["/relays"]["gateway"]["gateway_id"] = "another"
            assert len(refused(fx("check", "--config", made / "gateway.toml", env=env))) == 2


def test_help_shows_how_to_begin() -> None:
    text = fx("--help").stdout
    for words in ("fxgateway init --dir", "Exit codes", "_FXGATEWAY_COMPLETE", "FXGATEWAY__TUNNEL__LISTEN", "revoke", "invite"):
        assert words in text
    for name in main.commands:
        assert fx(name, "--help").exit_code == 0


def test_as_a_process(made: Path) -> None:
    def start(*args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "fxgateway.cli", *args], capture_output=True, text=True, timeout=60)

    assert start("--version").stdout.startswith("fxgateway, version ")
    assert start("check", "--config", str(made / "gateway.toml")).returncode == 0
    (made / "server.key").chmod(0o644)
    wrong = start("run", "--config", str(made / "gateway.toml"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "chmod 600" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert start("nonsense").returncode == 2


def test_help_says_what_each_command_does_to_the_end() -> None:
    for program in (main, fxrelay.cli.main):
        assert "..." not in CliRunner().invoke(program, ["--help"]).stdout.partition("Commands:")[2].partition("Examples:")[0]


def test_help_needs_no_heavy_module() -> None:
    heavy = {"pydantic", "cryptography", "trio", "rich", "starlette", "ssl"}
    code = f"import sys, fxgateway.cli, fxrelay.cli; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


@pytest.fixture
def node_a(made: Path) -> Path:
    """A gateway's directory, at which node-a is enrolled."""
    file = load_gateway_file(made / "gateway.json")
    assert file.enrolment is not None
    outcome = (
        Identities(made / "relays.json").enrol(RelayId("node-a"), new_key().public_key(), file.enrolment.token.get_secret_value()).outcome
    )
    assert outcome is EnrolOutcome.ENROLLED
    return made


def test_relays_without_a_gateway_shows_who_is_enrolled(node_a: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        env = {"FXGATEWAY__ADMIN__LISTEN": f"127.0.0.1:{unused.getsockname()[1]}"}
    table = fx("relays", "--config", node_a / "gateway.toml", env=env)
    assert table.exit_code == 0, table.output
    assert "does not answer" in table.stderr
    assert "node-a" in table.stdout
    found = json.loads(fx("relays", "--json", "--config", node_a / "gateway.toml", env=env).stdout)
    assert (found["running"], found["relays"]) == (False, [])
    assert [(r["relay_id"], r["state"], len(r["kids"])) for r in found["enrolled"]] == [("node-a", "enrolled", 1)]


def test_revoke_and_forget(node_a: Path) -> None:
    env = {"FXGATEWAY__ADMIN__LISTEN": "unix:none.sock"}

    def states() -> list[str]:
        result = fx("relays", "--json", "--config", node_a / "gateway.toml", env=env)
        return [relay["state"] for relay in json.loads(result.stdout)["enrolled"]]

    assert fx("revoke", "node-a", "--config", node_a / "gateway.toml").exit_code == 0
    assert states() == ["revoked"]
    assert fx("forget", "node-a", "--config", node_a / "gateway.toml").exit_code == 0
    assert states() == []
    for command in ("revoke", "forget"):
        result = fx(command, "node-a", "--config", node_a / "gateway.toml")
        assert result.exit_code == 1
        assert "no relay node-a" in result.stderr
