import ipaddress
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import Authority, issue_server_certificate, load_authority, new_authority


def test_server_certificate_has_its_names_and_nothing_of_an_authority(authority: Authority) -> None:
    text, key_pem = issue_server_certificate(authority, ["gw.example.com", "192.0.2.1", "[2001:db8::1]", "*.example.com"])
    certificate = x509.load_pem_x509_certificate(text.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gw.example.com", "*.example.com"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1")]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    key = serialization.load_pem_private_key(key_pem, None)
    assert key.public_key() == certificate.public_key()
    lasts = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=729) < lasts <= timedelta(days=730)


def test_openssl_finds_the_chain_sound_even_when_strict(authority: Authority, tmp_path: Path) -> None:
    ca, server = tmp_path / "ca.pem", tmp_path / "server.pem"
    ca.write_text(authority.cert_pem)
    server.write_text(issue_server_certificate(authority, ["gw.example.com"])[0])
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "gw.example.com", "-CAfile", ca, server]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_server_certificate_cannot_sign_others(authority: Authority, tmp_path: Path) -> None:
    text, key_pem = issue_server_certificate(authority, ["gw.example.com"])
    forged, _ = issue_server_certificate(load_authority(text, key_pem), ["bank.example.com"])
    ca, middle, leaf = tmp_path / "ca.pem", tmp_path / "middle.pem", tmp_path / "leaf.pem"
    for path, content in ((ca, authority.cert_pem), (middle, text), (leaf, forged)):
        path.write_text(content)
    result = subprocess.run(["openssl", "verify", "-CAfile", ca, "-untrusted", middle, leaf], capture_output=True, check=False)
    assert result.returncode != 0


def test_no_certificate_outlives_its_authority() -> None:
    authority = new_authority("short", valid_days=10)
    certificate = x509.load_pem_x509_certificate(issue_server_certificate(authority, ["a"])[0].encode())
    assert certificate.not_valid_after_utc == x509.load_pem_x509_certificate(authority.cert_pem.encode()).not_valid_after_utc


@pytest.mark.parametrize("host", ["", "a b", "a\n", "http://a", "a:1", "-a", "a..b", "é.example", "a" * 64, "192.0.2.300", "*", "a.*.b"])
def test_what_is_no_host_is_refused(authority: Authority, host: str) -> None:
    with pytest.raises(ConfigError, match="expected a host name or an IP address"):
        issue_server_certificate(authority, [host])


def test_a_certificate_for_nobody_is_refused(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        issue_server_certificate(authority, [])


def test_an_authority_survives_its_files_and_hides_its_key(authority: Authority) -> None:
    again = load_authority(authority.cert_pem, authority.key_pem())
    assert again.cert_pem == authority.cert_pem
    basic = x509.load_pem_x509_certificate(again.cert_pem.encode()).extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    assert "key" not in repr(again)
    with pytest.raises(ConfigError, match="does not belong"):
        load_authority(authority.cert_pem, new_authority("other").key_pem())
    with pytest.raises(ConfigError, match="not in PEM format"):
        load_authority("x", b"y")
