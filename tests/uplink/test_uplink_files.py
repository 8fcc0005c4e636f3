"""gateway.json, the relay's key, and the notes of enrolment."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from uplink_fakes import FakeGateway, running, until

from fxrelay.uplink.gateway_file import GatewayUrl, load_gateway_file
from fxrelay.uplink.identity import load_identity
from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import Authority
from fxtunnel.kit.tokens import public_from_text, thumbprint, verify_assertion
from fxtunnel.model import GatewayId, RelayId

GATEWAY = GatewayId("gw-1")
RELAY = RelayId("node-a")


@pytest.fixture
def content(authority: Authority) -> dict[str, Any]:
    return {
        "version": 1,
        "gateway_id": "gw-1",
        "urls": ["wss://gw.example.com:8443", "wss://[2001:db8::1]"],
        "ca": authority.cert_pem,
        "enrolment": {"token": "fxe_abcdefgh", "expires_unix": 2_000_000_000},
    }


def written(path: Path, content: object) -> Path:
    path = path / "gateway.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    return path


def test_a_good_file(tmp_path: Path, content: dict[str, Any]) -> None:
    file = load_gateway_file(written(tmp_path, content | {"added_later": 1}))
    assert file.gateway_id == "gw-1"
    assert file.urls == (GatewayUrl("gw.example.com", 8443), GatewayUrl("2001:db8::1", 443))
    assert [url.authority for url in file.urls] == ["gw.example.com:8443", "[2001:db8::1]:443"]
    assert file.enrolment is not None
    assert file.enrolment.token.get_secret_value() == "fxe_abcdefgh"
    assert "fxe_" not in repr(file)


def test_the_token_may_be_gone(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["enrolment"]
    assert load_gateway_file(written(tmp_path, content)).enrolment is None


def test_everything_wrong_is_told_at_once_and_the_token_never(tmp_path: Path, content: dict[str, Any]) -> None:
    content |= {"gateway_id": "a b", "urls": ["wss://ok", "https://gw"], "ca": "nonsense"}
    content["enrolment"] = {"token": "s3cret", "expires_unix": "soon"}
    with pytest.raises(ConfigError) as caught:
        load_gateway_file(written(tmp_path, content))
    assert [p.key for p in caught.value.problems] == ["gateway_id", "urls[1]", "ca", "enrolment.token", "enrolment.expires_unix"]
    assert "expected wss://HOST[:PORT], found 'https://gw'" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("key", ["version", "gateway_id", "urls", "ca"])
def test_a_missing_key(key: str, tmp_path: Path, content: dict[str, Any]) -> None:
    del content[key]
    with pytest.raises(ConfigError) as caught:
        load_gateway_file(written(tmp_path, content))
    assert [p.key for p in caught.value.problems] == [key]


@pytest.mark.parametrize(("version", "who"), [(2, "update fxrelay"), (0, "update fxgateway")])
def test_another_version_says_so_and_nothing_else(version: int, who: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"is {version}, and this fxrelay reads version 1: {who}") as caught:
        load_gateway_file(written(tmp_path, {"version": version, "urls": 7}))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_what_is_no_json_object(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not"):
        load_gateway_file(written(tmp_path, text))


def test_a_file_others_can_read_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = written(tmp_path, content)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        load_gateway_file(path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "wss://",
        "ws://gw",
        "wss://gw:0",
        "wss://gw:70000",
        "wss://gw/x",
        "wss://u@gw",
        "wss://gw?x",
        "wss://gẃ",
        "wss://g\nw",
        "wss://[::1",
    ],
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected wss://HOST\[:PORT\]"):
        GatewayUrl.parse(url)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


async def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    first = await load_identity(state, RELAY)
    second = await load_identity(state, RELAY)
    assert (mode(state), mode(state / "relay.key")) == (0o700, 0o600)
    assert first.kid == second.kid == thumbprint(public_from_text(first.public_key))
    assert first.instance != second.instance
    assert "PRIVATE" not in repr(first)


async def test_an_assertion_proves_the_key(tmp_path: Path) -> None:
    identity = await load_identity(tmp_path / "state", RELAY)
    token = identity.assertion(GATEWAY, "bound", 1000.0)
    proof = verify_assertion(
        token, gateway_id=GATEWAY, binding="bound", find_key=lambda *_: public_from_text(identity.public_key), now_unix=1000.0
    )
    assert (proof.relay_id, proof.kid) == (RELAY, identity.kid)


@pytest.mark.parametrize(("pem", "words"), [(b"", "relay.key: is not an unencrypted private key"), (b"\xff" * 10, "relay.key: is not")])
async def test_a_spoilt_key_is_named_and_kept(pem: bytes, words: str, tmp_path: Path) -> None:
    await load_identity(tmp_path / "state", RELAY)
    path = tmp_path / "state" / "relay.key"
    path.write_bytes(pem)
    with pytest.raises(ConfigError, match=words):
        await load_identity(tmp_path / "state", RELAY)
    assert path.read_bytes() == pem


async def test_a_state_directory_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        await load_identity(tmp_path / "state", RELAY)


async def test_enrolment_is_noted_for_one_gateway_key_and_name(tmp_path: Path) -> None:
    state = tmp_path / "state"
    identity = await load_identity(state, RELAY)
    assert not await identity.is_enrolled(GATEWAY)
    await identity.note_enrolment(GATEWAY)
    assert await identity.is_enrolled(GATEWAY)
    assert not await identity.is_enrolled(GatewayId("gw-2"))
    assert mode(state / "enrolled-gw-1.json") == 0o600
    assert json.loads((state / "enrolled-gw-1.json").read_text())["kid"] == identity.kid
    assert not await (await load_identity(state, RelayId("node-b"))).is_enrolled(GATEWAY)
    (state / "relay.key").unlink()
    assert not await (await load_identity(state, RELAY)).is_enrolled(GATEWAY)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kid": 1}'])
async def test_a_spoilt_note_only_means_to_enrol_again(text: str, tmp_path: Path) -> None:
    identity = await load_identity(tmp_path / "state", RELAY)
    await identity.note_enrolment(GATEWAY)
    (tmp_path / "state" / "enrolled-gw-1.json").write_text(text)
    assert not await identity.is_enrolled(GATEWAY)


async def test_a_note_that_cannot_be_written_is_told(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        (state_dir / "enrolled-gw-test.json").mkdir()
        await until(it.ended.is_set)
        assert isinstance(it.error, ConfigError)
        assert "enrolled-gw-test.json" in str(it.error)
