"""Task: TLS towards browsers and other clients of the web: TLS 1.2 and 1.3, HTTP/1.1, one or more certificates chosen by name."""

import datetime as dt
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.files import read_secret
from fxtunnel.kit.tls_problems import describe_dates, no_forged_end

ALPN: Final = ("http/1.1",)
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; those of TLS 1.3 are all of this kind: forward secrecy, authenticated encryption."""
MAX_CERTIFICATE_BYTES: Final = 1 << 20


def server_context(certificates: Sequence[tuple[Path, Path]]) -> ssl.SSLContext:
    """TLS for a port for clients. `certificates` are (certificate chain, private key), both PEM; blocking: reads the files.

    A client gets the certificate that has the name it asks for (subjectAltName), else one with a wildcard for it, else the first; of
    several for the same name, the first. Only HTTP/1.1 is offered (ALPN); a client that offers only other protocols gets none, and may
    end the connection; one that offers none is served as well. No renegotiation, no compression, no 0-RTT.

    Clients may resume sessions. The ticket keys live as long as the context, and another context cannot read its tickets: make one for
    each port, and a new one at each reload, at least once a day.

    Raises:
        ConfigError: `certificates` is empty, or every problem found in them: a file that is missing or not PEM, a key that others may
            read, that is encrypted or belongs to another certificate, a certificate that has expired or is not yet valid.
    """
    if not certificates:
        raise ConfigError.one("certificates", "", "needs at least one certificate and its key")
    problems: list[ConfigProblem] = []
    contexts: list[ssl.SSLContext] = []
    by_name: dict[str, ssl.SSLContext] = {}
    for cert_path, key_path in certificates:
        try:
            context, names = _one_context(cert_path, key_path)
        except ConfigError as exc:
            problems += exc.problems
            continue
        contexts.append(context)
        for name in names:
            by_name.setdefault(name, context)
    if problems:
        raise ConfigError(problems)
    first = contexts[0]
    if len(contexts) > 1:
        _keep_quiet_about_names()
        first.sni_callback = _chooser(by_name)
    return first


def choose_name(name: str | None, names: dict[str, ssl.SSLContext]) -> ssl.SSLContext | None:
    """Whose certificate fits the name a client asks for (RFC 6125, 6.4: a wildcard stands for the whole first label)."""
    if not name:
        return None
    folded = name.lower().removesuffix(".")
    return names.get(folded) or names.get("*." + folded.partition(".")[2])


def _chooser(by_name: dict[str, ssl.SSLContext]) -> Callable[[Any, str | None, ssl.SSLContext], None]:
    def choose(sock: Any, name: str | None, _: ssl.SSLContext) -> None:
        chosen = choose_name(name, by_name)
        if chosen is not None:
            sock.context = chosen

    return choose


def _one_context(cert_path: Path, key_path: Path) -> tuple[ssl.SSLContext, list[str]]:
    """A context for one certificate, and the names in it."""
    if b"ENCRYPTED" in read_secret(key_path):
        raise ConfigError.one(key_path, "", "is encrypted with a passphrase; run: openssl pkey -in OLD -out NEW")
    names = _names_of(cert_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(list(ALPN))
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    no_forged_end(context)
    try:
        context.load_cert_chain(cert_path, key_path)
    except (ssl.SSLError, OSError) as exc:
        reason = getattr(exc, "reason", "") or ""
        if "MISMATCH" in reason:
            raise ConfigError.one(cert_path, "", f"does not belong to the key {key_path}; name the key it was issued for") from exc
        if "KEY_TOO_SMALL" in reason or "MD_TOO_WEAK" in reason:
            raise ConfigError.one(cert_path, "", "is too weak for OpenSSL; get one with a P-256 or 2048-bit RSA key and SHA-256") from exc
        raise ConfigError.one(key_path, "", "holds no private key in PEM format") from exc
    return context, names


def _names_of(cert_path: Path) -> list[str]:
    """The DNS names of the first certificate in a file, after a look at its dates."""
    if cert_path.exists() and not cert_path.is_file():
        raise ConfigError.one(cert_path, "", "is not a regular file")  # to open a FIFO would wait for who writes
    try:
        with cert_path.open("rb") as file:
            pem = file.read(MAX_CERTIFICATE_BYTES)
    except FileNotFoundError as exc:
        raise ConfigError.one(cert_path, "", "does not exist; put the certificate there, or name the file it is in") from exc
    except OSError as exc:
        raise ConfigError.one(cert_path, "", f"cannot be read: {exc.strerror or exc}") from exc
    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
    except (ValueError, IndexError) as exc:
        raise ConfigError.one(cert_path, "", "holds no certificate in PEM format") from exc
    now = dt.datetime.now(dt.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        dates = describe_dates(certificate.public_bytes(Encoding.DER), now)
        raise ConfigError.one(cert_path, "", f"is not valid now: {dates}; renew it, or set this machine's clock")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [name.lower().removesuffix(".") for name in names.get_values_for_type(x509.DNSName)]


def _keep_quiet_about_names() -> None:
    """A name that is not ASCII fails in the ssl module before our callback is asked, and Python writes a traceback to stderr for it.

    The handshake fails as it should, and its owner says so; without this, strangers could write as much to the log as they like.
    """
    ordinary = sys.unraisablehook
    if getattr(ordinary, "spares_names", False):
        return

    def hook(unraisable: "sys.UnraisableHookArgs", /) -> None:
        if not (unraisable.exc_type is UnicodeDecodeError and isinstance(unraisable.object, bytes)):
            ordinary(unraisable)

    hook.spares_names = True  # type: ignore[attr-defined]  # functions have no declared attributes
    sys.unraisablehook = hook
