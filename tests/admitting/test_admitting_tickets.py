"""Which tickets are good: the matrix of forged, twisted, stale and misdirected JWTs, and what the true ones say."""

import base64
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.admitting.ticket import BadTicket, Ticket, TicketProblem, TicketRules, UnsignedTicket, mint_ticket, read_ticket
from fxtunnel.kit.compact_jwt import MAX_TOKEN_BYTES
from fxtunnel.kit.signed_claims import Algorithm, BadToken, KeySet, TokenProblem, read_keys, signing_key, verified_claims
from fxtunnel.model import ServiceName

NOW = 1_700_000_000
SSH = ServiceName("ssh")
KEY, OTHER, STRANGER = (Ed25519PrivateKey.generate() for _ in range(3))
EC_KEY, RSA_KEY = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
KNOWN = signing_key(KEY.public_key())
KEYS = KeySet(
    [KNOWN, signing_key(OTHER.public_key(), "other"), signing_key(EC_KEY.public_key(), "ec"), signing_key(RSA_KEY.public_key(), "rsa")]
)
RULES = TicketRules(KEYS, "ssh")
ANY_ALGORITHM = TicketRules(KEYS, "ssh", algorithms=tuple(Algorithm))
PUBLIC_PEM = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
RSA_PEM = RSA_KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
GOOD: dict[str, Any] = {"sub": "alice", "aud": "ssh", "jti": "0123456789abcdef", "iat": NOW, "exp": NOW + 60}
HEADER = {"alg": "EdDSA", "typ": "JWT", "kid": KNOWN.kid}


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: Any, claims: Any, key: Ed25519PrivateKey = KEY) -> str:
    """A token with exactly this header and these claims, and a true EdDSA signature over them."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    body = ".".join(b64(part) for part in parts)
    return f"{body}.{b64(key.sign(body.encode()))}"


def with_header(**changes: Any) -> str:
    return signed({k: v for k, v in (HEADER | changes).items() if v is not ...}, GOOD)


def with_claims(**changes: Any) -> str:
    return signed(HEADER, {k: v for k, v in (GOOD | changes).items() if v is not ...})


def hmac_token(secret: bytes, kid: str = KNOWN.kid) -> str:
    body = ".".join(b64(json.dumps(part).encode()) for part in ({"alg": "HS256", "kid": kid}, GOOD))
    return f"{body}.{b64(hmac.digest(secret, body.encode(), hashlib.sha256))}"


def swap(token: str, part: int, by: str) -> str:
    parts = token.split(".")
    parts[part] = by
    return ".".join(parts)


TRUE = with_header()
NONE_BODY = ".".join(b64(json.dumps(part).encode()) for part in ({"alg": "none", "kid": KNOWN.kid}, GOOD))
HEADER_64, CLAIMS_64, SIGNATURE_64 = TRUE.split(".")

REFUSED: dict[str, tuple[Callable[[], str], TokenProblem | TicketProblem]] = {
    "alg none, no signature": (lambda: NONE_BODY + ".", TokenProblem.MALFORMED),
    "alg none, some signature": (lambda: f"{NONE_BODY}.{SIGNATURE_64}", TokenProblem.WRONG_ALGORITHM),
    "alg nOnE": (lambda: with_header(alg="nOnE"), TokenProblem.WRONG_ALGORITHM),
    "HS256 with the public PEM": (lambda: hmac_token(PUBLIC_PEM), TokenProblem.WRONG_ALGORITHM),
    "HS256 with the RSA key's PEM": (lambda: hmac_token(RSA_PEM, "rsa"), TokenProblem.WRONG_ALGORITHM),
    "RS256 not pinned": (lambda: jwt.encode(GOOD, RSA_KEY, "RS256", {"kid": "rsa"}), TokenProblem.WRONG_ALGORITHM),
    "ES256 not pinned": (lambda: jwt.encode(GOOD, EC_KEY, "ES256", {"kid": "ec"}), TokenProblem.WRONG_ALGORITHM),
    "EdDSA by the kid of an RSA key": (lambda: with_header(kid="rsa"), TokenProblem.WRONG_ALGORITHM),
    "alg missing": (lambda: with_header(alg=...), TokenProblem.WRONG_ALGORITHM),
    "alg a list": (lambda: with_header(alg=["EdDSA"]), TokenProblem.WRONG_ALGORITHM),
    "crit": (lambda: with_header(crit=["b64"], b64=False), TokenProblem.MALFORMED),
    "b64 alone": (lambda: with_header(b64=True), TokenProblem.BAD_HEADER),
    "jku": (lambda: with_header(jku="https://127.0.0.1/k"), TokenProblem.BAD_HEADER),
    "jwk": (lambda: signed(HEADER | {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}}, GOOD, STRANGER), TokenProblem.BAD_HEADER),
    "x5u": (lambda: with_header(x5u="https://127.0.0.1/c"), TokenProblem.BAD_HEADER),
    "x5c": (lambda: with_header(x5c=["AAAA"]), TokenProblem.BAD_HEADER),
    "zip": (lambda: with_header(zip="DEF"), TokenProblem.BAD_HEADER),
    "typ of another use": (lambda: with_header(typ="at+jwt"), TokenProblem.BAD_HEADER),
    "typ a number": (lambda: with_header(typ=1), TokenProblem.BAD_HEADER),
    "kid missing among several keys": (lambda: with_header(kid=...), TokenProblem.UNKNOWN_KEY),
    "kid a path": (lambda: with_header(kid="../../../../dev/null"), TokenProblem.UNKNOWN_KEY),
    "kid of SQL": (lambda: with_header(kid="'/**/OR/**/1=1--"), TokenProblem.UNKNOWN_KEY),
    "kid with a newline": (lambda: with_header(kid="a\nb"), TokenProblem.BAD_HEADER),
    "kid empty": (lambda: with_header(kid=""), TokenProblem.BAD_HEADER),
    "kid a number": (lambda: with_header(kid=1), TokenProblem.MALFORMED),
    "kid too long": (lambda: with_header(kid="k" * 129), TokenProblem.BAD_HEADER),
    "kid of another known key": (lambda: with_header(kid="other"), TokenProblem.BAD_SIGNATURE),
    "kid unknown": (lambda: with_header(kid="k"), TokenProblem.UNKNOWN_KEY),
    "header not JSON": (lambda: swap(TRUE, 0, b64(b"{")), TokenProblem.MALFORMED),
    "header a list": (lambda: signed(b"[]", GOOD), TokenProblem.MALFORMED),
    "header of many brackets": (lambda: swap(TRUE, 0, b64(b"[" * 5000)), TokenProblem.MALFORMED),
    "claims of many brackets": (lambda: signed(HEADER, b'{"sub":' + b"[" * 5000), TokenProblem.MALFORMED),
    "claims with a huge number": (lambda: signed(HEADER, b'{"exp":' + b"9" * 5000 + b"}"), TokenProblem.MALFORMED),
    "claims a list": (lambda: signed(HEADER, b"[]"), TokenProblem.MALFORMED),
    "claims not JSON": (lambda: signed(HEADER, b"\x00"), TokenProblem.MALFORMED),
    "signed by a stranger": (lambda: signed(HEADER, GOOD, STRANGER), TokenProblem.BAD_SIGNATURE),
    "signature of other claims": (lambda: swap(with_claims(sub="root"), 2, SIGNATURE_64), TokenProblem.BAD_SIGNATURE),
    "signature of zeros": (lambda: swap(TRUE, 2, b64(bytes(64))), TokenProblem.BAD_SIGNATURE),
    "signature cut short": (lambda: TRUE[:-5], TokenProblem.MALFORMED),
    "9 KiB": (lambda: with_claims(pad="x" * 9000), TokenProblem.TOO_LONG),
    "empty": (lambda: "", TokenProblem.MALFORMED),
    "two parts": (lambda: f"{HEADER_64}.{CLAIMS_64}", TokenProblem.MALFORMED),
    "five parts, as JWE": (lambda: TRUE + ".a.b", TokenProblem.MALFORMED),
    "8,000 dots": (lambda: "." * 8000, TokenProblem.MALFORMED),
    "non-ASCII": (lambda: "é" + TRUE, TokenProblem.MALFORMED),
    "lone surrogate": (lambda: "\udc80" + TRUE, TokenProblem.MALFORMED),
    "newline at the end": (lambda: TRUE + "\n", TokenProblem.MALFORMED),
    "padding": (lambda: TRUE + "==", TokenProblem.MALFORMED),
    "aud of another service": (lambda: with_claims(aud="vnc"), TicketProblem.WRONG_AUDIENCE),
    "aud of several others": (lambda: with_claims(aud=["vnc", "sshd"]), TicketProblem.WRONG_AUDIENCE),
    "aud missing": (lambda: with_claims(aud=...), TicketProblem.WRONG_AUDIENCE),
    "aud nested": (lambda: with_claims(aud=[["ssh"]]), TicketProblem.WRONG_AUDIENCE),
    "aud an object": (lambda: with_claims(aud={"ssh": 1}), TicketProblem.WRONG_AUDIENCE),
    "service another one": (lambda: with_claims(service="vnc"), TicketProblem.WRONG_SERVICE),
    "service null": (lambda: with_claims(service=None), TicketProblem.WRONG_SERVICE),
    "expired": (lambda: with_claims(iat=NOW - 71, exp=NOW - 11), TicketProblem.EXPIRED),
    "expired and forged": (lambda: swap(with_claims(iat=NOW - 99, exp=NOW - 50), 2, SIGNATURE_64), TokenProblem.BAD_SIGNATURE),
    "nbf in the future": (lambda: with_claims(nbf=NOW + 11), TicketProblem.NOT_YET),
    "iat in the future": (lambda: with_claims(iat=NOW + 11, exp=NOW + 71), TicketProblem.NOT_YET),
    "exp 61 s after iat": (lambda: with_claims(exp=NOW + 61), TicketProblem.LIVES_TOO_LONG),
    "exp in the year 9999": (lambda: with_claims(exp=253_402_300_799), TicketProblem.BAD_CLAIMS),
    "exp before iat": (lambda: with_claims(exp=NOW - 1), TicketProblem.LIVES_TOO_LONG),
    "exp a string": (lambda: with_claims(exp=str(NOW + 60)), TicketProblem.BAD_CLAIMS),
    "exp a float": (lambda: with_claims(exp=NOW + 59.5), TicketProblem.BAD_CLAIMS),
    "exp true": (lambda: with_claims(exp=True), TicketProblem.BAD_CLAIMS),
    "exp infinite": (lambda: with_claims(exp=float("inf")), TicketProblem.BAD_CLAIMS),
    "exp missing": (lambda: with_claims(exp=...), TicketProblem.BAD_CLAIMS),
    "iat missing": (lambda: with_claims(iat=...), TicketProblem.BAD_CLAIMS),
    "nbf a string": (lambda: with_claims(nbf="0"), TicketProblem.BAD_CLAIMS),
    "sub missing": (lambda: with_claims(sub=...), TicketProblem.BAD_CLAIMS),
    "sub empty": (lambda: with_claims(sub=""), TicketProblem.BAD_CLAIMS),
    "sub a list": (lambda: with_claims(sub=["alice"]), TicketProblem.BAD_CLAIMS),
    "sub with a newline": (lambda: with_claims(sub="alice\n"), TicketProblem.BAD_CLAIMS),
    "sub with a blank in front": (lambda: with_claims(sub=" alice"), TicketProblem.BAD_CLAIMS),
    "sub an address": (lambda: with_claims(sub="192.0.2.1"), TicketProblem.BAD_CLAIMS),
    "sub an IPv6 address": (lambda: with_claims(sub="2001:db8::1"), TicketProblem.BAD_CLAIMS),
    "sub too long": (lambda: with_claims(sub="a" * 129), TicketProblem.BAD_CLAIMS),
    "jti missing": (lambda: with_claims(jti=...), TicketProblem.BAD_CLAIMS),
    "jti short": (lambda: with_claims(jti="1234567"), TicketProblem.BAD_CLAIMS),
    "jti a number": (lambda: with_claims(jti=12345678901234567890), TicketProblem.BAD_CLAIMS),
    "jti long": (lambda: with_claims(jti="a" * 129), TicketProblem.BAD_CLAIMS),
    "node an address": (lambda: with_claims(node="127.0.0.1:22"), TicketProblem.BAD_CLAIMS),
    "node a list": (lambda: with_claims(node=["node-a"]), TicketProblem.BAD_CLAIMS),
    "groups a text": (lambda: with_claims(groups="admin"), TicketProblem.BAD_CLAIMS),
    "groups with a number": (lambda: with_claims(groups=["a", 1]), TicketProblem.BAD_CLAIMS),
    "65 groups": (lambda: with_claims(groups=["g"] * 65), TicketProblem.BAD_CLAIMS),
    "long groups": (lambda: with_claims(groups=["g" * 100] * 21), TicketProblem.BAD_CLAIMS),
}


def read(token: str, rules: TicketRules = RULES, now: float = NOW) -> Ticket:
    return read_ticket(token, rules, SSH, now)


@pytest.mark.parametrize("case", REFUSED)
def test_a_ticket_with_a_flaw_is_refused_for_that_flaw(case: str) -> None:
    make, why = REFUSED[case]
    token = make()
    with pytest.raises(BadTicket) as caught:
        read(token)
    assert caught.value.why is why
    assert str(caught.value).isprintable()
    assert not SIGNATURE_64 or SIGNATURE_64 not in str(caught.value)


@pytest.mark.parametrize("what", ["lives", "wide"])
def test_a_policy_of_its_own(what: str) -> None:
    token = with_claims(exp=NOW + 600)
    with pytest.raises(BadTicket, match="lives 600 s, at most 60 s"):
        read(token)
    rules = TicketRules(KEYS, "ssh", max_life_s=600)
    assert read(token, rules, NOW + 600 + (10 if what == "wide" else 0)).user == "alice"
    with pytest.raises(BadTicket, match="expired 11 s ago"):
        read(token, rules, NOW + 611)


@pytest.mark.parametrize(
    "token",
    [
        TRUE,
        with_header(typ=...),
        with_header(x5t="AAAA"),
        with_claims(aud=["vnc", "ssh"]),
        with_claims(nbf=NOW + 10),
        with_claims(service="ssh", extra="ignored"),
        with_claims(iat=NOW + 10, exp=NOW + 70),
    ],
)
def test_takes_the_true_one(token: str) -> None:
    ticket = read(token)
    assert (ticket.user, ticket.node, ticket.groups) == ("alice", None, ())
    assert ticket.expires_unix >= NOW + 60 + 10


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"), [(EC_KEY, "ES256", "ec"), (RSA_KEY, "RS256", "rsa"), (KEY, "EdDSA", KNOWN.kid)], ids=["ec", "rsa", "ed"]
)
def test_takes_each_algorithm_where_it_is_pinned(key: Any, algorithm: str, kid: str) -> None:
    token = mint_ticket(UnsignedTicket("alice", SSH, "node-a", ("cad", "gpu")), key, Algorithm(algorithm), kid, NOW)
    ticket = read(token, ANY_ALGORITHM)
    assert (ticket.user, ticket.node, ticket.groups) == ("alice", "node-a", ("cad", "gpu"))
    assert len(token) <= 1_024  # or it would not travel with an OPEN
    for problem, other in ((TokenProblem.WRONG_ALGORITHM, kid), (TokenProblem.UNKNOWN_KEY, "nobody")):
        wrong = jwt.encode(
            GOOD,
            key,
            algorithm=algorithm,
            headers={"kid": other if problem is TokenProblem.UNKNOWN_KEY else ("rsa" if kid != "rsa" else "ec")},
        )
        with pytest.raises(BadTicket) as caught:
            read(wrong, ANY_ALGORITHM)
        assert caught.value.why is problem


@pytest.mark.parametrize("secret", [PUBLIC_PEM, RSA_PEM, b"", KEY.public_key().public_bytes_raw()], ids=["pem", "rsa", "empty", "raw"])
def test_no_public_key_is_ever_an_hmac_secret(secret: bytes) -> None:
    for kid in (KNOWN.kid, "rsa", "ec"):
        with pytest.raises(BadTicket) as caught:
            read(hmac_token(secret, kid), ANY_ALGORITHM)
        assert caught.value.why is TokenProblem.WRONG_ALGORITHM


def test_an_issuer_and_an_audience_of_their_own() -> None:
    rules = TicketRules(KEYS, "cluster-1", issuer="https://portal.example")
    token = mint_ticket(
        UnsignedTicket("alice", SSH, audience="cluster-1", issuer="https://portal.example"), KEY, Algorithm.EDDSA, KNOWN.kid, NOW
    )
    assert read(token, rules).user == "alice"
    with pytest.raises(BadTicket) as caught:
        read_ticket(token, rules, ServiceName("vnc"), NOW)  # one audience, and still for one service
    assert caught.value.why is TicketProblem.WRONG_SERVICE
    with pytest.raises(BadTicket) as caught:
        read(with_claims(aud="cluster-1"), rules)
    assert caught.value.why is TicketProblem.WRONG_ISSUER


def test_one_id_by_two_keys_is_two_tickets() -> None:
    first, second = read(TRUE), read(signed(HEADER | {"kid": "other"}, GOOD, OTHER))
    assert first.use_id != second.use_id
    assert first.use_id == read(with_claims(exp=NOW + 59)).use_id
    assert GOOD["jti"] not in first.use_id


def test_a_key_without_kid_where_there_is_one_only() -> None:
    rules = TicketRules(KeySet([KNOWN]), "ssh")
    assert read(with_header(kid=...), rules).user == "alice"


def test_eight_kibibytes_and_not_one_more() -> None:
    fits = next(token for length in range(5_800, 6_200) if len(token := with_claims(pad="x" * length)) >= MAX_TOKEN_BYTES - 2)
    assert len(fits) <= MAX_TOKEN_BYTES
    assert read(fits).user == "alice"


def test_none_takes_long_to_judge() -> None:
    for token in [TRUE, *(make() for make, _ in REFUSED.values())]:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            with contextlib.suppress(BadTicket):
                read(token)
            times.append(time.perf_counter() - began)
        assert min(times) < 0.1, token[:60]


@given(st.text() | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,90}", fullmatch=True))
def test_any_text_is_refused_and_nothing_else_happens(token: str) -> None:
    with pytest.raises(BadTicket):
        read(token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*HEADER, "crit", "jku", "x"]), JSON, max_size=4))
def test_any_header_is_refused_or_true(changes: dict[str, Any]) -> None:
    try:
        ticket = read(with_header(**changes))
    except BadTicket:
        return
    assert ticket.user == "alice"
    assert all(changes.get(name, HEADER[name]) == HEADER[name] for name in ("alg", "kid"))


@given(st.dictionaries(st.sampled_from([*GOOD, "nbf", "node", "groups", "service", "iss"]), JSON, max_size=5))
def test_any_claims_are_refused_or_sound(changes: dict[str, Any]) -> None:
    try:
        ticket = read(with_claims(**changes))
    except BadTicket:
        return
    assert 0 < len(ticket.user) <= 128
    assert ticket.user.isprintable()
    assert ticket.expires_unix <= NOW + 60 + 10 + 11
    assert all(isinstance(group, str) for group in ticket.groups)


def pem(key: Any) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def jwk(key: Any, **more: Any) -> dict[str, Any]:
    kind = {"OKP": jwt.algorithms.OKPAlgorithm, "EC": jwt.algorithms.ECAlgorithm, "RSA": jwt.algorithms.RSAAlgorithm}
    name = "OKP" if isinstance(key, Ed25519PrivateKey) else "EC" if hasattr(key, "curve") else "RSA"
    return json.loads(kind[name].to_jwk(key.public_key())) | more


def test_keys_from_pem_and_from_a_set_are_the_same() -> None:
    from_pem = read_keys("".join(f"# a comment\n{pem(key.public_key())}" for key in (KEY, EC_KEY, RSA_KEY)))
    from_set = read_keys(json.dumps({"keys": [jwk(KEY), jwk(EC_KEY, use="sig", alg="ES256"), jwk(RSA_KEY, key_ops=["verify"])]}))
    for algorithm in Algorithm:
        found, same = from_pem.find(None, algorithm), from_set.find(None, algorithm)
        assert found is not None
        assert same is not None
        assert (found.kid, found.thumbprint, found.algorithm) == (same.kid, same.thumbprint, same.algorithm)
    # RFC 8037, A.3: the thumbprint of the key of A.2.
    known = read_keys('{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}')
    assert known.find("kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k", Algorithm.EDDSA) is not None


PRIVATE_PEM = KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
SMALL_RSA = rsa.generate_private_key(65537, 1024)
P384 = ec.generate_private_key(ec.SECP384R1())

UNUSABLE = {
    "nothing": ("", "no public key"),
    "a private key": (PRIVATE_PEM, "private key"),
    "a private key behind a public one": (pem(KEY.public_key()) + PRIVATE_PEM, "private key"),
    "a small RSA key": (pem(SMALL_RSA.public_key()), "2048"),
    "P-384": (pem(P384.public_key()), "not taken"),
    "a broken block": ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "cannot be read"),
    "one key twice": (pem(KEY.public_key()) * 2, "one id"),
    "65 keys": (json.dumps({"keys": [jwk(KEY, kid=f"k{n}") for n in range(65)]}), "more than 64"),
    "a set with a private key": (json.dumps({"keys": [jwk(KEY, d="AAAA")]}), "private or secret"),
    "a set with a secret": (json.dumps({"keys": [{"kty": "oct", "k": "AAAA", "kid": "s"}]}), "private or secret"),
    "a set for encryption": (json.dumps({"keys": [jwk(RSA_KEY, use="enc")]}), "no public key"),
    "a set of another algorithm": (json.dumps({"keys": [jwk(RSA_KEY, alg="PS256")]}), "no public key"),
    "a set without keys": ("{}", "no JWK set"),
    "a set of no list": ('{"keys": {}}', "list of objects"),
    "brackets": ('{"keys":' + "[" * 100_000, "no JWK set"),
    "kid a number": (json.dumps({"keys": [jwk(KEY, kid=1)]}), "kid"),
    "x of no point": ('{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA"}]}', "cannot be used"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_key_files_that_are_refused(case: str) -> None:
    text, words = UNUSABLE[case]
    with pytest.raises(ValueError, match=words):
        read_keys(text)


@given(st.text() | JSON.map(lambda value: json.dumps({"keys": value})))
def test_any_key_file_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_keys(text)


def test_a_token_of_another_use_can_be_told_by_its_type() -> None:
    token = with_header(typ="at+jwt")
    assert verified_claims(token, KEYS, types=("jwt", "at+jwt")).claims["sub"] == "alice"
    with pytest.raises(BadToken):
        verified_claims(token, KEYS)
