"""What all tokens from outside go through: outer form, and signature; nothing else is looked at."""

import base64
import json
import time

import jwt
import pytest

from fxtunnel.kit.compact_jwt import MAX_TOKEN_BYTES, MalformedToken, TooLongToken, proved_claims, unproved_claims, unproved_header
from fxtunnel.kit.tokens import new_key

KEY, OTHER = new_key(), new_key()
STRANGE = {"exp": int(time.time()) - 3_600, "nbf": int(time.time()) + 3_600, "iat": "yesterday", "aud": ["x"], "iss": 1, "sub": 2, "jti": 3}


def token(claims: dict[str, object], headers: dict[str, object] | None = None) -> str:
    return jwt.api_jws.encode(json.dumps(claims).encode(), KEY, "EdDSA", headers)


def raw(*parts: object) -> str:
    return ".".join(
        base64.urlsafe_b64encode(part if isinstance(part, bytes) else json.dumps(part).encode()).rstrip(b"=").decode() for part in parts
    )


def test_a_signature_is_all_that_is_checked() -> None:
    signed = token(STRANGE, {"kid": "a"})
    assert unproved_header(signed)["kid"] == "a"
    assert unproved_claims(signed) == STRANGE
    assert proved_claims(signed, KEY.public_key(), "EdDSA") == STRANGE
    assert proved_claims(signed, OTHER.public_key(), "EdDSA") is None


def test_what_was_changed_is_not_proved() -> None:
    head, _, signature = token({"user": "ann"}).split(".")
    forged = ".".join((head, raw({"user": "bob"}), signature))
    assert unproved_claims(forged) == {"user": "bob"}
    assert proved_claims(forged, KEY.public_key(), "EdDSA") is None


@pytest.mark.parametrize("algorithm", ["none", "HS256", "ES256"])
def test_the_token_does_not_choose_how_it_is_checked(algorithm: str) -> None:
    claimed = raw({"alg": algorithm}, {"user": "ann"}, b"signature")
    with pytest.raises(MalformedToken):
        proved_claims(claimed, KEY.public_key(), "EdDSA")


@pytest.mark.parametrize(
    "text", ["", "a.b", "a.b.c.d", "a.b.", "é.b.c", "a.b.c\n", raw([1], {}, b"x"), raw(b"{", {}, b"x"), raw(b"[" * 4_000, {}, b"x")]
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(MalformedToken) as caught:
        unproved_header(text)
    assert not isinstance(caught.value, TooLongToken)


@pytest.mark.parametrize("claims", [b"{", b"[1]", b"\xff", b"[" * 3_000, b'{"n":' + b"9" * 5_000 + b"}"])
def test_claims_that_cannot_be_read(claims: bytes) -> None:
    signed = jwt.api_jws.encode(claims, KEY, "EdDSA")
    unproved_header(signed)
    with pytest.raises(MalformedToken):
        proved_claims(signed, KEY.public_key(), "EdDSA")
    with pytest.raises(MalformedToken):
        unproved_claims(signed)


def test_a_token_has_a_length() -> None:
    signed = token({"pad": "x" * 5_000})
    assert len(signed) < MAX_TOKEN_BYTES
    unproved_header(signed)
    with pytest.raises(TooLongToken):
        unproved_header(signed + "A" * MAX_TOKEN_BYTES)
