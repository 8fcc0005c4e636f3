"""Port numbers for servers that tests start: below the range of outgoing connections, and never the same for two tests.

A number is given before its server listens, so looking whether it is free is not enough: each worker of pytest-xdist
has a part of the range to itself, and goes through all of it before it gives a number again.
"""

import itertools
import os
import random
import socket
from collections.abc import Iterator
from typing import Final

LOWEST_PORT: Final = 10_000
HIGHEST_PORT: Final = 32_000


def _numbers() -> Iterator[int]:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = range(LOWEST_PORT + worker, HIGHEST_PORT, workers)
    start = random.randrange(len(mine))
    return itertools.cycle([*mine[start:], *mine[:start]])


_mine: Final = _numbers()


def free_port() -> int:
    """A port of every loopback address that nothing listens on, and no other test is given."""
    for port in _mine:
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("the range of ports is not empty")
