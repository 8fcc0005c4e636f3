"""The rules of docs/ARCHITECTURE.md, read from the source: who may import whom, and what a module looks like."""

import ast
import re
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fxtunnel", "fxgateway", "fxrelay")
FORBIDDEN = {"fxtunnel": {"fxgateway", "fxrelay"}, "fxgateway": {"fxrelay"}, "fxrelay": {"fxgateway"}}
IMPURE = {"trio", "socket", "ssl", "time", "random", "os", "logging"}
PURE_ROOMS = ("fxtunnel/protocol", "fxgateway/routing")
KINDS = ("Pure:", "Port:", "Task:", "Pump:")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
MAX_LINES = 400
LATER = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b")

ANNOTATION_CIRCLES = (
    (
        {"fxtunnel.protocol.mux", "fxtunnel.protocol.stream"},
        "a stream calls the mux that made it, once a frame: a port between them would cost",
    ),
    ({"fxtunnel.engine.reactor", "fxtunnel.engine.guest"}, "the guest is the reactor's other half, in a file of its own for its length"),
    (
        {f"fxtunnel.engine.{name}" for name in ("ports", "send_scheduler", "session", "splice")},
        "owners are told which session it was",
    ),
    (
        {
            f"fxgateway.doors.{name}"
            for name in (
                *("client", "client_handshake", "door", "pending_clients", "preread", "proxied", "recorded"),
                *("redispatch", "remote_relay", "service_outages", "web_client"),
            )
        },
        "a client, whatever stage it is at, counts at its door and asks it for what all its clients share",
    ),
    ({f"fxrelay.delivery.{name}" for name in ("delivery", "placed", "placing")}, "a stream goes from desk to placer, and may come back"),
)
"""Modules that name each other in annotations only, and why. Nothing is imported in a circle when the program runs."""

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = (*PACKAGES, "tests", "benchmarks", "examples")
BUILT = ROOT / "benchmarks" / "build"
"""What `make bench` leaves: a Python environment with everybody's packages."""
SOURCES = sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py") if BUILT not in path.parents)
DOCUMENTS = sorted(path for tree in ("docs", "deploy", "certs") for path in (ROOT / tree).rglob("*") if path.is_file())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_when_run(node: ast.AST) -> Iterator[str]:
    """What is imported below this node when the program runs, inside functions too: not what only annotations need."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (str(child.module), *(f"{child.module}.{alias.name}" for alias in child.names))
        yield from imports_when_run(child)


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(imported: Mapping[str, Set[str]]) -> list[set[str]]:
    """The groups of modules each of which leads to all others of its group."""
    reached = {name: set(names) for name, names in imported.items()}
    for middle in reached:
        for names in reached.values():
            if middle in names:
                names |= reached[middle]
    groups = {frozenset(other for other in names if name in reached[other]) for name, names in reached.items() if name in names}
    return [set(group) for group in groups]


def names_only_the_type(path: Path) -> bool:
    """Whether `random` is there for `rng: random.Random` alone: the generator is still the caller's."""
    tree = parsed(path)
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "random"]
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return all(node.attr == "Random" and id(node) not in called for node in used)


def docstring(path: Path) -> str:
    return ast.get_docstring(parsed(path)) or ""


def is_pure(path: Path) -> bool:
    return name_of(path).startswith(PURE_ROOMS) or docstring(path).startswith("Pure:")


def test_there_is_something_to_check() -> None:
    assert {name_of(path).partition("/")[0] for path in MODULES} == set(PACKAGES)
    assert sum(is_pure(path) for path in MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = name_of(path).partition("/")[0]
    assert not {name.partition(".")[0] for name in imports(path)} & FORBIDDEN[package]


def test_no_module_is_imported_in_a_circle() -> None:
    ours = {module_of(path): path for path in MODULES}
    run = {name: {*imports_when_run(parsed(path))} & ours.keys() - {name} for name, path in ours.items()}
    assert circles(run) == []


def test_circles_of_annotations_are_those_with_a_reason() -> None:
    ours = {module_of(path): path for path in MODULES}
    found = circles({name: {*imports(path)} & ours.keys() - {name} for name, path in ours.items()})
    assert sorted(map(sorted, found)) == sorted(sorted(group) for group, _ in ANNOTATION_CIRCLES)


@pytest.mark.parametrize("path", [path for path in MODULES if is_pure(path)], ids=name_of)
def test_pure_modules_do_nothing_on_their_own(path: Path) -> None:
    impure = {name.partition(".")[0] for name in imports(path)} & IMPURE
    assert not impure - {"random"}
    assert "random" not in impure or names_only_the_type(path)


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).startswith(PURE_ROOMS)], ids=name_of)
def test_pure_rooms_import_only_pure_modules_of_ours(path: Path) -> None:
    for name in imports(path):
        module = ROOT / Path(*name.split(".")).with_suffix(".py")
        if name.partition(".")[0] in PACKAGES and module.is_file():
            assert is_pure(module), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    text = docstring(path)
    assert text
    assert path.name == "__init__.py" or text.startswith(KINDS)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_short_and_has_a_telling_name(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert not {path.stem, path.parent.name} & VAGUE_NAMES


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    found = LATER.search(path.read_text(encoding="utf-8", errors="replace"))
    assert found is None, f"{name_of(path)} says {found[0] if found else ''}"
