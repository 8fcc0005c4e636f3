"""`fxgateway init` and `fxgateway invite`: what they write, and what they refuse to overwrite."""

import json
import os
import re
import stat
import subprocess
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner, Result

import fxgateway.settings
from fxgateway.cli import main
from fxgateway.settings import GatewaySettings
from fxgateway.setup import FILES
from fxrelay.uplink.gateway_file import load_gateway_file

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


def test_init_writes_everything(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "gw"
    old_umask = os.umask(0)
    try:
        result = fx("init", "--dir", directory, "--public-url", URL)
    finally:
        os.umask(old_umask)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in directory.iterdir()) == sorted(FILES)
    assert mode(directory) == 0o700
    assert all(mode(directory / name) == 0o600 for name in SECRETS)
    settings = fxgateway.settings.load(directory / "gateway.toml", {})
    assert str(settings.tunnel.listen) == "0.0.0.0:8443"
    assert [(str(door.listen), door.service) for door in settings.doors] == [("0.0.0.0:2222", "ssh")]
    assert str(settings.admin.listen) == "127.0.0.1:9101"
    file = load_gateway_file(directory / "gateway.json")
    assert file.gateway_id == settings.tunnel.gateway_id
    assert file.ca_pem == (directory / "ca.pem").read_text()
    assert [str(url) for url in file.urls] == [URL]
    assert file.enrolment is not None
    left_s = file.enrolment.expires_unix - datetime.now(UTC).timestamp()
    assert 6.9 < left_s / 86_400 <= 7
    token = file.enrolment.token.get_secret_value()
    assert token not in (directory / "relays.json").read_text()
    assert token not in result.output


def test_init_says_where_ca_key_goes_and_the_command_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxgateway.setup.AUTHORITY_DIR", str(tmp_path / "root only"))
    directory = tmp_path / "gate way"
    result = fx("init", "--dir", directory, "--public-url", URL)
    assert "next: move ca.key" in result.stdout
    (command,) = [line.strip() for line in result.stdout.splitlines() if line.strip().startswith("install ")]
    subprocess.run(["sh", "-ec", command], check=True)
    assert not (directory / "ca.key").exists()
    assert (directory / "ca.pem").exists()
    assert [(mode(path), path.name) for path in sorted((tmp_path / "root only").iterdir())] == [(0o600, "ca.key"), (0o600, "ca.pem")]


@pytest.mark.parametrize(("url", "is_told"), [("wss://gw.example.com", True), ("wss://gw.example.com:443", False)])
def test_a_url_without_a_port_means_443_and_init_says_so(tmp_path: Path, url: str, is_told: bool) -> None:
    result = fx("init", "--dir", tmp_path / "gw", "--public-url", url)
    assert ("names no port: relays dial 443" in result.stdout) is is_told
    assert str(fxgateway.settings.load(tmp_path / "gw" / "gateway.toml", {}).tunnel.listen) == "0.0.0.0:443"
    assert load_gateway_file(tmp_path / "gw" / "gateway.json").urls[0].port == 443


def test_a_minimal_configuration_belongs_to_the_same_gateway(tmp_path: Path) -> None:
    fx("init", "--dir", tmp_path / "gw", "--public-url", URL)
    (tmp_path / "gw" / "gateway.toml").write_text(f'[tunnel]\nlisten = "127.0.0.1:0"\npublic_url = "{URL}"\n')
    settings = fxgateway.settings.load(tmp_path / "gw" / "gateway.toml", {})
    assert settings.tunnel.gateway_id == load_gateway_file(tmp_path / "gw" / "gateway.json").gateway_id


def test_the_written_defaults_are_the_defaults(tmp_path: Path) -> None:
    fx("init", "--dir", tmp_path / "gw", "--public-url", URL)
    path = tmp_path / "gw" / "gateway.toml"
    before = fxgateway.settings.load(path, {})
    lines = path.read_text().splitlines()
    settings_at = lines.index("[limits]")
    uncommented = [line[2:] if line.startswith("# ") and " = " in line else line for line in lines[settings_at:]]
    text = "\n".join(lines[:settings_at] + uncommented)
    assert len(tomllib.loads(text)["limits"]) == len(type(before.limits).model_fields)
    path.write_text(text)
    assert fxgateway.settings.load(path, {}) == before


def test_every_key_is_in_the_written_configuration(tmp_path: Path) -> None:
    fx("init", "--dir", tmp_path / "gw", "--public-url", URL)
    text = re.sub("(?m)^# (?=[a-z_]+ = |\\[)", "", (tmp_path / "gw" / "gateway.toml").read_text())
    sections = dict(re.findall(r"(?ms)^\[+(\w+)\]+\n(.*?)(?=^\[|\Z)", text))
    for name, key in GatewaySettings.model_fields.items():
        model = next(iter(get_args(key.annotation)), key.annotation)
        if name == "certificates":  # described at the door that needs it
            continue
        for inner in model.model_fields:
            assert re.search(rf"(?m)^{inner} = ", sections[key.alias or name]), f"{name}.{inner}"


def test_init_twice_changes_nothing(tmp_path: Path) -> None:
    fx("init", "--dir", tmp_path, "--public-url", URL)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    lines = refused(fx("init", "--dir", tmp_path, "--public-url", "wss://other:1"))
    assert len(lines) == len(FILES)
    assert "exists" in lines[0]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_one_file_that_is_there_is_enough_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "server.key").write_text("precious")
    lines = refused(fx("init", "--dir", tmp_path, "--public-url", URL))
    assert len(lines) == 1
    assert "server.key" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["server.key"]


def test_force_replaces_everything(tmp_path: Path) -> None:
    fx("init", "--dir", tmp_path, "--public-url", URL)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert fx("init", "--dir", tmp_path, "--public-url", "wss://other:1", "--force").exit_code == 0
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    assert all(mode(tmp_path / name) == 0o600 for name in SECRETS)


def test_a_failing_force_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fx("init", "--dir", tmp_path, "--public-url", URL)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxgateway.setup.render_config", full)
    assert "No space left" in refused(fx("init", "--dir", tmp_path, "--public-url", URL, "--force"))[0]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("url", ["gw:1", "ws://gw:1", "wss://gw/x", "wss://", 'wss://g"w:1', "wss://gw..x:1"])
def test_init_with_a_wrong_url_writes_nothing(tmp_path: Path, url: str) -> None:
    assert "wss://HOST[:PORT]" in refused(fx("init", "--dir", tmp_path / "gw", "--public-url", url))[0]
    assert not (tmp_path / "gw").exists()


@pytest.mark.parametrize("days", ["0", "366", "x"])
def test_token_days_are_bounded(tmp_path: Path, days: str) -> None:
    assert fx("init", "--dir", tmp_path / "gw", "--public-url", URL, "--token-days", days).exit_code == 2


def test_init_for_an_ipv6_host(tmp_path: Path) -> None:
    assert fx("init", "--dir", tmp_path, "--public-url", "wss://[::1]:8443").exit_code == 0
    settings = fxgateway.settings.load(tmp_path / "gateway.toml", {})
    assert str(settings.tunnel.listen) == "[::]:8443"
    assert settings.tunnel.public_host == "::1"


def test_invite_makes_another_token(made: Path) -> None:
    before = load_gateway_file(made / "gateway.json")
    assert fx("invite", "--config", made / "gateway.toml", "--token-days", "1").exit_code == 0
    after = load_gateway_file(made / "gateway.json")
    assert before.enrolment is not None
    assert after.enrolment is not None
    assert before.enrolment.token.get_secret_value() != after.enrolment.token.get_secret_value()
    assert (before.gateway_id, before.ca_pem) == (after.gateway_id, after.ca_pem)
    assert mode(made / "gateway.json") == 0o600


def test_invite_elsewhere_and_to_standard_output(made: Path, tmp_path: Path) -> None:
    before = (made / "gateway.json").read_bytes()
    assert fx("invite", "--config", made / "gateway.toml", "--out", tmp_path / "b.json").exit_code == 0
    assert load_gateway_file(tmp_path / "b.json").enrolment is not None
    result = fx("invite", "--config", made / "gateway.toml", "--out", "-")
    assert json.loads(result.stdout)["enrolment"]["token"].startswith("fxe_")
    assert (made / "gateway.json").read_bytes() == before


def test_invite_never_overwrites_something_else(made: Path) -> None:
    before = (made / "server.key").read_bytes()
    lines = refused(fx("invite", "--config", made / "gateway.toml", "--out", made / "server.key"))
    assert "not an enrolment file" in lines[0]
    assert (made / "server.key").read_bytes() == before
