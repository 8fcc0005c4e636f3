"""A real redis-server with TLS and a password, and both kinds of store made for tests."""

import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fxrelay.cluster.broker import load_broker
from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_client import RedisClient
from fxrelay.cluster.redis_store import RedisStore
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore
from fxtunnel.kit.certificates import Authority, issue_server_certificate
from tests.ports import free_port

REDIS = shutil.which("redis-server") or "/usr/bin/redis-server"
NEEDS_REDIS = pytest.mark.skipif(not Path(REDIS).exists(), reason="redis-server is not installed")
SYSTEM = [pytest.mark.system, pytest.mark.xdist_group("store")]
PASSWORD = "pass word:@/%\"'"


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


class RedisServer:
    """A child process on 127.0.0.1. `options` are lines of redis.conf."""

    def __init__(self, directory: Path, authority: Authority, *options: str, flags: tuple[str, ...] = ()) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self._flags = flags
        certificate, key = issue_server_certificate(authority, ["127.0.0.1", "redis.test"])
        for name, content in (("ca.pem", authority.cert_pem), ("cert.pem", certificate), ("key.pem", key.decode())):
            (directory / name).write_text(content)
            (directory / name).chmod(0o600)
        self._config = directory / "redis.conf"
        self._config.write_text(
            f"port 0\ntls-port {self.port}\ncluster-port {free_port()}\nbind 127.0.0.1\n"
            f"tls-cert-file {directory}/cert.pem\ntls-key-file {directory}/key.pem\n"
            f"tls-ca-cert-file {directory}/ca.pem\ntls-auth-clients no\ndir {directory}\nlogfile {directory}/log\n"
            + "\n".join(options)
            + "\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([REDIS, str(self._config), *self._flags], stdin=subprocess.DEVNULL)
        wait_until(self._listens)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def plain(password: str = PASSWORD) -> tuple[str, ...]:
    """Options of a server with a password that forgets everything."""
    return (f"requirepass {json.dumps(password)}", 'save ""', "appendonly no")


def write_broker(directory: Path, content: dict[str, Any], name: str = "broker.json") -> Path:
    path = directory / name
    path.write_text(json.dumps(content))
    path.chmod(0o600)
    return path


def broker_content(server: RedisServer, **more: Any) -> dict[str, Any]:
    return {
        "transporterType": "redis",
        "host": "127.0.0.1",
        "port": server.port,
        "password": PASSWORD,
        "namespace": "fx-test",
        "ca": str(server.directory / "ca.pem"),
        **more,
    }


def redis_client(server: RedisServer, **more: Any) -> RedisClient:
    path = write_broker(server.directory, broker_content(server, **more))
    return RedisClient(load_broker(path))


class Backend:
    """Where stores and transporters are made; any number of them see the same."""

    def __init__(self, directory: Path, server: RedisServer | None) -> None:
        self.path = directory / "cluster.db"
        self.server = server
        self._made: list[Store | Transporter] = []

    def store(self) -> Store:
        made: Store = SqliteStore(self.path) if self.server is None else RedisStore(redis_client(self.server))
        self._made.append(made)
        return made

    def transporter(self) -> Transporter:
        made: Transporter = SqliteTransporter(self.path) if self.server is None else RedisTransporter(redis_client(self.server))
        self._made.append(made)
        return made

    def fill(self, collection: str, documents: dict[str, str]) -> None:
        """Many documents at once, as `put` would have written them one by one."""
        store = self._made[0]
        if isinstance(store, SqliteStore):
            rows = [(collection, key.encode(), text.encode()) for key, text in documents.items()]
            store.now_ms()
            with closing(sqlite3.connect(self.path)) as database, database:
                database.executemany("INSERT INTO documents (collection, key, body, updated_ms) VALUES (?, ?, ?, 1)", rows)
        elif isinstance(store, RedisStore):
            stamped = {key: f"1:{text}" for key, text in documents.items()}
            store._client.ask(lambda redis: redis.hset(f"{{fx-test}}:c:{collection}", mapping=stamped))

    def publish_many(self, topic: str, texts: list[str]) -> None:
        """In one step, in order."""
        self.publish_raw(topic, [text.encode() for text in texts])

    def publish_raw(self, topic: str, bodies: list[bytes]) -> None:
        """As a member would that keeps to no rule."""
        transporter = self._made[-1]
        if isinstance(transporter, SqliteTransporter):
            now_ms = time.time_ns() // 1_000_000
            with closing(sqlite3.connect(self.path)) as database, database:
                database.executemany(
                    "INSERT INTO messages (sent_ms, topic, body) VALUES (?, ?, ?)", [(now_ms, topic, body) for body in bodies]
                )
        elif isinstance(transporter, RedisTransporter):
            channel = f"{{fx-test}}:{topic}"

            def publish(redis: Any) -> None:
                pipeline = redis.pipeline(transaction=False)
                for body in bodies:
                    pipeline.publish(channel, body)
                pipeline.execute()

            transporter._client.ask(publish)

    def close(self) -> None:
        for made in self._made:
            made.close()
