"""What the tests of the uplink share: an authority, and a gateway that is not yet listening."""

from pathlib import Path

import pytest
from uplink_fakes import FakeGateway, make_context

from fxtunnel.kit.certificates import Authority, new_authority


@pytest.fixture(scope="session")
def authority() -> Authority:
    return new_authority("test authority")


@pytest.fixture
def gateway(tmp_path: Path, authority: Authority) -> FakeGateway:
    return FakeGateway(authority, make_context(tmp_path, authority))


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"
