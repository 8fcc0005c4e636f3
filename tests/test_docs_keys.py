"""Keys, defaults and log lines in the documents are those of the code."""

import enum
import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import fxgateway.settings
import fxrelay.settings
from fxrelay.cluster import broker
from fxrelay.cluster.broker import load_broker
from fxrelay.service_settings import ServiceSection
from fxtunnel.errors import ConfigError
from fxtunnel.kit.files import write_secret

ROOT = Path(__file__).parent.parent
METRICS = ("fxgateway/admin/metrics.py", "fxrelay/admin/metrics.py")
"""The modules that name them."""
DOCS = ROOT / "docs"
DAEMONS = {"gateway": fxgateway.settings.GatewaySettings, "relay": fxrelay.settings.RelaySettings}
SIZES = {"KiB": 1 << 10, "MiB": 1 << 20}


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield field.alias or name
        for inner in models_in(field.annotation):
            yield from keys_of(inner)


def written(value: object) -> str:
    """A default as tables show it."""
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return ", ".join(map(written, value)) or "none"
        case None | "":
            return "none"
        case enum.Enum():
            return str(value.value)
        case IPv4Network() | IPv6Network():
            return str(value)
        case _:
            return f"{value:g}" if isinstance(value, int | float) else str(value)


def number(text: str) -> str:
    """A cell without its unit."""
    amount, _, unit = text.partition(" ")
    return f"{float(amount) * SIZES.get(unit, 1):g}" if re.fullmatch(r"[\d.]+", amount) else text


def rows(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")
    ]


@pytest.mark.parametrize(
    "row", [row for row in rows("dos.md") if row[0].startswith(("limits.", "resume.", "liveness."))], ids=lambda r: r[0]
)
def test_a_limit_has_the_default_that_the_table_shows(row: list[str]) -> None:
    (section, key), where, shown = row[0].split("."), row[1], row[2]
    for daemon in DAEMONS if where == "both" else [where]:
        field = DAEMONS[daemon].model_fields[section].annotation.model_fields[key]
        assert number(shown) == written(field.default), daemon
    other = {"gateway": "relay", "relay": "gateway"}.get(where)
    if other is not None:
        assert key not in DAEMONS[other].model_fields[section].annotation.model_fields, f"{row[0]} is a key of both"


def test_the_keys_of_an_http_service_are_as_the_table_shows() -> None:
    table = (DOCS / "WEB.md").read_text().partition("## Keys of a service")[2].partition("\n## ")[0]
    for line in re.findall(r"(?m)^\| ([a-z].*)$", table):
        names, shown = (cell.strip() for cell in line.split("|")[:2])
        for name in re.split(r"[,/] ?", names):
            if name.strip() == "key":
                continue
            field = ServiceSection.model_fields[name.strip()]
            if shown not in ("–", "any", "state/cookies.key"):  # what they mean is said in the row
                assert number(shown) == ("none" if field.default is PydanticUndefined else written(field.default)), name


def test_the_broker_file_is_as_the_document_shows(tmp_path: Path) -> None:
    section = (DOCS / "CLUSTER.md").read_text().partition("broker.json\n")[2].partition("\n## ")[0]
    path = tmp_path / "broker.json"
    with pytest.raises(ConfigError, match=r"does not exist; docs/CLUSTER\.md"):
        load_broker(path)
    write_secret(path, section.partition("```json\n")[2].partition("```")[0].encode())
    assert load_broker(path).namespace == "fastx-cluster"
    for field in broker._Content.model_fields.values():
        assert re.search(rf"(?m)^\| .*\b{field.alias}\b.*? \|", section), field.alias


def test_every_key_is_in_a_document() -> None:
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *DOCS.rglob("*.md")])
    missing = {key for model in DAEMONS.values() for key in keys_of(model) if not re.search(rf"\b{key}\b", text)}
    assert not missing


@pytest.mark.parametrize("page", ["operations.md", "WEB.md", "CLUSTER.md", "TICKETS.md", "RESERVATIONS.md", "dos.md"])
def test_dotted_keys_in_documents_exist(page: str) -> None:
    known = {
        f"{name}.{key}"
        for model in DAEMONS.values()
        for name, field in model.model_fields.items()
        for inner in models_in(field.annotation)
        for key in inner.model_fields
    }
    sections = {name.split(".")[0] for name in known} - {"gateway", "gateways", "doors", "services", "routes", "certificates"}
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)`", (DOCS / page).read_text()):
        if section in sections:
            assert f"{section}.{key}" in known, f"{page} names {section}.{key}"


def test_lines_in_the_table_of_troubles_are_what_the_code_says() -> None:
    sources = " ".join(path.read_text() for part in ("fxgateway", "fxrelay", "fxtunnel") for path in sorted((ROOT / part).rglob("*.py")))
    # Placeholders of any kind, joints of literals and line breaks are all the same here.
    flat = re.sub(r"%[a-z.0-9]*[a-z]|\{[^{}]*\}", "…", re.sub(r'"\s*f?"', "", sources))
    table = (DOCS / "operations.md").read_text().partition("## When something is wrong")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(cells) > 10
    for fragment in [piece.strip() for cell in cells for line in re.findall(r"`([^`]+)`", cell) for piece in line.split("…")]:
        if len(fragment) > 2:
            assert fragment in flat, f"nothing says {fragment!r}"


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_files_named_in_documents_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:tests|fxtunnel|fxgateway|fxrelay|deploy|certs|examples|benchmarks|requirements)/[\w./-]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_metric_is_explained_and_none_is_invented() -> None:
    found = {
        name + ("_total" if kind == "Counter" else "")
        for module in METRICS
        for kind, name in re.findall(r'(Counter|Gauge)MetricFamily\(\s*"(\w+)"', (ROOT / module).read_text())
    }
    text = (DOCS / "operations.md").read_text()
    named = set(re.findall(r"\b(?:fxgateway|fxrelay)_[a-z_]+", text))
    assert len(found) > 50
    assert found <= named, found - named
    assert named <= found, named - found
