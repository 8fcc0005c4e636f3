"""The documents say what the code does."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import fxgateway.cli
import fxgateway.settings
import fxrelay.cli
import fxrelay.settings

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page for page in ROOT.rglob("*.md") if not any(p.startswith(".") or p == "site-packages" for p in page.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What its headings can be linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_are_headings(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```toml" in page.read_text()], ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_in_documents_load(page: Path, tmp_path: Path):
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)):
        config = tmp_path / f"{number}.toml"
        config.write_text(block)
        module = fxgateway.settings if "[tunnel]" in block else fxrelay.settings
        module.load(config, {})


def test_every_limit_is_explained():
    text = (ROOT / "docs" / "dos.md").read_text()
    for module, models in ((fxgateway.settings, ("limits", "resume", "liveness")), (fxrelay.settings, ("limits", "resume", "liveness"))):
        whole = module.GatewaySettings if module is fxgateway.settings else module.RelaySettings
        for section in models:
            for key in whole.model_fields[section].annotation.model_fields:
                assert f"{section}.{key}" in text, f"docs/dos.md does not explain {section}.{key}"


def test_no_limit_is_invented():
    known = set()
    for whole in (fxgateway.settings.GatewaySettings, fxrelay.settings.RelaySettings):
        for section in ("limits", "resume", "liveness"):
            known |= {f"{section}.{key}" for key in whole.model_fields[section].annotation.model_fields}
    named = set(re.findall(r"\b((?:limits|resume|liveness)\.[a-z_]+)\b", (ROOT / "docs" / "dos.md").read_text()))
    assert named <= known


@pytest.mark.parametrize(("main", "program"), [(fxgateway.cli.main, "fxgateway"), (fxrelay.cli.main, "fxrelay")])
def test_commands_in_documents_exist(main, program):
    listed = CliRunner().invoke(main, ["--help"]).output
    for page in PAGES:
        for command in re.findall(rf"(?:^ {{4}}|`){program} ([a-z]+)\b", page.read_text(), re.MULTILINE):
            assert re.search(rf"^  {command}\b", listed, re.MULTILINE), f"{page.name} names {program} {command}"


def test_metrics_in_documents_exist():
    sources = (ROOT / "fxgateway" / "admin" / "metrics.py").read_text() + (ROOT / "fxrelay" / "admin" / "metrics.py").read_text()
    for name in set(re.findall(r"\b(fx(?:gateway|relay)_[a-z_]+)", (ROOT / "docs" / "operations.md").read_text())):
        assert f'"{name.removesuffix("_total")}"' in sources, f"no metric {name}"


def test_tests_in_documents_exist():
    """docs/hostile.md names the test of every promise; a test that is renamed must not leave a promise without one."""
    text = (ROOT / "docs" / "hostile.md").read_text()
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(named) > 100
    assert {f"R{number}" for number in range(1, 30)} <= set(re.findall(r"^\| (R\d+) \|", text, re.MULTILINE))
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    gone = [f"{file}::{test}" for file, test in named if f"def {test}(" not in sources.get(file, "")]
    assert not gone
