"""What several workers cannot do is refused before they start."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from fxgateway.check import worker_problems
from fxgateway.cli import main
from fxgateway.settings import GatewaySettings, load


def settings_of(tmp_path: Path, workers: int, mode: str) -> tuple[GatewaySettings, Path]:
    folder = tmp_path / "gw"
    made = CliRunner().invoke(main, ["init", "--dir", str(folder), "--public-url", "wss://127.0.0.1:8443"])
    assert made.exit_code == 0, made.output
    environ = {"FXGATEWAY__TUNNEL__WORKERS": str(workers), "FXGATEWAY__SANDBOX__MODE": mode}
    path = folder / "gateway.toml"
    return load(path, environ), path


@pytest.mark.parametrize(("workers", "mode", "keys"), [(1, "required", []), (2, "auto", []), (2, "required", ["sandbox.mode"])])
def test_what_needs_one_process(tmp_path: Path, workers: int, mode: str, keys: list[str]) -> None:
    settings, path = settings_of(tmp_path, workers, mode)
    assert [problem.key for problem in worker_problems(settings, path)] == keys
