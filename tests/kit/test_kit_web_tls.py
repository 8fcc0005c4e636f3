"""Contexts for clients of the web: what they allow, and what is said about files that cannot be used."""

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import Authority, issue_server_certificate
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.web_tls import choose_name, server_context


@pytest.fixture
def pair(tmp_path: Path, authority: Authority) -> tuple[Path, Path]:
    return issue(tmp_path, authority)


def issue(directory: Path, authority: Authority, name: str = "web.test", valid_from: datetime | None = None) -> tuple[Path, Path]:
    certificate, key = issue_server_certificate(authority, [name], valid_from=valid_from, valid_days=30)
    paths = directory / f"{name}.pem", directory / f"{name}.key"
    paths[0].write_text(certificate)
    write_secret(paths[1], key)
    return paths


def problem(*pairs: tuple[Path, Path]) -> str:
    with pytest.raises(ConfigError) as caught:
        server_context(pairs)
    return str(caught.value)


def test_only_what_is_safe(pair: tuple[Path, Path]) -> None:
    context = server_context([pair])
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert {cipher["name"].partition("-")[0] for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"} == {"ECDHE"}
    assert all(cipher["aead"] for cipher in context.get_ciphers())
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
    assert not context.options & ssl.OP_IGNORE_UNEXPECTED_EOF


def test_missing_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert (
        problem((tmp_path / "no.pem", pair[1])) == f"{tmp_path}/no.pem: "
        "does not exist; put the certificate there, or name the file it is in"
    )
    assert problem((pair[0], tmp_path / "no.key")) == f"{tmp_path}/no.key: does not exist"


def test_unreadable_certificate(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")  # which nobody writes to
    for name in ("directory", "fifo"):
        assert problem((tmp_path / name, pair[1])) == f"{tmp_path}/{name}: is not a regular file"


def test_key_that_others_may_read(pair: tuple[Path, Path]) -> None:
    os.chmod(pair[1], 0o640)
    assert problem(pair) == f"{pair[1]}: is accessible by others (mode 0640); run: chmod 600 {pair[1]}"


def test_files_that_are_something_else(pair: tuple[Path, Path], tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    write_secret(junk, b"junk")
    assert problem((junk, pair[1])) == f"{junk}: holds no certificate in PEM format"
    assert problem((pair[0], junk)) == f"{junk}: holds no private key in PEM format"
    write_secret(junk, b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert problem((pair[0], junk)).startswith(f"{junk}: is encrypted with a passphrase; run: openssl pkey")


def test_every_problem_is_told(pair: tuple[Path, Path], tmp_path: Path, authority: Authority) -> None:
    other = issue(tmp_path, authority, "other.test")
    assert problem((pair[0], other[1]), (tmp_path / "no.pem", pair[1])) == (
        f"{pair[0]}: does not belong to the key {other[1]}; name the key it was issued for; {tmp_path}/no.pem: "
        "does not exist; put the certificate there, or name the file it is in"
    )


@pytest.mark.parametrize(("shift", "text"), [(-40, "it ended 10 days ago"), (9, "it begins in 8 days")])
def test_certificate_out_of_date(tmp_path: Path, authority: Authority, shift: int, text: str) -> None:
    pair = issue(tmp_path, authority, valid_from=datetime.now(UTC) + timedelta(days=shift))
    assert problem(pair).startswith(f"{pair[0]}: is not valid now: {text}")


def test_no_certificate_at_all() -> None:
    assert problem() == "certificates: needs at least one certificate and its key"


def test_names() -> None:
    exact, wild = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = {"a.test": exact, "*.test": wild}
    assert choose_name("A.test.", names) is exact
    assert choose_name("b.test", names) is wild
    for other in (None, "", "test", "a.b.test", "*.a.test", ".", "..", "a.test.."):
        assert choose_name(other, names) is None
