"""Pure: tickets and passes, checked with public keys: a narrow header first, then the signature. What the claims mean is the caller's.

A key has one algorithm, by its type, and a token gets the key's: nothing in the token chooses how it is checked (RFC 8725, 3.1). Only
public keys come in here, so there is no secret that an HMAC could be made with. What issuers of applications send is wider, and is for
`jwt_verifying.py`; both stand on `compact_jwt.py`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from fxtunnel.kit.compact_jwt import MalformedToken, TooLongToken, proved_claims, unproved_header

MAX_KEYS: Final = 64
MIN_RSA_BITS: Final = 2_048
MAX_RSA_BITS: Final = 8_192

_KID: Final = re.compile(r"[!-~]{1,128}")
# x5t names a certificate by its digest: some issuers always send it, and it is not looked at.
_HEADERS: Final = frozenset({"alg", "kid", "typ", "x5t", "x5t#S256"})
JWT_TYPES: Final = frozenset({"jwt"})
"""What a header's typ may be, in lower case. It may also be missing."""
_PEM: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n.*?\n-----END \1-----", re.DOTALL)
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

PublicKey = Ed25519PublicKey | EllipticCurvePublicKey | RSAPublicKey


class Algorithm(StrEnum):
    """The signatures that are taken (RFC 7518, 3.1; RFC 8037, 3.1)."""

    EDDSA = "EdDSA"
    ES256 = "ES256"
    RS256 = "RS256"


class TokenProblem(StrEnum):
    """What is wrong with a token, one word for logs and counters."""

    TOO_LONG = "too-long"
    MALFORMED = "malformed"
    BAD_HEADER = "bad-header"
    WRONG_ALGORITHM = "wrong-algorithm"
    UNKNOWN_KEY = "unknown-key"
    BAD_SIGNATURE = "bad-signature"


class BadToken(Exception):
    """Nobody we know has signed this. `str()` is for the log: it holds nothing of the token but its well-formed key id."""

    def __init__(self, problem: TokenProblem, text: str) -> None:
        self.problem = problem
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A public key and the one algorithm it is good for. `thumbprint` is RFC 7638's; `kid` is what tokens call it."""

    kid: str
    thumbprint: str
    algorithm: Algorithm
    public: PublicKey


@dataclass(frozen=True, slots=True)
class SignedClaims:
    """What a token says, and who signed it. `claims` is whatever JSON the signer wrote: every value still has to be looked at."""

    claims: Mapping[str, object]
    key: SigningKey


class KeySet:
    """The keys of those who may sign. Immutable."""

    def __init__(self, keys: Iterable[SigningKey]) -> None:
        self._keys = {key.kid: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def algorithms(self) -> frozenset[Algorithm]:
        """Those for which there is a key."""
        return frozenset(key.algorithm for key in self._keys.values())

    def find(self, kid: str | None, algorithm: Algorithm) -> SigningKey | None:
        """The key that a token names; where it names none, the only one there is for its algorithm."""
        if kid is not None:
            return self._keys.get(kid)
        fitting = [key for key in self._keys.values() if key.algorithm is algorithm]
        return fitting[0] if len(fitting) == 1 else None


def verified_claims(
    token: str, keys: KeySet, algorithms: Collection[Algorithm] = (Algorithm.EDDSA,), types: Collection[str] = JWT_TYPES
) -> SignedClaims:
    """The claims of `token`, if one of `keys` has signed it with one of `algorithms`. Times, audience and all else is not looked at.

    Raises:
        BadToken: anything else.
    """
    algorithm, kid = _read_header(token, algorithms, types)
    key = keys.find(kid, algorithm)
    if key is None:
        raise BadToken(
            TokenProblem.UNKNOWN_KEY, f"it is signed with the key {kid}, which is not known here" if kid else "it does not name its key"
        )
    if key.algorithm is not algorithm:
        raise BadToken(TokenProblem.WRONG_ALGORITHM, f"its key {key.kid} is for {key.algorithm}, not for {algorithm}")
    try:
        claims = proved_claims(token, key.public, key.algorithm.value)
    except MalformedToken as exc:
        raise BadToken(TokenProblem.MALFORMED, str(exc)) from None
    if claims is None:
        raise BadToken(TokenProblem.BAD_SIGNATURE, f"its signature is not by the key {key.kid}")
    return SignedClaims(claims, key)


def read_keys(text: str) -> KeySet:
    """The keys of a file: public keys in PEM, one after the other, or a JWK set (RFC 7517, 5) as JSON.

    Keys of a set that are for encryption, or of kinds that are not taken here, are left out.

    Raises:
        ValueError: there is a private or a secret key, a malformed one, two with one id, none, or too many.
    """
    found = _from_jwks(text) if text.lstrip().startswith("{") else _from_pem(text)
    if not found:
        raise ValueError("holds no public key of a kind that is taken: Ed25519 (EdDSA), P-256 (ES256), RSA (RS256)")
    if len(found) > MAX_KEYS:
        raise ValueError(f"holds more than {MAX_KEYS} keys")
    if len({key.kid for key in found}) < len(found):
        raise ValueError("holds two keys with one id")
    return KeySet(found)


def signing_key(public: PublicKey, kid: str = "") -> SigningKey:
    """`public` with its algorithm; without `kid` it goes by its thumbprint.

    Raises:
        ValueError: a kind of key that is not taken.
    """
    jwk: dict[str, str]
    match public:
        case Ed25519PublicKey():
            algorithm = Algorithm.EDDSA
            jwk = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(public.public_bytes_raw())}
        case EllipticCurvePublicKey() if isinstance(public.curve, SECP256R1):
            algorithm, numbers = Algorithm.ES256, public.public_numbers()
            jwk = {"crv": "P-256", "kty": "EC", "x": _number(numbers.x, 32), "y": _number(numbers.y, 32)}
        case RSAPublicKey() if MIN_RSA_BITS <= public.key_size <= MAX_RSA_BITS:
            algorithm, parts = Algorithm.RS256, public.public_numbers()
            jwk = {"e": _number(parts.e), "kty": "RSA", "n": _number(parts.n)}
        case RSAPublicKey():
            raise ValueError(f"an RSA key must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits, this one has {public.key_size}")
        case _:
            raise ValueError("is of a kind that is not taken: Ed25519 (EdDSA), P-256 (ES256), RSA (RS256)")
    # RFC 7638, 3: the members that make the key, in order, without spaces.
    thumbprint = _base64url(hashlib.sha256(json.dumps(jwk, separators=(",", ":"), sort_keys=True).encode()).digest())
    return SigningKey(kid or thumbprint, thumbprint, algorithm, public)


def _read_header(token: str, algorithms: Collection[Algorithm], types: Collection[str]) -> tuple[Algorithm, str | None]:
    """Algorithm and key id of a token whose outer form is as it must be. Nothing else in a header is obeyed: no crit, jku, jwk, x5u."""
    try:
        header = unproved_header(token)
    except TooLongToken as exc:
        raise BadToken(TokenProblem.TOO_LONG, str(exc)) from None
    except MalformedToken as exc:
        raise BadToken(TokenProblem.MALFORMED, str(exc)) from None
    kind, kid, name = header.get("typ", "JWT"), header.get("kid"), header.get("alg")
    if not header.keys() <= _HEADERS or not isinstance(kind, str) or kind.lower() not in types:
        raise BadToken(TokenProblem.BAD_HEADER, "its header holds more than alg, kid and typ")
    if not isinstance(name, str) or name not in {algorithm.value for algorithm in algorithms}:
        raise BadToken(TokenProblem.WRONG_ALGORITHM, f"its alg is not {' or '.join(sorted(algorithms))}")
    if kid is not None and (not isinstance(kid, str) or not _KID.fullmatch(kid)):
        raise BadToken(TokenProblem.BAD_HEADER, "its kid is no key's id")
    return Algorithm(name), kid


def _from_pem(text: str) -> list[SigningKey]:
    found = []
    for block in _PEM.finditer(text.replace("\r\n", "\n")):
        if "PRIVATE" in block[1]:
            raise ValueError("holds a private key: whoever reads it can make tickets; keep it where they are made, and the public one here")
        try:
            public = load_pem_public_key(block[0].encode())
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError(f"holds a {block[1].lower()} that cannot be read as a public key") from None
        found.append(signing_key(public))  # type: ignore[arg-type]  # it raises for the others
    return found


def _from_jwks(text: str) -> list[SigningKey]:
    try:
        entries = json.loads(text)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("is no JWK set: expected a JSON object with `keys`") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("is no JWK set: `keys` must be a list of objects")
    found = []
    for entry in entries:
        if entry.keys() & _PRIVATE_MEMBERS:
            raise ValueError("holds a private or secret key; only public ones belong here")
        if entry.get("use", "sig") == "sig" and "verify" in entry.get("key_ops", ["verify"]):
            key = _from_jwk(entry)
            if key is not None:
                found.append(key)
    return found


def _from_jwk(entry: dict[str, Any]) -> SigningKey | None:
    kid = entry.get("kid", "")
    if not isinstance(kid, str) or (kid and not _KID.fullmatch(kid)):
        raise ValueError("holds a key whose kid is no printable text of at most 128 characters")
    reader: Any
    match entry.get("kty"), entry.get("crv"):
        case "OKP", "Ed25519":
            reader = OKPAlgorithm
        case "EC", "P-256":
            reader = ECAlgorithm
        case "RSA", _:
            reader = RSAAlgorithm
        case _:
            return None
    try:
        key = signing_key(reader.from_jwk(entry), kid)
    except (jwt.InvalidKeyError, ValueError, TypeError, KeyError) as exc:
        raise ValueError(f"holds a key that cannot be used ({kid or 'without kid'}): {exc}") from None
    return key if entry.get("alg", key.algorithm) == key.algorithm else None


def _number(value: int, length: int = 0) -> str:
    return _base64url(value.to_bytes(length or (value.bit_length() + 7) // 8, "big"))


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
