"""Task: a relay's key and the assertions it signs, each for one connection, the gateway's checks of them, and enrolment tokens.

The profile is PROTOCOL.md, 3: EdDSA and nothing else, shape checked before anything is decoded, no header of the token is obeyed.
"""

import base64
import binascii
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fxtunnel.codes import Refusal
from fxtunnel.errors import ConfigError, PeerRefused
from fxtunnel.kit.compact_jwt import LATEST_UNIX, MalformedToken, proved_claims, unproved_claims, unproved_header
from fxtunnel.model import GatewayId, RelayId, is_name

LIFETIME_S: Final = 60
LEEWAY_S: Final = 30.0

_BINDING: Final = "tls-exporter"
_KID: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_HEADERS: Final = frozenset({"alg", "kid", "typ"})


class KeyProblem(Enum):
    """Why there is no key to check an assertion with."""

    UNKNOWN = Refusal.UNKNOWN_RELAY
    REVOKED = Refusal.REVOKED


@dataclass(frozen=True, slots=True)
class Assertion:
    """What a verified assertion says."""

    relay_id: RelayId
    kid: str


def new_key() -> Ed25519PrivateKey:
    """A fresh Ed25519 key, a relay's identity."""
    return Ed25519PrivateKey.generate()


def key_to_pem(key: Ed25519PrivateKey) -> bytes:
    """The private key as unencrypted PKCS#8: for `write_secret` only."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def key_from_pem(data: bytes) -> Ed25519PrivateKey:
    """The key that `key_to_pem` wrote.

    Raises:
        ConfigError: anything else; the caller knows which file it was.
    """
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as exc:
        raise ConfigError.one("relay key", "", "is not an unencrypted private key in PEM format") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError.one("relay key", "", "is not an Ed25519 key")
    return key


def public_to_text(public: Ed25519PublicKey) -> str:
    """43 characters base64url of the 32 raw bytes."""
    return _base64url(public.public_bytes_raw())


def public_from_text(text: str) -> Ed25519PublicKey:
    """The key that `public_to_text` described; a second spelling of the same bytes is not accepted.

    Raises:
        ValueError: anything else.
    """
    if not _KID.fullmatch(text):
        raise ValueError("expected an Ed25519 public key: 43 characters base64url")
    try:
        raw = base64.urlsafe_b64decode(text + "=")
        public = Ed25519PublicKey.from_public_bytes(raw)
    except (binascii.Error, ValueError) as exc:
        raise ValueError("expected an Ed25519 public key: 43 characters base64url") from exc
    if public_to_text(public) != text:
        raise ValueError("expected an Ed25519 public key in its canonical spelling")
    return public


def thumbprint(public: Ed25519PublicKey) -> str:
    """The key's id: its JWK thumbprint, 43 characters (RFC 7638, 3; RFC 8037, A.3)."""
    jwk = {"crv": "Ed25519", "kty": "OKP", "x": public_to_text(public)}
    return _base64url(hashlib.sha256(json.dumps(jwk, separators=(",", ":"), sort_keys=True).encode()).digest())


def sign_assertion(key: Ed25519PrivateKey, relay_id: RelayId, gateway_id: GatewayId, binding: str, now_unix: float) -> str:
    """A fresh assertion: good for one connection to one gateway, `LinkSocket.binding` of which is `binding`, within 60 s."""
    issued_unix = int(now_unix)
    claims = {
        "iss": relay_id,
        "sub": relay_id,
        "aud": gateway_id,
        _BINDING: binding,
        "iat": issued_unix,
        "nbf": issued_unix,
        "exp": issued_unix + LIFETIME_S,
    }
    return jwt.encode(claims, key, algorithm="EdDSA", headers={"kid": thumbprint(key.public_key())})


def verify_assertion(
    token: str,
    *,
    gateway_id: GatewayId,
    binding: str,
    find_key: Callable[[RelayId, str], Ed25519PublicKey | KeyProblem],
    now_unix: float,
    leeway_s: float = LEEWAY_S,
) -> Assertion:
    """Who signed `token`, if it is a sound assertion for this gateway, this moment, and the connection that it came by.

    `binding` is that connection's `LinkSocket.binding`: on any other one an assertion is worth nothing, whoever has got hold of it.
    `find_key` gets the relay id and key id that the token claims, both well-formed and neither proved.

    Raises:
        PeerRefused: BAD_ASSERTION; UNKNOWN_RELAY or REVOKED as `find_key` says; CLOCK_SKEW, only after the signature held, with the
            number of seconds that the relay's clock is off.
    """
    kid = _checked_kid(token)
    claimed = _decoded(token, None).get("iss")
    if not isinstance(claimed, str) or not is_name(claimed):
        raise _bad("iss is not a relay id")
    relay_id = RelayId(claimed)
    match find_key(relay_id, kid):
        case KeyProblem.UNKNOWN:
            raise PeerRefused(Refusal.UNKNOWN_RELAY, f"relay {relay_id} is not enrolled here with this key; enrol it again")
        case KeyProblem.REVOKED:
            raise PeerRefused(Refusal.REVOKED, f"relay {relay_id} was revoked by the gateway's administrator")
        case public:
            claims = _decoded(token, public)
    times = [claims.get(name) for name in ("iat", "nbf", "exp")]
    if claims.get("iss") != relay_id or claims.get("sub") != relay_id:
        raise _bad("iss and sub differ")
    if claims.get("aud") != gateway_id:
        raise _bad("aud is not this gateway")
    if claims.get(_BINDING) != binding:
        raise _bad(f"{_BINDING} is not this connection's")
    # bool is an int in Python, and 1.5 or "1700000000" are no times of ours.
    issued, not_before, expires = (t if type(t) is int and 0 <= t <= LATEST_UNIX else -1 for t in times)
    if min(issued, not_before, expires) < 0:
        raise _bad("iat, nbf and exp must be integers")
    if not 0 < expires - issued <= LIFETIME_S or not_before > expires:
        raise _bad(f"lives longer than {LIFETIME_S} s, or not at all")
    _check_clock(max(issued, not_before), expires, now_unix, leeway_s)
    return Assertion(relay_id, kid)


def new_enrolment_token() -> str:
    """A secret of 256 bits for gateway.json; `fxe_` lets people and secret scanners recognise it."""
    return "fxe_" + secrets.token_urlsafe(32)


def token_digest(token: str) -> str:
    """What the gateway keeps of an enrolment token: SHA-256, hex. The token is random, so no salt is needed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _checked_kid(token: str) -> str:
    """The key id of a token whose outer form and header are as they must be; nothing here depends on a key."""
    try:
        header = unproved_header(token)
    except MalformedToken as exc:
        raise _bad(str(exc)) from exc
    kid = header.get("kid")
    if not header.keys() <= _HEADERS or header.get("typ", "JWT") != "JWT":
        raise _bad("only the headers alg, kid and typ are allowed")
    if header.get("alg") != "EdDSA":
        raise _bad("alg is not EdDSA")
    if not isinstance(kid, str) or not _KID.fullmatch(kid):
        raise _bad("kid is not a key's thumbprint")
    return kid


def _decoded(token: str, public: Ed25519PublicKey | None) -> dict[str, object]:
    """The claims: unproved without a key, proved with one."""
    try:
        claims = unproved_claims(token) if public is None else proved_claims(token, public, "EdDSA")
    except MalformedToken as exc:
        raise _bad(str(exc)) from exc
    if claims is None:
        raise _bad("the signature does not match the relay's key")
    return claims


def _check_clock(start_unix: int, expires_unix: int, now_unix: float, leeway_s: float) -> None:
    if start_unix > now_unix + leeway_s:
        raise PeerRefused(
            Refusal.CLOCK_SKEW, f"the relay's clock is {start_unix - now_unix:.0f} s ahead of the gateway's; set the clocks (NTP)"
        )
    if expires_unix < now_unix - leeway_s:
        raise PeerRefused(
            Refusal.CLOCK_SKEW, f"the relay's clock is {now_unix - start_unix:.0f} s behind the gateway's; set the clocks (NTP)"
        )


def _bad(why: str) -> PeerRefused:
    return PeerRefused(Refusal.BAD_ASSERTION, f"bad assertion: {why}")


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
