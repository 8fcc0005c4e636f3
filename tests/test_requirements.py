"""What a newcomer installs: the pinned files serve every Python we promise, and bring the product and nothing else."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11.0", "3.11.2", "3.11.3", "3.12.3", "3.13.5")


def pinned(name: str, python: str) -> set[str]:
    """Names that pip would take from a requirements file with this Python."""
    lines = [line.rstrip("\\ ") for line in (ROOT / "requirements" / name).read_text().splitlines() if line[:1] not in (" ", "#", "")]
    return {canonicalize_name(entry.name) for entry in map(Requirement, lines) if applies(entry, python, "")}


def applies(entry: Requirement, python: str, extra: str) -> bool:
    environment = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2]), "extra": extra}
    return entry.marker is None or entry.marker.evaluate(environment)


def needed(roots: list[str], python: str) -> set[str]:
    """The names of these requirements and of all that they need, as the installed packages state it."""
    waiting = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    while waiting:
        entry = waiting.pop()
        for extra in ("", *entry.extras):
            if not applies(entry, python, "") or (canonicalize_name(entry.name), extra) in seen:
                continue
            seen.add((canonicalize_name(entry.name), extra))
            try:
                stated = importlib.metadata.requires(entry.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [need for need in map(Requirement, stated) if need.marker is None or applies(need, python, extra)]
    return {name for name, _ in seen}


@pytest.mark.parametrize("python", PYTHONS)
def test_what_runs_is_pinned_and_nothing_else(python: str):
    assert pinned("run.txt", python) == needed(PROJECT["dependencies"], python)


@pytest.mark.parametrize("python", PYTHONS)
def test_what_tests_need_is_pinned(python: str):
    assert needed(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"], python) <= pinned("dev.txt", python)


@pytest.mark.parametrize("python", PYTHONS)
def test_what_builds_is_pinned_and_nothing_else(python: str):
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert pinned("build.txt", python) == needed(build_system, python)
    lines = set((ROOT / "requirements" / "build.txt").read_text().splitlines())
    pins = {line for line in lines if "==" in line and not line.startswith("#")}
    assert pins <= set((ROOT / "requirements" / "dev.txt").read_text().splitlines())


def test_the_packages_carry_their_types():
    for package in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").exists()
