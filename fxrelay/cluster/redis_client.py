"""Task: a Redis of broker.json through redis-py: one server, one behind Sentinels, or a Redis Cluster. Blocking: for worker threads."""

import re
import ssl
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection

from fxrelay.cluster.broker import Broker, Endpoint, Tls
from fxtunnel.errors import StoreError

T = TypeVar("T")

CONNECT_S: Final = 2.0
READ_S: Final = 3.0
HEALTH_S: Final = 15.0
"""A connection that was idle for this long is asked for a sign of life before it is used."""
MAX_CALLS: Final = 16
"""Calls, and so connections, at once."""
WAIT_S: Final = 2.0
_MAX_TEXT: Final = 300
_UNREACHED: Final = re.compile(r"Error -?\d+ connecting to (?P<address>\S+)\. (?P<why>.+)")
"""As redis-py says it."""


class RedisClient:
    """A pool of connections, made when they are needed. Every call is tried once: repeating one whose answer was lost could count twice."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CALLS)
        # redis-py's types say that each answer may be awaitable.
        self._client: Any = None
        self._closed = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"redis {self._broker.endpoints[0]}"

    @property
    def is_one_server(self) -> bool:
        """Whether always the same process answers: no failover can put a replica in its place."""
        return not (self._broker.sentinel_name or self._broker.is_cluster)

    @property
    def appendfsync(self) -> str:
        """What broker.json says of Redis's configuration; empty if nothing."""
        return self._broker.appendfsync

    @property
    def has_one_line(self) -> bool:
        """Whether all keys are at the server to which any connection of the pool leads."""
        return not self._broker.is_cluster

    def key(self, *parts: str) -> str:
        """A key or channel. The braces keep all keys on one node of a Redis Cluster, so that there is one clock (hash tags)."""
        return ":".join((f"{{{self._broker.namespace}}}", *parts))

    def ask(self, call: Callable[[Any], T]) -> T:
        """What `call`, given the redis-py client, returns. `call` must do nothing else.

        Raises:
            StoreError: for whatever redis-py raises. The call may or may not have been done.
        """
        self._check_open()
        if not self._slots.acquire(timeout=WAIT_S):
            raise StoreError(f"{self.name}: {MAX_CALLS} calls wait for it already")
        try:
            return call(self._ready())
        except StoreError:
            raise
        # A server that does not speak the protocol brings redis-py's parser to raise nearly anything.
        except Exception as exc:
            raise self.problem(exc) from exc
        finally:
            self._slots.release()
            if self._closed:
                self._disconnect()

    def connection(self, channel: str) -> Any:
        """A new, connected redis-py connection outside the pool, to a node that hears what is published on `channel`. The caller closes it.

        Raises:
            StoreError: as `ask`.
        """

        def connect(client: Any) -> Any:
            if self._broker.is_cluster:
                client = client.get_redis_connection(client.get_node_from_key(channel))
            pool = client.connection_pool
            connection = pool.connection_class(**{**pool.connection_kwargs, "health_check_interval": 0})
            connection.connect()
            return connection

        return self.ask(connect)

    def problem(self, exc: Exception) -> StoreError:
        """What `exc` means to a person."""
        return StoreError(f"{self.name}: {'was closed' if self._closed else self._explain(exc)}")

    def close(self) -> None:
        """End all connections; calls under way fail. Never blocks for long. May be repeated."""
        self._closed = True
        self._disconnect()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.name}: was closed")

    def _disconnect(self) -> None:
        client = self._client
        if client is None:
            return
        if self._broker.is_cluster:
            client.disconnect_connection_pools()
        else:
            client.connection_pool.disconnect()

    def _ready(self) -> Any:
        if self._client is None:
            # A Redis Cluster is asked for its nodes when its client is made, which takes time.
            if not self._lock.acquire(timeout=WAIT_S):
                raise StoreError(f"{self.name}: another call is still trying to reach it")
            try:
                if self._client is None:
                    self._client = _open(self._broker)
            finally:
                self._lock.release()
        self._check_open()
        return self._client

    def _explain(self, exc: Exception) -> str:
        text = " ".join(str(exc).split()) or type(exc).__name__
        for secret in (self._broker.login.password, self._broker.login.sentinel_password):
            if secret.get_secret_value():
                text = text.replace(secret.get_secret_value(), "***")
        text = "".join(letter if letter.isprintable() else "?" for letter in text)[:_MAX_TEXT]
        if isinstance(exc, redis.exceptions.AuthenticationError) or text.startswith(("NOAUTH", "WRONGPASS")):
            return f"refuses the username or password of broker.json ({text})"
        if isinstance(exc, redis.exceptions.TimeoutError):
            # What speaks no TLS often just waits for more.
            doubt = ", or does not speak TLS on this port" if self._broker.tls is not None and "connecting" in text else ""
            return f"does not answer within {READ_S:g} s{doubt} ({text})"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return f"its certificate is not trusted; see ca and servername in broker.json ({text})"
        if "WRONG_VERSION_NUMBER" in text:
            return f"does not speak TLS on this port ({text})"
        if isinstance(exc, redis.exceptions.MovedError):
            return 'is part of a Redis Cluster; write "cluster": true into broker.json'
        unreached = _UNREACHED.fullmatch(text)
        if unreached is not None and unreached["address"] in self.name:  # which is said before
            text = f"cannot be reached: {unreached['why']}"
        return text.removesuffix(".")


def _open(broker: Broker) -> Any:
    login = broker.login
    common: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_S,
        "socket_timeout": READ_S,
        "socket_keepalive": True,
        "protocol": 2,
    }
    kwargs = {
        **common,
        "username": login.username or None,
        "password": login.password.get_secret_value() or None,
        "max_connections": MAX_CALLS * 2,
    }
    checked = {"health_check_interval": HEALTH_S, "retry": Retry(NoBackoff(), 0)}
    if broker.is_cluster:
        return _open_cluster(broker, kwargs)
    if broker.sentinel_name:
        sentinel: Any = Sentinel([])  # type: ignore[no-untyped-call]  # redis-py has annotated parts of itself only
        sentinel.sentinels = [
            redis.Redis(connection_pool=_pool(broker.tls, endpoint, {**common, **checked, "password": _sentinel_password(broker)}))
            for endpoint in broker.endpoints
        ]
        base = _verified(SentinelManagedSSLConnection, broker.tls) if broker.tls is not None else SentinelManagedConnection
        return sentinel.master_for(broker.sentinel_name, connection_class=base, db=broker.db, **kwargs, **checked)
    return redis.Redis(connection_pool=_pool(broker.tls, broker.endpoints[0], {**kwargs, **checked, "db": broker.db}))


def _open_cluster(broker: Broker, kwargs: dict[str, Any]) -> Any:
    # With a URL the nodes' pools take the connection class that is given; without one redis-py insists on its own.
    return redis.RedisCluster(
        url=f"redis://{broker.endpoints[0]}",
        connection_class=_connection_class(broker.tls),
        retry=Retry(NoBackoff(), 0),
        **kwargs,
    )


def _pool(tls: Tls | None, endpoint: Endpoint, kwargs: dict[str, Any]) -> ConnectionPool:
    return ConnectionPool(connection_class=_connection_class(tls), host=endpoint.host, port=endpoint.port, **kwargs)


def _sentinel_password(broker: Broker) -> str | None:
    return broker.login.sentinel_password.get_secret_value() or None


def _connection_class(tls: Tls | None) -> type[Connection]:
    return _verified(SSLConnection, tls) if tls is not None else Connection


def _verified(base: type[SSLConnection], tls: Tls) -> type[SSLConnection]:
    """`base`, with our own context: redis-py's trusts the system's authorities besides `ca`, and knows no other name than the host's."""

    class Verified(base):  # type: ignore[valid-type, misc]  # a base that is chosen at run time
        def _wrap_socket_with_ssl(self, sock: Any) -> ssl.SSLSocket:
            return tls.context.wrap_socket(sock, server_hostname=tls.servername or self.host)

    return Verified
