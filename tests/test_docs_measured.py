"""README's tables are what benchmarks/results holds: nobody typed a figure."""

from benchmarks import readme


def test_readme_shows_the_latest_results() -> None:
    expected = readme.shown(readme.load())
    text = readme.README.read_text()
    assert text.split(readme.BEGIN)[1].split(readme.END)[0] == expected, "run: python -m benchmarks.readme"


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
