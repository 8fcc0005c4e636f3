"""Task: chooses store and transporter by the configuration."""

from pathlib import Path

from fxrelay.cluster.ports import Store, Transporter
from fxrelay.cluster.settings import ClusterSection
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from fxrelay.cluster.sqlite_store import SqliteStore

FILE_NAME = "cluster.db"


def open_cluster(settings: ClusterSection, state_dir: Path) -> tuple[Store, Transporter]:
    """The store and the transporter of `settings`; close both. Nothing is connected to or opened before their first calls.

    Raises:
        ConfigError: broker.json, or a certificate that it names, cannot be used.
    """
    if settings.broker is None:
        path = Path(settings.store.removeprefix("sqlite:")) if settings.store is not None else state_dir / FILE_NAME
        return SqliteStore(path), SqliteTransporter(path)
    # Here, because a relay without a Redis should not spend memory on its client.
    from fxrelay.cluster.broker import load_broker
    from fxrelay.cluster.redis_bus import RedisTransporter
    from fxrelay.cluster.redis_client import RedisClient
    from fxrelay.cluster.redis_store import RedisStore

    broker = load_broker(settings.broker)
    return RedisStore(RedisClient(broker)), RedisTransporter(RedisClient(broker))
