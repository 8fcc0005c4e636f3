"""What `fxgateway check` says of certificates, and that those of `init` are good."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from fxgateway.certificates import load_certificates
from fxgateway.cli import main
from fxgateway.settings import load
from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret


def fx(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], env=env)


def refused(result: Result) -> list[str]:
    """The lines of a refusal: exit 2, nothing on standard output, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


def test_a_key_of_another_certificate(made: Path) -> None:
    _, key = issue_server_certificate(new_authority("x"), ["127.0.0.1"])
    write_secret(made / "server.key", key)
    assert any("does not belong" in line for line in refused(fx("check", "--config", made / "gateway.toml")))


@pytest.mark.parametrize(("shift_days", "words"), [(-40, "it ended 9 days ago"), (5, "it begins in")])
def test_a_certificate_that_is_not_valid_now(made: Path, shift_days: int, words: str) -> None:
    start = datetime.now(UTC) + timedelta(days=shift_days, minutes=5)
    certificate, key = issue_server_certificate(new_authority("x"), ["127.0.0.1"], valid_from=start, valid_days=30)
    (made / "server.pem").write_text(certificate)
    write_secret(made / "server.key", key)
    lines = refused(fx("check", "--config", made / "gateway.toml"))
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(("days_left", "is_told"), [(29, True), (31, False)])
def test_check_warns_a_month_before_a_certificate_ends(made: Path, days_left: int, is_told: bool) -> None:
    start = datetime.now(UTC) - timedelta(days=100 - days_left, minutes=-5)
    certificate, key = issue_server_certificate(new_authority("x"), ["127.0.0.1"], valid_from=start, valid_days=100)
    (made / "server.pem").write_text(certificate)
    write_secret(made / "server.key", key)
    result = fx("check", "--config", made / "gateway.toml")
    assert result.exit_code == 0, result.output
    ends = f"{start + timedelta(days=100):%Y-%m-%d}"
    assert (f"warning: {made / 'server.pem'} ends on {ends}" in result.stderr) is is_told, result.stderr


def test_check_warns_of_every_certificate_in_a_file(made: Path) -> None:
    ending = new_authority("old", valid_from=datetime.now(UTC) - timedelta(days=80), valid_days=100)
    with (made / "ca.pem").open("a") as file:
        file.write(ending.cert_pem)
    result = fx("check", "--config", made / "gateway.toml")
    assert result.exit_code == 0
    assert f"warning: {made / 'ca.pem'} ends on" in result.stderr


@pytest.mark.parametrize(
    ("names", "host", "fits"),
    [
        (["*.example.com"], "gw.example.com", True),
        (["GW.example.com"], "gw.EXAMPLE.com", True),
        (["*.example.com"], "a.gw.example.com", False),
        (["*.example.com"], "example.com", False),
        (["gw.example.com", "::1"], "[::1]", True),
        (["127.0.0.1"], "127.0.0.2", False),
    ],
)
def test_the_certificate_must_be_for_the_public_name(made: Path, names: list[str], host: str, fits: bool) -> None:
    certificate, key = issue_server_certificate(new_authority("x"), names)
    (made / "server.pem").write_text(certificate)
    write_secret(made / "server.key", key)
    result = fx("check", "--config", made / "gateway.toml", env={"FXGATEWAY__TUNNEL__PUBLIC_URL": f"wss://{host}:1"})
    assert (result.exit_code == 0) is fits, result.output
    assert fits or "not for" in result.stderr


def test_the_server_certificate_is_good_for_a_real_handshake(made: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / "server.pem", made / "server.key")
    client = ssl.create_default_context(cafile=str(made / "ca.pem"))
    near, far = socket.socketpair()
    with near, far:
        thread = threading.Thread(target=lambda: server.wrap_socket(far, server_side=True).close())
        thread.start()
        client.wrap_socket(near, server_hostname="127.0.0.1").close()
        thread.join(5)
    assert not thread.is_alive()


def test_what_a_configuration_names_is_read_as_one(made: Path) -> None:
    settings = load(made / "gateway.toml", {})
    found = load_certificates(settings, ("http/1.1",))
    certificate = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    assert (found.tunnel_expires_unix, dict(found.doors)) == (certificate.not_valid_after_utc.timestamp(), {})
    (made / "server.pem").write_text("nothing")
    with pytest.raises(ConfigError, match=r"server\.pem"):
        load_certificates(settings, ("http/1.1",))
