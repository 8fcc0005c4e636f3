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


def test_the_token_of_jupyter_is_in_its_environment_and_no_argument():
    """Every user of a node reads arguments; tests/system start Jupyter in the same way."""
    text = (EXAMPLES[0].parent.parent / "jupyter" / "relay.toml").read_text()
    assert "#   (umask 077; openssl rand -hex 24 >lab.token)\n#   JUPYTER_TOKEN=$(cat lab.token) jupyter lab " in text
    assert ".token=" not in text
