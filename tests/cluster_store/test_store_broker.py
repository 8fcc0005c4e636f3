"""broker.json: what is accepted, what is refused and how that is said; and which store the configuration chooses."""

import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from store_rig import write_broker

from fxrelay.cluster.broker import Endpoint, load_broker
from fxrelay.cluster.opening import open_cluster
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.settings import ClusterSection
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxtunnel.errors import ConfigError
from fxtunnel.kit.certificates import new_authority

ORIGINAL: dict[str, Any] = {
    "transporterType": "redis",
    "host": "db.example.com",
    "port": 6379,
    "password": "s3cret-s3cret",
    "namespace": "fastx-cluster",
    "rejectUnauthorized": True,
}


def problems(directory: Path, content: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_broker(write_broker(directory, content))
    assert "s3cret" not in str(caught.value)
    return {problem.key: problem.message for problem in caught.value.problems}


def test_the_originals_file_is_read_as_it_is(tmp_path: Path) -> None:
    broker = load_broker(write_broker(tmp_path, ORIGINAL))
    assert broker.endpoints == (Endpoint("db.example.com", 6379),)
    assert (broker.namespace, broker.db, broker.sentinel_name, broker.is_cluster) == ("fastx-cluster", 0, "", False)
    assert broker.login.password.get_secret_value() == "s3cret-s3cret"
    assert broker.tls is not None
    assert broker.tls.context.verify_mode is ssl.CERT_REQUIRED
    assert broker.tls.context.check_hostname
    assert "s3cret" not in repr(broker)


def test_our_own_keys(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(new_authority("it").cert_pem)
    more = {"ca": "ca.pem", "servername": "redis.internal", "db": 2, "username": "relay"}
    broker = load_broker(write_broker(tmp_path, {**ORIGINAL, **more}))
    assert broker.tls is not None
    assert broker.tls.servername == "redis.internal"
    assert len(broker.tls.context.get_ca_certs()) == 1
    assert (broker.db, broker.login.username) == (2, "relay")


def test_sentinels_and_clusters(tmp_path: Path) -> None:
    sentinels = [{"host": "s1", "port": 26379}, {"host": "s2"}]
    broker = load_broker(write_broker(tmp_path, {"transporterType": "redis", "sentinels": sentinels, "sentinelName": "store"}))
    assert (broker.endpoints, broker.sentinel_name) == ((Endpoint("s1", 26379), Endpoint("s2", 26379)), "store")
    assert load_broker(write_broker(tmp_path, {**ORIGINAL, "cluster": True})).is_cluster


def test_reject_unauthorized_false_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broker = load_broker(write_broker(tmp_path, {**ORIGINAL, "rejectUnauthorized": False}))
    assert broker.tls is not None
    assert broker.tls.context.verify_mode is ssl.CERT_NONE
    assert len(caplog.records) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_no_tls_on_this_machine_only(tmp_path: Path, host: str) -> None:
    assert load_broker(write_broker(tmp_path, {**ORIGINAL, "host": host, "tls": False})).tls is None
    assert "this machine only" in problems(tmp_path, {**ORIGINAL, "tls": False})["tls"]
    both = [{"host": host}, {"host": "s2"}]
    found = problems(tmp_path, {"transporterType": "redis", "sentinels": both, "sentinelName": "store", "tls": False})
    assert "this machine only" in found["tls"]


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        {
            "transporterType": "",
            "port": "6379",
            "pasword": "s3cret",
            "namespace": "{x}",
            "rejectUnauthorized": "yes",
            "cert": "c",
            "db": -1,
        },
    )
    assert found.keys() == {"transporterType", "host", "port", "pasword", "namespace", "rejectUnauthorized", "cert", "db"}
    assert "did you mean password?" in found["pasword"]
    assert 'is required: "redis"' in found["transporterType"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"transporterType": "tcp"}, "transporterType"),
        ({"transporterType": None}, "transporterType"),
        ({"host": ""}, "host"),
        ({"host": "db.example.com:6379"}, "host"),
        ({"host": "redis://db"}, "host"),
        ({"host": 7}, "host"),
        ({"port": 0}, "port"),
        ({"port": True}, "port"),
        ({"password": 7}, "password"),
        ({"sentinels": [{"host": "s1", "weight": 1}], "sentinelName": "x"}, "sentinels.0.weight"),
        ({"sentinels": [{"host": "s1"}]}, "sentinelName"),
        ({"sentinels": [7], "sentinelName": "x"}, "sentinels.0"),
        ({"sentinelName": "x"}, "sentinels"),
        ({"cluster": True, "sentinels": [{"host": "s1"}], "sentinelName": "x"}, "cluster"),
        ({"cluster": True, "db": 1}, "db"),
        ({"key": "k"}, "cert"),
        ({"ca": "missing.pem"}, "ca"),
        ({"reject_unauthorized": True}, "reject_unauthorized"),
    ],
)
def test_one_thing_is_wrong(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    assert key in problems(tmp_path, {**ORIGINAL, **change})


@pytest.mark.parametrize("text", ["", "[]", "{", "7", "[" * 100_000])
def test_what_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broker.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not"):
        load_broker(path)


def test_a_file_others_may_read_is_refused(tmp_path: Path) -> None:
    path = write_broker(tmp_path, ORIGINAL)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"run: chmod 600 {path}"):
        load_broker(path)


def test_a_key_others_may_read_and_a_ca_that_is_none_are_refused(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("nothing")
    assert problems(tmp_path, {**ORIGINAL, "ca": "ca.pem"}).keys() == {"ca"}
    with pytest.raises(ConfigError, match="chmod 600"):
        load_broker(write_broker(tmp_path, {**ORIGINAL, "cert": "cert.pem", "key": "key.pem"}))
    (tmp_path / "key.pem").chmod(0o600)
    assert problems(tmp_path, {**ORIGINAL, "cert": "cert.pem", "key": "key.pem"}).keys() == {"cert"}


def test_the_configuration_chooses_and_nothing_is_connected(tmp_path: Path) -> None:
    store, transporter = open_cluster(ClusterSection(), tmp_path / "state")
    assert isinstance(store, SqliteStore)
    assert isinstance(transporter, SqliteTransporter)
    assert not (tmp_path / "state").exists()
    store.put("servers", "n", "x")
    assert (tmp_path / "state" / "cluster.db").exists()
    store.close()
    store, _ = open_cluster(ClusterSection(store=f"sqlite:{tmp_path}/other.db"), tmp_path / "state")
    store.put("servers", "n", "x")
    assert (tmp_path / "other.db").exists()
    store.close()
    path = write_broker(tmp_path, {**ORIGINAL, "host": "nobody.invalid"})
    store, transporter = open_cluster(ClusterSection(broker=path), tmp_path)
    assert isinstance(store, RedisStore)
    assert isinstance(transporter, RedisTransporter)
    store.close()
    transporter.close()
    path.write_text(json.dumps({}))
    with pytest.raises(ConfigError):
        open_cluster(ClusterSection(broker=path), tmp_path)
