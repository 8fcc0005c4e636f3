"""The configurations under examples/ load as they are; tests/system run them."""

from pathlib import Path

import pytest

import fxgateway.settings
import fxrelay.settings

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*/*.toml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_example_loads(file: Path):
    module = {"gateway": fxgateway.settings, "relay": fxrelay.settings}[file.stem]
    module.load(file, {})


def test_each_example_has_both_ends():
    assert {file.parent.name for file in EXAMPLES} == {"novnc", "jupyter"}
    assert len(EXAMPLES) == 4
