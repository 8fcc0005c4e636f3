"""The tables of README and benchmarks/README are what benchmarks/results holds: nobody typed a figure."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.report import Report
from benchmarks.targets import TARGETS, Metric, Target, Verdict


@pytest.mark.parametrize(
    ("page", "written"), [(readme.README, readme.short), (readme.ALL, readme.shown)], ids=["README", "benchmarks/README"]
)
def test_the_pages_show_the_latest_results(page: Path, written: Callable[[Sequence[Report]], str]) -> None:
    text = page.read_text().split(readme.BEGIN)[1].split(readme.END)[0]
    assert text == written(readme.load()), "run: python -m benchmarks.readme"


def test_every_missed_aim_is_in_the_full_tables_and_counted_in_readme() -> None:
    reports = readme.load()
    judged = {}
    for report in reports:
        judged.update(report["medians"])
    missed = [target for target in TARGETS if target.verdict(judged) is Verdict.MISSED]
    full = readme.shown(reports)
    assert full.count(", missed**") == len(missed)
    first = sum(not target.title.startswith(readme.FURTHER) for target in missed)
    assert f"**{first} of " in readme.short(reports)
    assert f" and {len(missed) - first} of " in readme.short(reports)


@pytest.mark.parametrize(
    ("reached", "is_at_least", "text"),
    [
        (0.8043, False, "0.804"),
        (0.7957, False, "0.80"),
        (0.7949, True, "0.79"),
        (0.7957, True, "0.796"),
        (0.8, False, "0.80"),
        (123.4, True, "123"),
    ],
)
def test_a_figure_has_as_many_digits_as_show_on_which_side_of_the_aim_it_is(reached: float, is_at_least: bool, text: str) -> None:
    target = Target("a", Metric("m", "n"), 0.8, "× ssh", at_least=is_at_least)
    assert target.written(reached) == text


def test_a_missed_aim_is_shown_as_missed_and_an_absent_one_as_not_measured() -> None:
    report = readme.load()[0]
    line = next(line for line in readme.STREAMS if line.metric.name == "conn_per_s")
    conn = {"fx": {"conn_per_s": 4000.0}, "nginx": {"conn_per_s": 1000.0}}
    assert line.cells({**report["medians"], "conn": conn}) == [
        "connections/s, 32 at a time",
        "4,000",
        "1,000",
        "–",
        "≥ 3.5 × nginx: 4.00; ≥ 1 × ssh -tt -R: not measured",
        "≥ 5 × nginx: **4.00, missed**",
    ]
