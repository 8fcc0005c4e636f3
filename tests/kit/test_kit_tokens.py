import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.codes import Refusal
from fxtunnel.errors import ConfigError, PeerRefused
from fxtunnel.kit import tokens
from fxtunnel.kit.tokens import Assertion, KeyProblem
from fxtunnel.model import GatewayId, RelayId

NOW = 1_700_000_000
RELAY, GATEWAY = RelayId("node-a"), GatewayId("gw-1")
KEY, OTHER = tokens.new_key(), tokens.new_key()
KID = tokens.thumbprint(KEY.public_key())
PUBLIC_PEM = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
PUBLIC_SSH = KEY.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
RSA_KEY = rsa.generate_private_key(65537, 2048)
BINDING = "A" * 43
GOOD: dict[str, Any] = {
    "iss": RELAY,
    "sub": RELAY,
    "aud": GATEWAY,
    "tls-exporter": BINDING,
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 60,
}


def find_key(relay_id: RelayId, kid: str) -> Ed25519PublicKey | KeyProblem:
    if relay_id == "revoked":
        return KeyProblem.REVOKED
    return {(RELAY, KID): KEY.public_key()}.get((relay_id, kid), KeyProblem.UNKNOWN)


def verify(token: str, now_unix: float = NOW) -> Assertion:
    return tokens.verify_assertion(token, gateway_id=GATEWAY, binding=BINDING, find_key=find_key, now_unix=now_unix)


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: dict[str, Any] | bytes, claims: dict[str, Any] | bytes, key: Ed25519PrivateKey = KEY) -> str:
    """A token with exactly this header and these claims, and a true EdDSA signature over them."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    body = ".".join(b64(part) for part in parts)
    return f"{body}.{b64(key.sign(body.encode()))}"


def with_header(**changes: Any) -> str:
    return signed({"alg": "EdDSA", "typ": "JWT", "kid": KID} | changes, GOOD)


def with_claims(**changes: Any) -> str:
    return signed({"alg": "EdDSA", "kid": KID}, {k: v for k, v in (GOOD | changes).items() if v is not ...})


def hmac_token(secret: bytes) -> str:
    body = ".".join(b64(json.dumps(part).encode()) for part in ({"alg": "HS256", "kid": KID}, GOOD))
    return f"{body}.{b64(hmac.digest(secret, body.encode(), hashlib.sha256))}"


def swap(token: str, part: int, by: str) -> str:
    parts = token.split(".")
    parts[part] = by
    return ".".join(parts)


TRUE = with_header()
NONE_BODY = ".".join(b64(json.dumps(part).encode()) for part in ({"alg": "none", "kid": KID}, GOOD))
HEADER_64, CLAIMS_64, SIGNATURE_64 = TRUE.split(".")

REFUSED: dict[str, tuple[Callable[[], str], Refusal]] = {
    "alg none, no signature": (lambda: NONE_BODY + ".", Refusal.BAD_ASSERTION),
    "alg none, some signature": (lambda: f"{NONE_BODY}.{SIGNATURE_64}", Refusal.BAD_ASSERTION),
    "alg nOnE": (lambda: with_header(alg="nOnE"), Refusal.BAD_ASSERTION),
    "alg HS256 with the public PEM": (lambda: hmac_token(PUBLIC_PEM), Refusal.BAD_ASSERTION),
    "alg HS256 with the public ssh key": (lambda: hmac_token(PUBLIC_SSH), Refusal.BAD_ASSERTION),
    "alg HS256 with the raw public key": (lambda: hmac_token(KEY.public_key().public_bytes_raw()), Refusal.BAD_ASSERTION),
    "alg RS256": (lambda: jwt.encode(GOOD, RSA_KEY, algorithm="RS256", headers={"kid": KID}), Refusal.BAD_ASSERTION),
    "alg ES256 over an EdDSA signature": (lambda: with_header(alg="ES256"), Refusal.BAD_ASSERTION),
    "alg missing": (lambda: signed({"kid": KID}, GOOD), Refusal.BAD_ASSERTION),
    "alg a list": (lambda: with_header(alg=["EdDSA"]), Refusal.BAD_ASSERTION),
    "crit unknown": (lambda: with_header(crit=["x"], x=1), Refusal.BAD_ASSERTION),
    "crit b64": (lambda: with_header(crit=["b64"], b64=False), Refusal.BAD_ASSERTION),
    "b64 alone": (lambda: with_header(b64=True), Refusal.BAD_ASSERTION),
    "jku": (lambda: with_header(jku="https://127.0.0.1/k"), Refusal.BAD_ASSERTION),
    "jwk": (
        lambda: signed({"alg": "EdDSA", "kid": KID, "jwk": {"kty": "OKP", "x": tokens.public_to_text(OTHER.public_key())}}, GOOD, OTHER),
        Refusal.BAD_ASSERTION,
    ),
    "x5u": (lambda: with_header(x5u="https://127.0.0.1/c"), Refusal.BAD_ASSERTION),
    "x5c": (lambda: with_header(x5c=["AAAA"]), Refusal.BAD_ASSERTION),
    "typ of another use": (lambda: with_header(typ="at+jwt"), Refusal.BAD_ASSERTION),
    "kid missing": (lambda: signed({"alg": "EdDSA"}, GOOD), Refusal.BAD_ASSERTION),
    "kid a path": (lambda: with_header(kid="../../etc/passwd"), Refusal.BAD_ASSERTION),
    "kid a number": (lambda: with_header(kid=1), Refusal.BAD_ASSERTION),
    "kid of another key": (lambda: with_header(kid=tokens.thumbprint(OTHER.public_key())), Refusal.UNKNOWN_RELAY),
    "header not JSON": (lambda: swap(TRUE, 0, b64(b"{")), Refusal.BAD_ASSERTION),
    "header a list": (lambda: signed(b"[]", GOOD), Refusal.BAD_ASSERTION),
    "header empty": (lambda: swap(TRUE, 0, ""), Refusal.BAD_ASSERTION),
    "header of many brackets": (lambda: swap(TRUE, 0, b64(b"[" * 5000)), Refusal.BAD_ASSERTION),
    "header not UTF-8": (lambda: signed(b'{"alg":"EdDSA","kid":"\xff"}', GOOD), Refusal.BAD_ASSERTION),
    "claims of many brackets": (lambda: swap(TRUE, 1, b64(b'{"iss":' + b"[" * 5000)), Refusal.BAD_ASSERTION),
    "claims with a huge number": (lambda: swap(TRUE, 1, b64(b'{"exp":' + b"9" * 5000 + b"}")), Refusal.BAD_ASSERTION),
    "claims a list": (lambda: signed({"alg": "EdDSA", "kid": KID}, b"[]"), Refusal.BAD_ASSERTION),
    "claims not JSON": (lambda: signed({"alg": "EdDSA", "kid": KID}, b"\x00"), Refusal.BAD_ASSERTION),
    "wrong signature": (lambda: signed({"alg": "EdDSA", "kid": KID}, GOOD, OTHER), Refusal.BAD_ASSERTION),
    "signature of other claims": (lambda: swap(with_claims(extra="a" * 20), 2, SIGNATURE_64), Refusal.BAD_ASSERTION),
    "signature cut short": (lambda: TRUE[:-4], Refusal.BAD_ASSERTION),
    "signature of zeros": (lambda: swap(TRUE, 2, b64(bytes(64))), Refusal.BAD_ASSERTION),
    "exp a string": (lambda: with_claims(exp=str(NOW + 60)), Refusal.BAD_ASSERTION),
    "exp a float": (lambda: with_claims(exp=NOW + 59.5), Refusal.BAD_ASSERTION),
    "exp true": (lambda: with_claims(exp=True), Refusal.BAD_ASSERTION),
    "exp null": (lambda: with_claims(exp=None), Refusal.BAD_ASSERTION),
    "exp negative": (lambda: with_claims(exp=-1), Refusal.BAD_ASSERTION),
    "exp in the year 9999": (lambda: with_claims(exp=253_402_300_799), Refusal.BAD_ASSERTION),
    "exp 61 s after iat": (lambda: with_claims(exp=NOW + 61), Refusal.BAD_ASSERTION),
    "exp before iat": (lambda: with_claims(exp=NOW - 1), Refusal.BAD_ASSERTION),
    "exp infinite": (lambda: with_claims(exp=float("inf")), Refusal.BAD_ASSERTION),
    "iat a string": (lambda: with_claims(iat=str(NOW)), Refusal.BAD_ASSERTION),
    "nbf after exp": (lambda: with_claims(nbf=NOW + 61), Refusal.BAD_ASSERTION),
    **{f"{name} missing": ((lambda name=name: with_claims(**{name: ...})), Refusal.BAD_ASSERTION) for name in GOOD},
    "aud a list": (lambda: with_claims(aud=[GATEWAY]), Refusal.BAD_ASSERTION),
    "aud another gateway": (lambda: with_claims(aud="gw-2"), Refusal.BAD_ASSERTION),
    "aud empty": (lambda: with_claims(aud=""), Refusal.BAD_ASSERTION),
    "sub another relay": (lambda: with_claims(sub="node-b"), Refusal.BAD_ASSERTION),
    "iss a list": (lambda: with_claims(iss=[RELAY]), Refusal.BAD_ASSERTION),
    "iss no name": (lambda: with_claims(iss="a/b", sub="a/b"), Refusal.BAD_ASSERTION),
    "iss with a newline": (lambda: with_claims(iss="node-a\n", sub="node-a\n"), Refusal.BAD_ASSERTION),
    "iss not enrolled": (lambda: with_claims(iss="node-b", sub="node-b"), Refusal.UNKNOWN_RELAY),
    "iss revoked": (lambda: with_claims(iss="revoked", sub="revoked"), Refusal.REVOKED),
    "another connection's": (lambda: with_claims(**{"tls-exporter": "B" * 43}), Refusal.BAD_ASSERTION),
    "bound to nothing": (lambda: with_claims(**{"tls-exporter": ""}), Refusal.BAD_ASSERTION),
    "bound to a list": (lambda: with_claims(**{"tls-exporter": [BINDING]}), Refusal.BAD_ASSERTION),
    "nbf in the future": (lambda: with_claims(nbf=NOW + 31), Refusal.CLOCK_SKEW),
    "iat in the future": (lambda: with_claims(iat=NOW + 31, exp=NOW + 91), Refusal.CLOCK_SKEW),
    "expired": (lambda: with_claims(iat=NOW - 91, nbf=NOW - 91, exp=NOW - 31), Refusal.CLOCK_SKEW),
    "expired and forged": (lambda: swap(with_claims(iat=NOW - 91, nbf=NOW - 91, exp=NOW - 31), 2, SIGNATURE_64), Refusal.BAD_ASSERTION),
    "9 KiB": (lambda: with_claims(pad="x" * 9000), Refusal.BAD_ASSERTION),
    "empty": (lambda: "", Refusal.BAD_ASSERTION),
    "two parts": (lambda: f"{HEADER_64}.{CLAIMS_64}", Refusal.BAD_ASSERTION),
    "five parts, as JWE": (lambda: TRUE + ".a.b", Refusal.BAD_ASSERTION),
    "8,000 dots": (lambda: "." * 8000, Refusal.BAD_ASSERTION),
    "non-ASCII": (lambda: swap(TRUE, 0, "é" + HEADER_64), Refusal.BAD_ASSERTION),
    "lone surrogate": (lambda: swap(TRUE, 0, "\udc80" + HEADER_64), Refusal.BAD_ASSERTION),
    "newline at the end": (lambda: TRUE + "\n", Refusal.BAD_ASSERTION),
    "padding": (lambda: TRUE + "==", Refusal.BAD_ASSERTION),
    "JSON serialisation": (lambda: json.dumps({"payload": CLAIMS_64, "protected": HEADER_64}), Refusal.BAD_ASSERTION),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_assertion_with_a_flaw_is_refused_for_that_flaw(case: str) -> None:
    make, refusal = REFUSED[case]
    with pytest.raises(PeerRefused) as caught:
        verify(make())
    assert caught.value.refusal is refusal


@pytest.mark.parametrize("token", [TRUE, with_claims(extra="ignored"), with_claims(iat=NOW + 30, nbf=NOW + 30, exp=NOW + 90)])
def test_accepts_the_true_one(token: str) -> None:
    assertion = verify(token)
    assert (assertion.relay_id, assertion.kid) == (RELAY, KID)


def test_accepts_what_sign_assertion_makes() -> None:
    made = tokens.sign_assertion(KEY, RELAY, GATEWAY, BINDING, NOW + 0.9)
    assert verify(made).kid == KID
    assert jwt.get_unverified_header(made) == {"alg": "EdDSA", "typ": "JWT", "kid": KID}


@pytest.mark.parametrize(("off_s", "text"), [(-300, "300 s behind"), (300, "300 s ahead")])
def test_says_by_how_much_the_clock_is_off(off_s: int, text: str) -> None:
    with pytest.raises(PeerRefused, match=text) as caught:
        verify(tokens.sign_assertion(KEY, RELAY, GATEWAY, BINDING, NOW + off_s))
    assert caught.value.refusal is Refusal.CLOCK_SKEW


def test_tolerates_30_s_of_clock_skew() -> None:
    token = tokens.sign_assertion(KEY, RELAY, GATEWAY, BINDING, NOW)
    for now in (NOW - 30, NOW + 90):
        assert verify(token, now)
    for now in (NOW - 31, NOW + 91):
        with pytest.raises(PeerRefused):
            verify(token, now)


def test_no_key_is_asked_for_before_the_shape_is_right() -> None:
    def never(relay_id: RelayId, kid: str) -> KeyProblem:
        raise AssertionError("asked for a key")

    for case in ("jku", "9 KiB", "iss no name", "kid a path", "alg HS256 with the public PEM"):
        with pytest.raises(PeerRefused):
            tokens.verify_assertion(REFUSED[case][0](), gateway_id=GATEWAY, binding=BINDING, find_key=never, now_unix=NOW)


def test_a_huge_token_costs_nothing() -> None:
    token = "A" * 20_000_000 + "." + CLAIMS_64 + "." + SIGNATURE_64
    took_s = []
    for _ in range(5):
        started = time.thread_time()
        with pytest.raises(PeerRefused):
            verify(token)
        took_s.append(time.thread_time() - started)
    assert min(took_s) < 0.02  # decoding it takes five times that; any of them may have met the garbage collector


@given(st.text(max_size=300) | st.lists(st.text("AZaz09_-", max_size=80), max_size=5).map(".".join))
def test_any_text_is_refused_and_nothing_else_raised(token: str) -> None:
    with pytest.raises(PeerRefused):
        verify(token)


@given(st.integers(0, len(TRUE) - 1), st.sampled_from("AQgw_-.="))
def test_no_changed_token_gets_in(position: int, by: str) -> None:
    changed = TRUE[:position] + by + TRUE[position + 1 :]
    # The last character of 64 signature bytes carries two spare bits; PyJWT ignores them.
    if changed != TRUE and position < len(TRUE) - 1:
        with pytest.raises(PeerRefused):
            verify(changed)


def test_thumbprint_is_that_of_the_rfc() -> None:
    # RFC 8037, A.3
    public = tokens.public_from_text("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")
    assert tokens.thumbprint(public) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_public_keys_have_one_spelling() -> None:
    text = tokens.public_to_text(KEY.public_key())
    assert tokens.public_from_text(text) == KEY.public_key()
    last = "AEIMQUYcgkosw048".index(text[-1])
    respelled = text[:-1] + "BFJNRVZdhlptx159"[last]
    for wrong in ("", text[:-1], text + "=", text + "A", text + "\n", "é" * 43, "!" * 43, respelled):
        with pytest.raises(ValueError, match="Ed25519 public key"):
            tokens.public_from_text(wrong)


def test_private_keys_survive_pem_and_nothing_else_is_taken() -> None:
    pem = tokens.key_to_pem(KEY)
    assert tokens.key_from_pem(pem).private_bytes_raw() == KEY.private_bytes_raw()
    rsa_pem = RSA_KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    locked = KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x"))
    for wrong in (b"", b"x", PUBLIC_PEM, rsa_pem, locked):
        with pytest.raises(ConfigError, match="relay key"):
            tokens.key_from_pem(wrong)


def test_enrolment_tokens_are_long_new_and_kept_as_a_digest() -> None:
    token = tokens.new_enrolment_token()
    assert token.startswith("fxe_")
    assert len(token) == 47
    assert token != tokens.new_enrolment_token()
    assert tokens.token_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tokens.token_digest("\udc80"), "any text has a digest"


@pytest.mark.parametrize("now_unix", [NOW, 4_000_000_000], ids=["long ago", "far ahead"])
@pytest.mark.parametrize("ahead_s", [0, 29])
def test_the_callers_clock_counts_and_no_other(now_unix: int, ahead_s: int) -> None:
    issued = now_unix + ahead_s
    assert verify(with_claims(iat=issued, nbf=issued, exp=issued + 60), now_unix).kid == KID


@pytest.mark.parametrize("exp", [10**18, 4_102_444_801])
def test_times_beyond_the_century_are_no_times(exp: int) -> None:
    with pytest.raises(PeerRefused) as caught:
        verify(with_claims(iat=exp - 60, nbf=exp - 60, exp=exp), exp - 30)
    assert caught.value.refusal is Refusal.BAD_ASSERTION
    last = 4_102_444_800
    assert verify(with_claims(iat=last - 60, nbf=last - 60, exp=last), last - 30).kid == KID


def test_an_assertion_lives_for_a_moment_at_least() -> None:
    with pytest.raises(PeerRefused, match="not at all"):
        verify(with_claims(exp=NOW))
    assert verify(with_claims(exp=NOW + 1)).kid == KID
    assert verify(with_claims(nbf=NOW + 20, exp=NOW + 20)).kid == KID


def test_the_cap_is_8_kib_to_the_byte() -> None:
    def of_length(size: int) -> str:
        return swap(TRUE, 1, "A" * (size - len(HEADER_64) - len(SIGNATURE_64) - 2))

    for size, why in ((8_192, "claims"), (8_193, "longer than 8192 bytes")):
        assert len(of_length(size)) == size
        with pytest.raises(PeerRefused, match=why):
            verify(of_length(size))
