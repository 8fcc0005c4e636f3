"""Pure: the outer form of JWTs that come from outside, and their signature: all that the JWT library is asked for.

Three profiles stand on it. They stay apart because they refuse different things: the assertions of relays (`tokens.py`: EdDSA, a closed
list of headers, one use), tickets and passes (`signed_claims.py`: a closed list of headers, one algorithm a key, claims left to the
caller), tokens of applications (`jwt_verifying.py`: headers of many issuers, pinned algorithms, keys without a name, times and audience).
No profile obeys anything in a header.
"""

import re
from typing import Any, Final

import jwt
from jwt.types import Options

MAX_TOKEN_BYTES: Final = 8_192
"""Decoding 20 MB of header costs a second of CPU; nobody has proved anything yet at that point."""

LATEST_UNIX: Final = 4_102_444_800
"""2100-01-01: a time beyond it, in a token, is a mistake or an attack."""

_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_UNCHECKED: Final[Options] = {"verify_signature": False}
# The library would compare with its own clock and its own idea of types; claims are checked by whoever knows what they are for.
_SIGNATURE_ONLY: Final[Options] = {
    "verify_signature": True,
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}
# RecursionError: 8 KiB hold enough brackets to exhaust the JSON decoder, and not every PyJWT catches it. ValueError: digits without end.
# TypeError: a key that the library does not take after all.
_UNREADABLE: Final = (jwt.PyJWTError, RecursionError, ValueError, TypeError)


class MalformedToken(Exception):
    """No JWT in the compact form (RFC 7515, 7.1). `str()` says what is wrong, without a word of the token."""


class TooLongToken(MalformedToken):
    """More than MAX_TOKEN_BYTES."""


def unproved_header(token: str) -> dict[str, Any]:
    """The header of a token whose outer form is right. Anybody may have written it.

    Raises:
        MalformedToken: it has none that can be read.
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise TooLongToken(f"it is longer than {MAX_TOKEN_BYTES} bytes")
    if not _COMPACT.fullmatch(token):
        raise MalformedToken("it is no compact JWT")
    try:
        return jwt.get_unverified_header(token)
    except _UNREADABLE:
        raise MalformedToken("its header is malformed") from None


def unproved_claims(token: str) -> dict[str, Any]:
    """What a token says, whoever signed it: to find the key that it must be signed with. Call `unproved_header` first.

    Raises:
        MalformedToken: they cannot be read.
    """
    try:
        claims: dict[str, Any] = jwt.decode(token, options=_UNCHECKED)
    except _UNREADABLE:
        raise MalformedToken("its claims are malformed") from None
    return claims


def proved_claims(token: str, key: Any, algorithm: str) -> dict[str, Any] | None:
    """What a token says, if `key` has signed it with `algorithm`, which the caller has chosen (RFC 8725, 3.1); None if not.

    Call `unproved_header` first. No claim has been looked at: neither times nor types.

    Raises:
        MalformedToken: they cannot be read.
    """
    try:
        claims: dict[str, Any] = jwt.decode(token, key, algorithms=[algorithm], options=_SIGNATURE_ONLY)
    except jwt.InvalidSignatureError:
        return None
    except _UNREADABLE:
        raise MalformedToken("its claims are malformed") from None
    return claims
