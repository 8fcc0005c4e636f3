"""Port: what the errors of a TLS handshake mean, said so that a person knows what to do."""

import datetime as dt
import ssl
from enum import Enum, auto
from typing import Final

from cryptography import x509

from fxtunnel.errors import TunnelError

# X509_V_ERR_* of <openssl/x509_vfy.h>; the ssl module has no names for them.
_NOT_YET_VALID: Final = 9
_HAS_EXPIRED: Final = 10
_WRONG_NAME: Final = frozenset({62, 64})
_NOT_TLS_REASONS: Final = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNKNOWN_PROTOCOL",
        "UNEXPECTED_MESSAGE",
    }
)


class HandshakeProblem(Enum):
    """Why a handshake failed, for whoever decides what to do next."""

    NOT_TLS = auto()
    NO_COMMON_VERSION = auto()
    NO_COMMON_PROTOCOL = auto()
    UNTRUSTED = auto()
    EXPIRED = auto()
    NOT_YET_VALID = auto()
    WRONG_NAME = auto()
    REFUSED_BY_PEER = auto()
    CLOSED_BY_PEER = auto()
    OTHER = auto()


class HandshakeFailed(TunnelError):
    """TLS did not come about; the socket is closed. `str()` says why and what to do, `problem` lets code tell cases apart."""

    def __init__(self, problem: HandshakeProblem, message: str) -> None:
        self.problem = problem
        super().__init__(message)


def explain_to_server(exc: OSError, versions: str = "TLS 1.3") -> HandshakeFailed:
    """What went wrong with a client's handshake; `versions` says what it should have spoken."""
    reason = _reason(exc)
    if "ALERT" in reason:
        return HandshakeFailed(HandshakeProblem.REFUSED_BY_PEER, f"the client refused the handshake: {_words(reason)}")
    return _explain_common(exc, "the client", versions)


def explain_to_client(exc: OSError, host: str) -> HandshakeFailed:
    """What went wrong with a handshake towards `host`, and what a person can do."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        match exc.verify_code:
            case code if code == _HAS_EXPIRED:
                advice = "renew it on the server, or set this machine's clock"
                return HandshakeFailed(HandshakeProblem.EXPIRED, f"the certificate of {host} has expired: {advice}")
            case code if code == _NOT_YET_VALID:
                advice = "set this machine's clock, or wait"
                return HandshakeFailed(HandshakeProblem.NOT_YET_VALID, f"the certificate of {host} is not yet valid: {advice}")
            case code if code in _WRONG_NAME:
                advice = "use a name it was issued for, or issue one for this name"
                return HandshakeFailed(HandshakeProblem.WRONG_NAME, f"the server's certificate is not for {host}: {advice}")
            case _:
                advice = f"is this the right server, and the right CA? ({exc.verify_message})"
                return HandshakeFailed(HandshakeProblem.UNTRUSTED, f"the certificate of {host} is not from the pinned authority: {advice}")
    reason = _reason(exc)
    if "ALERT" in reason and "PROTOCOL_VERSION" not in reason and "NO_APPLICATION_PROTOCOL" not in reason:
        return HandshakeFailed(HandshakeProblem.REFUSED_BY_PEER, f"{host} refused the handshake: {_words(reason)}")
    return _explain_common(exc, host, "TLS 1.3")


def _explain_common(exc: OSError, peer: str, versions: str) -> HandshakeFailed:
    reason = _reason(exc)
    if is_torn(exc) or isinstance(exc, (ssl.SSLZeroReturnError, ConnectionError)):
        return HandshakeFailed(HandshakeProblem.CLOSED_BY_PEER, f"{peer} closed the connection during the TLS handshake")
    if "PROTOCOL_VERSION" in reason or reason == "UNSUPPORTED_PROTOCOL":
        return HandshakeFailed(HandshakeProblem.NO_COMMON_VERSION, f"{peer} does not speak {versions}")
    if "NO_APPLICATION_PROTOCOL" in reason:
        return HandshakeFailed(HandshakeProblem.NO_COMMON_PROTOCOL, f"{peer} speaks none of our protocols (ALPN)")
    if reason in _NOT_TLS_REASONS:
        return HandshakeFailed(HandshakeProblem.NOT_TLS, f"{peer} does not speak TLS")
    return HandshakeFailed(HandshakeProblem.OTHER, f"the TLS handshake with {peer} failed: {_words(reason) or exc.strerror or exc}")


def no_forged_end(context: ssl.SSLContext) -> ssl.SSLContext:
    """The same context; connections of it take no bare FIN, which anyone can forge, for a clean end.

    Python switches that off by itself only from 3.11.4 on; Debian 12 has 3.11.2.
    """
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    return context


def is_torn(exc: OSError) -> bool:
    """Whether a connection has ended without close_notify. Before Python 3.11.4 this is no SSLEOFError."""
    return isinstance(exc, ssl.SSLEOFError) or _reason(exc) == "UNEXPECTED_EOF_WHILE_READING"


def _reason(exc: OSError) -> str:
    return getattr(exc, "reason", None) or "" if isinstance(exc, ssl.SSLError) else ""


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


def describe_dates(der: bytes, now: dt.datetime) -> str:
    """By how much a certificate is out of date; "" if it is not, or is no certificate."""
    try:
        certificate = x509.load_der_x509_certificate(der)
    except ValueError:
        return ""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return f"it ended {_amount(now - end)} ago, on {end:%Y-%m-%d %H:%M} UTC"
    if now < start:
        return f"it begins in {_amount(start - now)}, on {start:%Y-%m-%d %H:%M} UTC"
    return ""


def _amount(span: dt.timedelta) -> str:
    if span.days >= 2:
        return f"{span.days} days"
    if span >= dt.timedelta(hours=2):
        return f"{span // dt.timedelta(hours=1)} hours"
    return f"{span.total_seconds():.0f} s"
