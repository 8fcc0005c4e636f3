"""Task: a Redis of its own for benchmarks of the cluster, and the broker.json that leads to it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import processes

START_S: Final = 1.0
_PASSWORD: Final = "bench"


@contextmanager
def redis(folder: Path) -> Iterator[Path]:
    """Run redis-server without a file of its own in `folder`; gives the path of broker.json there."""
    port = processes.free_port()
    broker = {"transporterType": "redis", "host": "127.0.0.1", "port": port, "password": _PASSWORD, "namespace": "bench", "tls": False}
    path = folder / "broker.json"
    path.write_text(json.dumps(broker))
    path.chmod(0o600)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", _PASSWORD, "--save", "", "--dir", str(folder)]
    server = processes.start(["redis-server", *options], folder / "redis.log")
    try:
        time.sleep(START_S)
        yield path
    finally:
        processes.stop([server])
