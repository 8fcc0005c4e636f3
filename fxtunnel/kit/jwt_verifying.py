"""Pure: JWTs of others, verified: algorithms are pinned by configuration, keys fit their algorithm, and no header of a token is obeyed.

For tokens of applications (RFC 7519) whose keys come as PEM, JWK or JWK set (RFC 7517). Their issuers are not ours: headers may hold
what is not known here, keys may have no names, algorithms are more. Tickets have a narrower profile (`signed_claims.py`), relays'
assertions the narrowest (`tokens.py`); all stand on `compact_jwt.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from fxtunnel.kit.compact_jwt import MalformedToken, proved_claims, unproved_header

ALGORITHMS: Final = ("EdDSA", "ES256", "ES384", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
"""What may be pinned. Shared secrets (HS…) are not among them: whoever can verify with one can forge."""
MAX_KEYS: Final = 64
"""Issuers publish a few: the present key, the next one, and some that are being retired."""
MAX_KEYS_TRIED: Final = 8
"""Keys tried for a token that does not name one."""
LEEWAY_S: Final = 30.0
"""How far an issuer's clock may be off, as for assertions of relays (PROTOCOL.md, 3)."""

_PEM: Final = re.compile(rb"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----", re.DOTALL)
_MIN_RSA_BITS: Final = 2_048


class BadToken(Exception):
    """The token proves nothing. `str()` says why, for a log; never show it to whoever sent the token."""


class UnknownKey(BadToken):
    """No key known fits the token: newer keys might."""


class BadKeys(ValueError):
    """These are no keys; `str()` says what is wrong."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must be. `issuer` and `audience` empty: not looked at."""

    algorithms: tuple[str, ...]
    issuer: str = ""
    audience: str = ""
    leeway_s: float = LEEWAY_S


@dataclass(frozen=True, slots=True)
class _Key:
    kid: str
    key: Any
    algorithms: frozenset[str]


@dataclass(frozen=True, slots=True)
class KeySet:
    """Public keys by which tokens may be signed."""

    keys: tuple[_Key, ...] = ()

    def fitting(self, algorithm: str, kid: str | None) -> list[Any]:
        """The keys that a token with this header may be signed by: the named one, or, if none is named, all of the algorithm's kind."""
        fitting = [key for key in self.keys if algorithm in key.algorithms]
        if kid is None:
            return [key.key for key in fitting[:MAX_KEYS_TRIED]]
        named = [key.key for key in fitting if key.kid == kid]
        # A PEM file names no keys: there the token's name for one says nothing.
        return named or [key.key for key in fitting if not key.kid][:MAX_KEYS_TRIED]


def read_keys(data: bytes) -> KeySet:
    """The public keys of a file or a page: PEM blocks, one JWK, or a JWK set. Private keys are refused.

    Raises:
        BadKeys: there is none, or one that cannot be used.
    """
    if data.lstrip().startswith(b"{"):
        return _read_jwks(data)
    found = []
    for block in _PEM.findall(data):
        try:
            found.append(_Key("", *_checked(serialization.load_pem_public_key(block))))
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise BadKeys("expected public keys in PEM format (BEGIN PUBLIC KEY), or a JWK set") from exc
    if not 0 < len(found) <= MAX_KEYS:
        raise BadKeys(f"expected 1 to {MAX_KEYS} public keys in PEM format, or a JWK set")
    return KeySet(tuple(found))


def verify_token(token: str, rules: TokenRules, keys: KeySet, now_unix: float) -> dict[str, Any]:
    """The claims of `token`, if it is signed by one of `keys`, is meant for us, and is good now. It must have an `exp`.

    Raises:
        UnknownKey: it may be good, but its key is not among these.
        BadToken: it is not.
    """
    try:
        header = unproved_header(token)
    except MalformedToken as exc:
        raise BadToken(str(exc)) from None
    algorithm, kid = header.get("alg"), header.get("kid")
    if algorithm not in rules.algorithms or algorithm not in ALGORITHMS:
        raise BadToken("its algorithm is not one of those configured")
    if "crit" in header or header.get("b64", True) is not True or (kid is not None and not isinstance(kid, str)):
        raise BadToken("its header wants something that is not known here")  # RFC 7515, 4.1.11
    candidates = keys.fitting(algorithm, kid)
    if not candidates:
        raise UnknownKey("no key known fits it")
    claims = _claims(token, algorithm, candidates)
    _check(claims, rules, now_unix)
    return claims


def _claims(token: str, algorithm: str, candidates: Sequence[Any]) -> dict[str, Any]:
    for key in candidates:
        try:
            found = proved_claims(token, key, algorithm)
        except MalformedToken as exc:
            raise BadToken(str(exc)) from None
        if found is not None:
            return found
    raise UnknownKey("its signature is by none of the keys known")


def _check(claims: Mapping[str, Any], rules: TokenRules, now_unix: float) -> None:
    expires_unix = claims.get("exp")
    if not _is_time(expires_unix) or expires_unix is None:
        raise BadToken("it has no valid exp")
    if expires_unix <= now_unix - rules.leeway_s:
        raise BadToken("it has expired")
    for name in ("nbf", "iat"):
        value = claims.get(name)
        if value is not None and (not _is_time(value) or value > now_unix + rules.leeway_s):
            raise BadToken(f"its {name} is malformed, or in the future")
    if rules.issuer and claims.get("iss") != rules.issuer:
        raise BadToken("its iss is not the one configured")
    audience = claims.get("aud")
    if rules.audience and rules.audience != audience and not (isinstance(audience, list) and rules.audience in audience):
        raise BadToken("its aud is not the one configured")


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e11  # type: ignore[operator]  # a NaN fails both comparisons


def _read_jwks(data: bytes) -> KeySet:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise BadKeys("no JSON") from exc
    listed = found.get("keys", [found]) if isinstance(found, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise BadKeys(f"expected a JWK set with at most {MAX_KEYS} keys")
    keys = []
    for each in listed:
        key = _jwk(each)
        if key is not None:
            keys.append(key)
    if not keys:
        raise BadKeys("no key of the set is a public key for signatures that can be used here")
    return KeySet(tuple(keys))


def _jwk(found: object) -> _Key | None:
    """None: a key for something else, or of a kind that is not known here; sets have those (RFC 7517, 5)."""
    if not isinstance(found, dict) or found.get("use", "sig") != "sig" or found.get("kty") not in ("OKP", "EC", "RSA"):
        return None
    if "d" in found:
        raise BadKeys("a private key does not belong here")
    try:
        key, algorithms = _checked(jwt.PyJWK(found, found.get("alg") or _default_algorithm(found)).key)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError, UnsupportedAlgorithm):
        return None
    named = found.get("alg")
    if named is not None:
        algorithms &= {named}
    kid = found.get("kid")
    return _Key(kid if isinstance(kid, str) else "", key, algorithms)


def _default_algorithm(found: Mapping[str, Any]) -> str:
    if found["kty"] == "RSA":
        return "RS256"
    return "EdDSA" if found["kty"] == "OKP" else "ES384" if found.get("crv") == "P-384" else "ES256"


def _checked(key: object) -> tuple[Any, frozenset[str]]:
    """The key, and the algorithms that it is for."""
    match key:
        case ed25519.Ed25519PublicKey():
            return key, frozenset({"EdDSA"})
        case ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1):
            return key, frozenset({"ES256"})
        case ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP384R1):
            return key, frozenset({"ES384"})
        case rsa.RSAPublicKey() if key.key_size >= _MIN_RSA_BITS:
            return key, frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
        case _:
            raise ValueError(f"expected an Ed25519, P-256 or P-384 key, or RSA with at least {_MIN_RSA_BITS} bits")
