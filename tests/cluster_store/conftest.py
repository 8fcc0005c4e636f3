"""Both backends for the contract suites, and a redis-server that lives as long as a test module."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_rig import REDIS, Backend, RedisServer, plain

from fxtunnel.kit.certificates import Authority, new_authority


@pytest.fixture(scope="session")
def authority() -> Authority:
    return new_authority("test authority")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[RedisServer]:
    """Shared; tests that stop it bring it back."""
    directory = Path(tempfile.mkdtemp(prefix="fx-"))
    server = RedisServer(directory, authority, *plain())
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory)


@pytest.fixture
def make_server(tmp_path: Path, authority: Authority) -> Iterator[Callable[..., RedisServer]]:
    """Servers of one test, with any options."""
    made: list[RedisServer] = []

    def make(*options: str, flags: tuple[str, ...] = ()) -> RedisServer:
        made.append(RedisServer(tmp_path / f"redis{len(made)}", authority, *options, flags=flags))
        made[-1].start()
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    if request.param == "redis":
        if not Path(REDIS).exists():
            pytest.skip("redis-server is not installed")
        server = request.getfixturevalue("server")
        backend = Backend(tmp_path, server)
        store = backend.store()
        store._client.ask(lambda redis: redis.flushall())
    else:
        backend = Backend(tmp_path, None)
    yield backend
    backend.close()
