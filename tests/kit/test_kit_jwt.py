"""Tokens of applications: good ones, and everything that must not be taken for one; where their keys come from."""

import base64
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import jwt
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from fxtunnel.errors import ConfigError
from fxtunnel.kit import jwt_keys
from fxtunnel.kit.jwt_keys import AGAIN_S, KEEP_S, KeySource, TokenVerifier
from fxtunnel.kit.jwt_verifying import BadKeys, BadToken, KeySet, TokenRules, UnknownKey, read_keys, verify_token
from fxtunnel.kit.key_page import PageError, is_key_url

ED = ed25519.Ed25519PrivateKey.generate()
OTHER = ed25519.Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())
NOW = 1_800_000_000.0
RULES = TokenRules(("EdDSA", "ES256"), "node-2", "api")
GOOD = {"sub": "ann", "iss": "node-2", "aud": "api", "exp": NOW + 60, "iat": NOW}


def pem(key: object) -> bytes:
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def jwk(key: object, kid: str = "", **more: object) -> dict:
    algorithm = jwt.algorithms.OKPAlgorithm if isinstance(key, ed25519.Ed25519PrivateKey) else jwt.algorithms.ECAlgorithm
    found = json.loads(algorithm.to_jwk(key.public_key()))
    return {**found, **({"kid": kid} if kid else {}), **more}


def jwks(*keys: dict) -> bytes:
    return json.dumps({"keys": keys}).encode()


def sign(claims: dict, key: object = ED, algorithm: str = "EdDSA", **headers: object) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


KEYS = read_keys(pem(ED) + pem(EC))


def test_good_tokens_are_taken_however_their_keys_came() -> None:
    assert verify_token(sign(GOOD), RULES, KEYS, NOW) == GOOD
    assert verify_token(sign(GOOD, EC, "ES256", kid="unknown to a PEM file"), RULES, KEYS, NOW)["sub"] == "ann"
    assert verify_token(sign({**GOOD, "aud": ["x", "api"]}), RULES, KEYS, NOW + 89)
    named = read_keys(jwks(jwk(OTHER, "a"), jwk(ED, "b"), {"kty": "oct", "k": "AAAA"}, jwk(EC, "e", use="enc")))
    assert verify_token(sign(GOOD, kid="b"), RULES, named, NOW)
    assert verify_token(sign(GOOD), RULES, named, NOW)


def unsigned(claims: dict, algorithm: str) -> str:
    parts = ({"alg": algorithm, "typ": "JWT"}, claims)
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts) + "."


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "x" * 9_000,
        unsigned(GOOD, "none"),
        unsigned(GOOD, "none") + "AAAA",
        sign(GOOD, pem(ED).hex().encode(), "HS256"),
        sign(GOOD, EC, "ES256") + "A",
        sign({**GOOD, "exp": NOW - 31}),
        sign({**GOOD, "exp": str(int(NOW) + 60)}),
        sign({key: value for key, value in GOOD.items() if key != "exp"}),
        sign({**GOOD, "nbf": NOW + 31}),
        sign({**GOOD, "iat": NOW + 31}),
        sign({**GOOD, "iat": True}),
        sign({**GOOD, "iss": "node-3"}),
        sign({**GOOD, "aud": "stream"}),
        sign({**GOOD, "aud": ["stream"]}),
        sign(GOOD, crit=["exp"]),
    ],
)
def test_tokens_that_prove_nothing(token: str) -> None:
    with pytest.raises(BadToken):
        verify_token(token, RULES, KEYS, NOW)


def test_tokens_by_keys_that_are_not_known() -> None:
    with pytest.raises(UnknownKey):
        verify_token(sign(GOOD, OTHER), RULES, KEYS, NOW)
    with pytest.raises(UnknownKey):
        verify_token(sign(GOOD, kid="c"), RULES, read_keys(jwks(jwk(ED, "b"))), NOW)
    with pytest.raises(UnknownKey):
        verify_token(sign(GOOD), RULES, KeySet(), NOW)
    with pytest.raises(BadToken, match="algorithm"):  # a key for it is there, and it is not wanted
        verify_token(sign(GOOD, EC, "ES256"), TokenRules(("EdDSA",)), KEYS, NOW)
    with pytest.raises(UnknownKey):  # the set says that this key is for something else
        verify_token(sign(GOOD, EC, "ES256"), TokenRules(("ES256",)), read_keys(jwks(jwk(EC, alg="ES384"), jwk(ED))), NOW)


@given(st.text(max_size=60))
def test_any_text_is_looked_at(text: str) -> None:
    with pytest.raises(BadToken):
        verify_token(text, RULES, KEYS, NOW)


def private_jwk() -> bytes:
    return jwks(json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(ED)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing",
        b"{",
        b'{"keys": 1}',
        b'{"keys": []}',
        b'{"keys": [{"kty": "oct", "k": "AAAA"}]}',
        private_jwk(),
        ED.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        pem(rsa.generate_private_key(65_537, 1_024)),
        json.dumps({"keys": [{"kty": "EC"}] * 65}).encode(),
    ],
)
def test_keys_that_are_none(data: bytes) -> None:
    with pytest.raises(BadKeys):
        read_keys(data)


def test_where_keys_may_come_from(tmp_path: Path) -> None:
    assert is_key_url("https://id.example.com/jwks")
    assert is_key_url("http://127.0.0.1:8080/jwks")
    assert not is_key_url("http://id.example.com/jwks")
    assert not is_key_url("http://localhost.example.com/jwks")
    assert not is_key_url("file:///etc/passwd")
    assert is_key_url("http://[::1]/jwks")
    for never in (
        "https://",
        "https://id:99999999/",
        "https://id:0/",
        "https://[::1/",
        "https://id/a b",
        "https://id/\n",
        "https://id/\xe4",
    ):
        assert not is_key_url(never), never
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenVerifier(RULES, KeySource(tmp_path / "none.pem"))
    (tmp_path / "bad.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="expected"):
        TokenVerifier(RULES, KeySource(tmp_path / "bad.pem"))


class Page:
    """What a URL serves: the next of these, again and again the last one."""

    def __init__(self, *pages: bytes | Exception) -> None:
        self.pages = list(pages)
        self.fetches = 0

    async def fetch(self, url: str, ca: Path | None) -> bytes:
        self.fetches += 1
        page = self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]
        if isinstance(page, Exception):
            raise page
        return page


async def test_keys_are_fetched_once_and_again_when_they_change(mock_clock: trio.testing.MockClock) -> None:
    page = Page(jwks(jwk(ED, "b")), jwks(jwk(OTHER, "c"), jwk(ED, "b")))
    verifier = TokenVerifier(RULES, KeySource(url="https://x/"), fetch=page.fetch, wall_clock=lambda: NOW)
    for _ in range(3):
        assert await verifier.verify(sign(GOOD, kid="b"))
    assert page.fetches == 1
    with pytest.raises(UnknownKey):  # asked a moment ago: nobody can make us ask all the time
        await verifier.verify(sign(GOOD, OTHER, kid="c"))
    assert page.fetches == 1
    mock_clock.jump(AGAIN_S + 1)
    assert await verifier.verify(sign(GOOD, OTHER, kid="c"))
    assert page.fetches == 2
    mock_clock.jump(KEEP_S + 1)
    assert await verifier.verify(sign(GOOD, kid="b"))
    assert page.fetches == 3


async def test_keys_that_cannot_be_fetched_any_more_go_on_being_good(mock_clock: trio.testing.MockClock) -> None:
    page = Page(PageError("refused"), jwks(jwk(ED)), b"<html>", PageError("refused"))
    verifier = TokenVerifier(RULES, KeySource(url="https://x/"), fetch=page.fetch, wall_clock=lambda: NOW)
    with pytest.raises(UnknownKey):
        await verifier.verify(sign(GOOD))
    mock_clock.jump(AGAIN_S + 1)
    for _ in range(3):
        assert await verifier.verify(sign(GOOD))
        mock_clock.jump(KEEP_S + 1)
    assert page.fetches == 4


async def test_many_wait_for_one_fetch() -> None:
    page = Page(jwks(jwk(ED)))
    verifier = TokenVerifier(RULES, KeySource(url="https://x/"), fetch=page.fetch, wall_clock=lambda: NOW)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(verifier.verify, sign(GOOD))
    assert page.fetches == 1


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
async def test_a_page_that_comes_in_drops_is_not_waited_for(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drop would have begun its time anew, in a thread of those that all the relay shares."""
    monkeypatch.setattr(jwt_keys, "FETCH_S", 0.3)
    has_gone = trio.Event()

    async def drip(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(said)
            for byte in iter(lambda: b"H", None):
                await stream.send_all(byte)
                await trio.sleep(0.05)
        has_gone.set()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, drip, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        verifier = TokenVerifier(RULES, KeySource(url=f"http://127.0.0.1:{port}/"), wall_clock=lambda: NOW)
        with trio.fail_after(10):
            with pytest.raises(UnknownKey):
                await verifier.verify(sign(GOOD))
            await has_gone.wait()
        nursery.cancel_scope.cancel()
