"""Configurations and views for the commands' tests."""

from pathlib import Path

import pytest
from cli_samples import GATEWAY_TOML, Write
from click.testing import CliRunner

from fxgateway.cli import main


@pytest.fixture
def gateway_toml(tmp_path: Path) -> Write:
    """Writes a gateway.toml."""

    def write(text: str) -> Path:
        path = tmp_path / "gateway.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def relay_toml(tmp_path: Path) -> Write:
    """Writes a relay.toml."""

    def write(text: str) -> Path:
        path = tmp_path / "relay.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A directory in which `fxgateway init` has run; its configuration listens on free ports."""
    directory = tmp_path / "gw"
    result = CliRunner().invoke(main, ["init", "--dir", str(directory), "--public-url", "wss://127.0.0.1:8443"])
    assert result.exit_code == 0, result.output
    (directory / "gateway.toml").write_text(GATEWAY_TOML)
    return directory
