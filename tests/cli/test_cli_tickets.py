"""`fxrelay ticket`, the configuration of guarded services, and where `fxgateway connect` finds tickets."""

import os
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import fxgateway.cli
import fxrelay.cli
from fxgateway.connect import ticket_source
from fxrelay.admitting.composing import load_keys
from fxrelay.admitting.ticket import TicketRules, read_ticket
from fxrelay.settings import load
from fxtunnel.errors import ConfigError, FxError
from fxtunnel.kit.signed_claims import Algorithm
from fxtunnel.model import ServiceName

SSH = ServiceName("ssh")


def run(*words: str) -> Result:
    return CliRunner().invoke(fxrelay.cli.main, ["ticket", *words])


def make_key(tmp_path: Path) -> Path:
    done = run("keygen", "--out", str(tmp_path / "tickets.key"))
    assert done.exit_code == 0, done.output
    return tmp_path / "tickets.key"


def test_a_key_and_a_ticket_that_a_relay_takes(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "PRIVATE" not in (tmp_path / "tickets.pub").read_text()
    words = ("--key", str(key), "--sub", "alice", "--service", "ssh", "--node", "node-a", "--groups", "cad,gpu", "--ttl", "30")
    done = run("mint", *words)
    assert (done.exit_code, done.output.count("\n")) == (0, 1)
    ticket = read_ticket(done.output.strip(), TicketRules(load_keys(tmp_path / "tickets.pub"), "ssh"), SSH, time.time())
    assert (ticket.user, ticket.node, ticket.groups) == ("alice", "node-a", ("cad", "gpu"))
    assert run("mint", *words).output != done.output


def test_an_audience_an_issuer_and_a_key_id(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    words = ("--audience", "cluster-1", "--issuer", "portal", "--ttl", "3600")
    done = run("mint", "--key", str(key), "--sub", "a", "--service", "ssh", *words)
    rules = TicketRules(load_keys(tmp_path / "tickets.pub"), "cluster-1", "portal", max_life_s=3_600)
    assert read_ticket(done.output.strip(), rules, SSH, time.time()).user == "a"


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    before = key.read_bytes()
    assert run("keygen", "--out", str(key)).exit_code != 0
    key.unlink()
    assert run("keygen", "--out", str(key)).exit_code != 0  # its public key is still there
    assert before
    assert run("keygen", "--out", str(tmp_path / "other.pub")).exit_code == 2
    assert not (tmp_path / "other.pub").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--service", "a/b"),
        ("--node", "x y", "--service", "ssh"),
        ("--ttl", "0"),
        ("--ttl", "3601"),
        ("--sub", ""),
        ("--sub", " alice"),
        ("--sub", "192.0.2.7"),
        ("--sub", "a" * 129),
    ],
)
def test_tickets_that_no_relay_would_take(tmp_path: Path, words: tuple[str, ...]) -> None:
    base = ("--service", "ssh") if "--service" not in words else ()
    assert run("mint", "--key", str(make_key(tmp_path)), "--sub", "alice", *base, *words).exit_code == 2


def test_a_private_key_that_others_may_read(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    key.chmod(0o644)
    done = run("mint", "--key", str(key), "--sub", "alice", "--service", "ssh")
    assert done.exit_code != 0
    assert "chmod 600" in str(done.exception) + done.output


def config(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "relay.toml"
    path.write_text("\n".join(['[relay]\nid = "a"\n[[service]]\nname = "ssh"', *lines]))
    return path


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["port = 22", "limits = {per_user_streams = 1}"], "only with `ticket` or"),
        (["port = 22", 'ticket = {keys = "k", session_s = 5}'], "session_s"),
        (["port = 22", 'ticket = {keys = "k", algorithms = ["HS256"]}'], "algorithms"),
        (["port = 22", 'ticket = {keys = "k", algorithms = []}'], "algorithms"),
        (["port = 22", 'ticket = {audience = "x"}'], "keys"),
        (["port = 22", 'ticket = {keys = "k", max_life_s = 3601}'], "max_life_s"),
        (["port = 22", 'ticket = {keys = "k"}', "limits = {per_address_streams = -1}"], "per_address_streams"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(config(tmp_path, *lines), {})


def test_a_configuration_is_checked_with_its_files(tmp_path: Path) -> None:
    def check() -> str:
        done = CliRunner().invoke(fxrelay.cli.main, ["check", "--config", str(path)])
        return f"{done.output} {done.exception}"

    path = config(tmp_path, "port = 22", 'ticket = {keys = "tickets.pub"}', 'owner = "exec:owner.sh"')
    assert "tickets.pub: does not exist" in (told := check())
    assert "owner.sh" in told  # all at once
    make_key(tmp_path)
    assert "owner.sh" in check()
    (tmp_path / "owner.sh").write_text("#!/bin/sh\necho allow\n")
    (tmp_path / "owner.sh").chmod(0o700)
    assert "ok:" in check()
    (tmp_path / "tickets.pub").chmod(0o666)
    assert "chmod go-w" in check()
    (tmp_path / "tickets.pub").chmod(0o644)
    (tmp_path / "tickets.pub").write_bytes((tmp_path / "tickets.key").read_bytes())
    assert "private key" in check()
    (tmp_path / "tickets.pub").write_bytes(b"\xff")
    assert "no text" in check()


def test_keys_of_another_algorithm_than_the_configuration_names(tmp_path: Path) -> None:
    make_key(tmp_path)
    path = config(tmp_path, "port = 22", 'ticket = {keys = "tickets.pub", algorithms = ["ES256"]}')
    done = CliRunner().invoke(fxrelay.cli.main, ["check", "--config", str(path)])
    assert "are for EdDSA" in f"{done.output} {done.exception}"
    assert load(path, {}).services[0].ticket is not None
    assert load_keys(tmp_path / "tickets.pub").algorithms() == {Algorithm.EDDSA}


@pytest.mark.parametrize(("given", "name"), [("", "FXGATEWAY_TICKET"), ("env", "FXGATEWAY_TICKET")])
def test_a_ticket_from_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, name: str) -> None:
    monkeypatch.setenv(name, " a.b.c \n")
    assert ticket_source(given)() == "a.b.c"
    monkeypatch.delenv(name)
    if given:
        with pytest.raises(FxError, match="no ticket"):
            ticket_source(given)()
    else:
        assert ticket_source(given)() == ""


def test_a_ticket_from_a_file_is_read_each_time(tmp_path: Path) -> None:
    source = ticket_source(str(tmp_path / "ticket"))
    for ticket in ("a.b.c", "d.e.f"):
        (tmp_path / "ticket").write_text(ticket + "\n")
        assert source() == ticket


@pytest.mark.parametrize("content", [b"", b"\n", b"a.b.c\r\nHost: other", b"\x00", b"a" * 9_000, "é".encode()])
def test_what_is_no_ticket_never_gets_into_a_head(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ticket").write_bytes(content)
    with pytest.raises(FxError, match="holds no ticket"):
        ticket_source(str(tmp_path / "ticket"))()
    with pytest.raises(FxError, match="No such file"):
        ticket_source(str(tmp_path / "missing"))()


def test_a_ticket_from_standard_input_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"a.b.c\nSSH-2.0-x\r\n")
    os.close(theirs)
    with os.fdopen(ours, "rb") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert ticket_source("-")() == "a.b.c"
        assert os.read(stdin.fileno(), 100) == b"SSH-2.0-x\r\n"


def test_one_ticket_is_not_for_a_port() -> None:
    words = ["connect", "ssh", "--via", "http://gw", "--listen", "127.0.0.1:0", "--ticket", "-"]
    done = CliRunner().invoke(fxgateway.cli.main, words)
    assert done.exit_code == 2
    assert "one ticket is for one connection" in done.output
