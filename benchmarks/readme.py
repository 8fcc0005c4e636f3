"""Task: the tables of README.md and benchmarks/README.md, written from benchmarks/results: what they say is what was measured last.

`python -m benchmarks.readme`, when one of REPORTS is new.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.report import Report, system
from benchmarks.targets import TARGETS, Medians, Metric, Target, Verdict

ROOT: Final = Path(__file__).resolve().parent.parent
REPORTS: Final = ("latest",)
"""Later ones count for the measures that both have."""
README: Final = ROOT / "README.md"
"""Some figures, and how many aims were missed."""
ALL: Final = ROOT / "benchmarks" / "README.md"
"""Every figure with its aims, and where and when it was measured."""
BEGIN: Final = "<!-- bench:begin -->\n"
END: Final = "<!-- bench:end -->"
FURTHER: Final = "further: "
"""Titles of targets that go beyond the first ones begin with it."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table: a metric of ours, its title, and how many digits it is printed with."""

    title: str
    metric: Metric
    digits: int = 0

    def cells(self, medians: Medians) -> list[str]:
        """Title, our value, nginx's, ssh's, the first aims and the further ones."""
        mine = [target for target in TARGETS if target.value == self.metric]
        first = [target for target in mine if not target.title.startswith(FURTHER)]
        further = [target for target in mine if target.title.startswith(FURTHER)]
        return [*self.values(medians), _aims(first, medians), _aims(further, medians)]

    def values(self, medians: Medians) -> list[str]:
        """Title, our value, nginx's and ssh's."""
        measure, name = self.metric.measure, self.metric.name
        nginx = "nginx-web" if self.metric.peer == "fx-web" else "nginx"
        others = [Metric(measure, name, peer).of(medians) if self.metric.peer != "workers" else None for peer in (nginx, "ssh-tty")]
        values = [self.metric.of(medians), *others]
        return [self.title, *("–" if value is None else f"{value:,.{self.digits}f}" for value in values)]


def _aims(targets: list[Target], medians: Medians) -> str:
    return "; ".join(_aim(target, medians) for target in targets)


def _aim(target: Target, medians: Medians) -> str:
    reached = target.reached(medians)
    if reached is None:
        return f"{target.wanted()}: not measured"
    text = target.written(reached)
    return f"{target.wanted()}: " + (text if target.verdict(medians) is Verdict.MET else f"**{text}, missed**")


STREAMS: Final = (
    Line("1 stream down, CPU s/GiB", Metric("bulk", "down_cpu_s_per_gib"), 2),
    Line("1 stream up, CPU s/GiB", Metric("bulk", "up_cpu_s_per_gib"), 2),
    Line("1 stream down, MB/s", Metric("bulk", "down_mb_per_s")),
    Line("1 stream up, MB/s", Metric("bulk", "up_mb_per_s")),
    Line("16 streams, CPU s/GiB", Metric("bulk16", "cpu_s_per_gib"), 2),
    Line("16 streams, MB/s", Metric("bulk16", "mb_per_s")),
    Line("1 stream down, 2 workers, CPU s/GiB", Metric("bulk", "down_cpu_s_per_gib", "workers"), 2),
    Line("16 streams, 2 workers, CPU s/GiB", Metric("bulk16", "cpu_s_per_gib", "workers"), 2),
    Line("connections/s, 32 at a time", Metric("conn", "conn_per_s")),
    Line("CPU ms per connection", Metric("conn", "cpu_ms_per_conn"), 3),
    Line("64-byte echo p50, idle, µs", Metric("echo", "idle_p50_us")),
    Line("echo p50 beside a bulk stream, µs", Metric("echo", "beside_p50_us")),
    Line("echo p99 beside a bulk stream, µs", Metric("echo", "beside_p99_us")),
    Line("memory per idle client of 5,000, KiB", Metric("idle", "user_kib_per_client"), 1),
    Line("echo p50 beside them, × without", Metric("idle", "p50_ratio"), 2),
    Line("memory per idle client of 10,000, KiB", Metric("crowd", "user_kib_per_client"), 2),
    Line("1,000 clients that never read, larger daemon, MiB", Metric("stalled", "worst_daemon_mib")),
    Line("goodput of 99 others beside them, × without", Metric("stalled", "goodput_ratio"), 2),
    Line("streams of 20 that survive two cuts of the tunnel", Metric("cut", "survived")),
    Line("50 ms, 1 Gbit/s: 1 stream down, × the line", Metric("rtt", "down_share"), 2),
    Line("the same up", Metric("rtt", "up_share"), 2),
    Line("16 streams down", Metric("rtt", "down16_share"), 2),
    Line("16 streams up", Metric("rtt", "up16_share"), 2),
    Line("the larger daemon meanwhile, MiB", Metric("rtt", "worst_daemon_mib")),
)
WEB: Final = (
    Line("short GETs/s, 16 kept connections", Metric("get", "requests_per_s", "fx-web")),
    Line("the same, no two heads alike", Metric("get", "varied_per_s", "fx-web")),
    Line("CPU µs per short GET, all daemons", Metric("get", "cpu_us_per_request", "fx-web")),
    Line("WebSocket echo p50, × a raw stream's", Metric("socket", "ratio", "fx-web"), 2),
    Line("connections led by SNI, CPU × a raw door's", Metric("sni", "ratio", "fx-web"), 2),
    Line("TLS ended at the gateway, CPU s/GiB", Metric("https", "cpu_s_per_gib", "fx-web"), 2),
    Line("GET p99 beside 1,000 slow clients, × without", Metric("slow", "p99_ratio", "fx-web"), 2),
    Line("1,000 slow clients, larger daemon, MiB", Metric("slow", "worst_daemon_mib", "fx-web")),
)


SHORT: Final = (
    Line("1 stream down, CPU s/GiB", Metric("bulk", "down_cpu_s_per_gib"), 2),
    Line("1 stream down, MB/s", Metric("bulk", "down_mb_per_s")),
    Line("16 streams, CPU s/GiB", Metric("bulk16", "cpu_s_per_gib"), 2),
    Line("connections/s, 32 at a time", Metric("conn", "conn_per_s")),
    Line("64-byte echo p50, idle, µs", Metric("echo", "idle_p50_us")),
    Line("echo p99 beside a bulk stream, µs", Metric("echo", "beside_p99_us")),
    Line("memory per idle client of 5,000, KiB", Metric("idle", "user_kib_per_client"), 1),
    Line("streams of 20 that survive two cuts of the tunnel", Metric("cut", "survived")),
    Line("50 ms, 1 Gbit/s: 1 stream down, × the line", Metric("rtt", "down_share"), 2),
    Line("short GETs/s, 16 kept connections", Metric("get", "requests_per_s", "fx-web")),
    Line("TLS ended at the gateway, CPU s/GiB", Metric("https", "cpu_s_per_gib", "fx-web"), 2),
)
"""What README shows."""


def load() -> list[Report]:
    """The reports that are shown."""
    return [json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in REPORTS]


def _table(lines: tuple[Line, ...], medians: Medians, heads: list[str]) -> str:
    """Lines and columns that have nothing are left out."""
    rows = [line.cells(medians) for line in lines if line.metric.of(medians) is not None]
    kept = [column for column in range(len(heads)) if column == 0 or any(row[column] not in ("", "–") for row in rows)]
    marks = ["---" if column in (0, 4, 5) else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(row[column] for column in kept) + " |" for row in (heads, marks, *rows))


def _where(report: Report) -> str:
    machine = report["machine"]
    versions = ", ".join(dict.fromkeys(peer["version"] for peer in report["peers"].values() if peer["version"]))
    return (
        f"- {report['date']}, `{report['command']}`, {report['rounds']} rounds, all in turn, medians; {machine['cores']} cores of\n"
        f"  {machine['cpu']}, {system(machine)}; {versions}"
    )


def _medians(reports: Sequence[Report]) -> Medians:
    medians: dict[str, Mapping[str, Mapping[str, float]]] = {}
    for report in reports:
        medians.update(report["medians"])
    return medians


def short(reports: Sequence[Report]) -> str:
    """What stands between README's marks."""
    medians = _medians(reports)
    heads = ["measure", "FX Gateway", "nginx", "ssh -tt -R", "`python -m benchmarks …`"]
    rows = [[*line.values(medians), f"`--only {line.metric.measure}`"] for line in SHORT]
    marks = ["---", "---:", "---:", "---:", "---"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (heads, marks, *rows))
    return f"{table}\n\n{_count(medians)}\n"


def _count(medians: Medians) -> str:
    verdicts = [(target.title.startswith(FURTHER), target.verdict(medians)) for target in TARGETS]
    first, further = (
        (sum(one is Verdict.MISSED for kind, one in verdicts if kind is which), sum(kind is which for kind, _ in verdicts))
        for which in (False, True)
    )
    return (
        f"**{first[0]} of {first[1]} aims are missed**, and {further[0]} of {further[1]} further ones, which are to be about as fast as "
        "what is written in C:\n[every aim, what was reached, and why](benchmarks/README.md#every-aim)."
    )


def shown(reports: Sequence[Report]) -> str:
    """What stands between the marks of benchmarks/README.md."""
    medians = _medians(reports)
    heads = ["measure", "FX Gateway", "nginx", "ssh -tt -R", "aim: reached", "further aim: reached"]
    tables = [_table(lines, medians, heads) for lines in (STREAMS, WEB)]
    return "\n\n".join(["\n".join(map(_where, reports)), tables[0], "The web:", tables[1]]) + "\n"


def main() -> None:
    """Write both anew."""
    reports = load()
    for page, text in ((README, short(reports)), (ALL, shown(reports))):
        before, rest = page.read_text().split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(before + BEGIN + text + END + after)


if __name__ == "__main__":
    main()
