"""Task: a private certificate authority and its server certificates, for `fxgateway init` and for tests."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fxtunnel.errors import ConfigError

AUTHORITY_DAYS: Final = 3652
SERVER_DAYS: Final = 730

# A relay whose clock is a little slow must accept a certificate made a moment ago.
_BACKDATED: Final = timedelta(hours=1)
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: what relays pin (`cert_pem`) and what signs for it."""

    cert_pem: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def key_pem(self) -> bytes:
        """The private key, unencrypted PKCS#8: for `write_secret` only."""
        return _key_pem(self.key)


def new_authority(name: str, *, valid_from: datetime | None = None, valid_days: int = AUTHORITY_DAYS) -> Authority:
    """A fresh P-256 authority that may sign server certificates but no further authorities; good for ten years from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(name)
    start = valid_from or datetime.now(UTC)
    certificate = (
        _builder(subject, subject, key, key)
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(start + timedelta(days=valid_days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(_cert_pem(certificate), key)


def expires_unix(pem: bytes) -> float:
    """When the first certificate in it ends.

    Raises:
        ValueError: there is none.
    """
    return x509.load_pem_x509_certificates(pem)[0].not_valid_after_utc.timestamp()


def load_authority(cert_pem: str, key_pem: bytes) -> Authority:
    """The authority that `Authority.cert_pem` and `Authority.key_pem()` described.

    Raises:
        ConfigError: not PEM, not an elliptic-curve key, or the two do not belong together.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
        certificate = x509.load_pem_x509_certificate(cert_pem.encode())
    except (ValueError, TypeError) as exc:
        raise ConfigError.one("certificate authority", "", "certificate or key is not in PEM format, or the key is encrypted") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ConfigError.one("certificate authority", "", "the key does not belong to the certificate")
    return Authority(cert_pem, key)


def issue_server_certificate(
    authority: Authority, hosts: Sequence[str], *, valid_from: datetime | None = None, valid_days: int = SERVER_DAYS
) -> tuple[str, bytes]:
    """A certificate for a TLS server reachable under `hosts` (DNS names, `*.` allowed, or IP addresses), and its private key.

    Good for two years from now, never longer than its authority. Returns (certificate PEM, unencrypted PKCS#8 key PEM).

    Raises:
        ConfigError: `hosts` is empty or holds something that is neither.
    """
    if not hosts:
        raise ConfigError.one("server certificate", "", "needs at least one host name or address")
    names = [_general_name(host) for host in hosts]
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.encode())
    key = ec.generate_private_key(ec.SECP256R1())
    start = valid_from or datetime.now(UTC)
    certificate = (
        _builder(_common_name(hosts[0]), issuer.subject, key, authority.key)
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(min(start + timedelta(days=valid_days), issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _cert_pem(certificate), _key_pem(key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    # Both key identifiers are there because strict verifiers (RFC 5280, 4.2.1.1) ask for them.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        name = host.lower().removesuffix(".")
    if len(name) > 253 or not _DNS_NAME.fullmatch(name) or name.rpartition(".")[2].isdigit():
        raise ConfigError.one("server certificate", "", f"expected a host name or an IP address, not {host!r}")
    return x509.DNSName(name)


def _key_usage(*allowed: str) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in allowed for name in names})


def _cert_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
