"""What came of a fault: figures with the bounds they must keep; tables; and the file in which they are kept."""

import json
import operator
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_BOUNDS = {"=": operator.eq, "≤": operator.le, "≥": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, slots=True)
class Figure:
    """`bound` is a relation and a number ("≤ 5"), or empty for what is only told."""

    what: str
    value: float
    bound: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the value is within its bound."""
        if not self.bound:
            return True
        relation, _, number = self.bound.partition(" ")
        return bool(_BOUNDS[relation](self.value, float(number)))

    def __str__(self) -> str:
        value = f"{self.value:,.2f}".rstrip("0").rstrip(".") if isinstance(self.value, float) else f"{self.value:,}"
        return f"{self.what} {value}" + (f" ({self.bound})" if self.bound else "")


@dataclass
class Outcome:
    """Of one fault."""

    name: str
    expected: str
    figures: list[Figure] = field(default_factory=list)
    error: str = ""
    took_s: float = 0.0
    date: str = ""
    short: bool = False

    def add(self, what: str, value: float, bound: str = "") -> None:
        """One more figure."""
        self.figures.append(Figure(what, round(value, 3) if isinstance(value, float) else value, bound))

    @property
    def is_good(self) -> bool:
        """Whether it ran to its end and every bound was kept."""
        return not self.error and all(figure.is_kept for figure in self.figures)

    @property
    def broken(self) -> list[str]:
        """What is not as it should be."""
        return [*([self.error] if self.error else []), *(str(figure) for figure in self.figures if not figure.is_kept)]


def machine() -> dict[str, Any]:
    """Where figures were taken."""
    return {"kernel": platform.release(), "cores": os.cpu_count(), "python": platform.python_version()}


def keep(outcomes: list[Outcome], path: Path) -> None:
    """Write them into `path` and a table beside it; what other runs have left about other faults stays."""
    kept: dict[str, Any] = {}
    if path.exists():
        kept = {entry["name"]: entry for entry in json.loads(path.read_text())["faults"]}
    for outcome in outcomes:
        kept[outcome.name] = {**asdict(outcome), "good": outcome.is_good}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "faults": list(kept.values())}, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(markdown(list(kept.values())))


def markdown(entries: list[dict[str, Any]]) -> str:
    """The kept outcomes as a table."""
    lines = ["# Faults", "", "`make chaos` writes this file. The bound of a figure stands behind it.", ""]
    lines += ["| fault | expected | figures | kept | s | date |", "|---|---|---|---|---|---|"]
    for entry in entries:
        figures = "; ".join(str(Figure(**figure)) for figure in entry["figures"])
        lines.append(
            f"| {entry['name']} | {entry['expected']} | {figures}{' ' + entry['error'] if entry['error'] else ''} "
            f"| {'yes' if entry['good'] else '**no**'} | {entry['took_s']:.0f} | {entry['date']} |"
        )
    return "\n".join(lines) + "\n"


def today() -> str:
    """For outcomes."""
    return datetime.now(UTC).strftime("%Y-%m-%d")
