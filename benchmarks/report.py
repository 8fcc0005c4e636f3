"""Pure: the tables of a report, as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from benchmarks.targets import TARGETS, Medians, Verdict

Report = Mapping[str, Any]  # what is in latest.json


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a metric, how it is printed, whether less is better, and what the plot makes of it."""

    measure: str
    metric: str
    title: str
    digits: int
    less_is_better: bool = True
    plotted: bool = True
    compared: bool = True


ROWS: Final = (
    Row("bulk", "down_cpu_s_per_gib", "1 stream down, CPU s/GiB", 2),
    Row("bulk", "up_cpu_s_per_gib", "1 stream up, CPU s/GiB", 2),
    Row("bulk", "down_mb_per_s", "1 stream down, MB/s", 0, False),
    Row("bulk", "up_mb_per_s", "1 stream up, MB/s", 0, False),
    Row("bulk16", "cpu_s_per_gib", "16 streams, CPU s/GiB", 2),
    Row("bulk16", "mb_per_s", "16 streams, MB/s", 0, False, plotted=False),
    Row("conn", "conn_per_s", "connections/s, 32 at a time", 0, False),
    Row("conn", "cpu_ms_per_conn", "CPU ms per connection", 3),
    Row("conn", "kernel_ms_per_conn", "of which in the kernel, ms", 3, plotted=False),
    Row("echo", "idle_p50_us", "64-byte echo p50, µs", 0),
    Row("echo", "idle_p99_us", "64-byte echo p99, µs", 0, plotted=False),
    Row("echo", "beside_p50_us", "echo p50 beside bulk, µs", 0, plotted=False),
    Row("echo", "beside_p99_us", "echo p99 beside bulk, µs", 0),
    Row("idle", "user_kib_per_client", "idle client, user KiB", 1),
    Row("idle", "p50_ratio", "echo p50 beside idle clients, × without", 2, compared=False),
    Row("crowd", "user_kib_per_client", "one of 10,000 idle clients, user KiB", 2, plotted=False, compared=False),
    Row("stalled", "worst_daemon_mib", "stalled clients, larger daemon MiB", 0),
    Row("stalled", "goodput_ratio", "goodput beside stalled clients, × without", 2, False, compared=False),
    Row("cut", "survived", "streams of 20 that survive 2 cuts", 0, False, compared=False),
    Row("rtt", "line_mb_per_s", "the line alone, 50 ms there and back, MB/s", 1, False, plotted=False, compared=False),
    Row("rtt", "down_mb_per_s", "1 stream down over it, MB/s", 1, False, compared=False),
    Row("rtt", "up_mb_per_s", "1 stream up over it, MB/s", 1, False, plotted=False, compared=False),
    Row("rtt", "down16_mb_per_s", "16 streams down over it, MB/s", 1, False, plotted=False, compared=False),
    Row("rtt", "up16_mb_per_s", "16 streams up over it, MB/s", 1, False, plotted=False, compared=False),
    Row("rtt", "worst_daemon_mib", "the larger daemon meanwhile, MiB", 0, plotted=False, compared=False),
    Row("get", "requests_per_s", "short GETs/s, 16 connections", 0, False),
    Row("get", "varied_per_s", "short GETs/s, no two heads alike", 0, False, plotted=False),
    Row("get", "cpu_us_per_request", "CPU µs per short GET", 0),
    Row("get", "alone_p50_us", "short GET p50, one connection, µs", 0, plotted=False),
    Row("socket", "upgraded_p50_us", "WebSocket echo p50, µs", 0, compared=False),
    Row("socket", "raw_p50_us", "the same echo by a raw stream, µs", 0, plotted=False),
    Row("sni", "sni_cpu_ms", "CPU ms per connection led by SNI", 3, plotted=False),
    Row("sni", "raw_cpu_ms", "the same by a raw door", 3, plotted=False),
    Row("https", "cpu_s_per_gib", "TLS ended at the gateway, CPU s/GiB", 2),
    Row("https", "mb_per_s", "TLS ended at the gateway, MB/s", 0, False, plotted=False),
    Row("slow", "p99_ratio", "p99 beside slow clients, × without", 2, compared=False),
    Row("slow", "worst_daemon_mib", "slow clients, larger daemon MiB", 0),
)


def medians_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The median over all rounds of each number: by measure, peer, metric. Failed samples are left out."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for sample in samples:
        for metric, value in sample.get("numbers", {}).items():
            values.setdefault((sample["measure"], sample["peer"], metric), []).append(value)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (measure, peer, metric), seen in values.items():
        result.setdefault(measure, {}).setdefault(peer, {})[metric] = median(seen)
    return result


def judge(medians: Medians) -> list[dict[str, Any]]:
    """Every target with what was reached."""
    return [{"target": t.title, "wanted": t.wanted(), "reached": t.reached(medians), "verdict": t.verdict(medians).value} for t in TARGETS]


def system(machine: dict[str, Any]) -> str:
    """The kernel, and TCP's congestion control, which older reports do not have."""
    control = machine.get("congestion_control")
    return f"Linux {machine['kernel']}" + (f", TCP {control}" if control else "")


def markdown(report: Report) -> str:
    """The whole report for a README: where and how, numbers by peer, targets, what failed."""
    machine = report["machine"]
    parts = [
        f"{report['date']}, {machine['cpu']} ({machine['cores']} cores), {system(machine)}; "
        f"`{report['command']}`, {report['rounds']} rounds, interleaved, medians.",
        "; ".join(f"{p['label']}: {p['version']}" for p in report["peers"].values() if p["version"]) + ".",
        _numbers(report),
        _targets(report),
    ]
    notes = [f"- {peer}: skipped, {reason}" for peer, reason in report["skipped"].items()]
    if report.get("interrupted"):
        notes.append(f"- interrupted at {report['interrupted']}: that and what would have followed was not measured")
    notes += [f"- {failure}" for failure in failures(report)]
    notes += [f"- {warning}" for warning in ceiling_warnings(report)]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def _numbers(report: Report) -> str:
    peers = {name: peer["label"] for name, peer in report["peers"].items()}
    lines = []
    for row in ROWS:
        by_peer = report["medians"].get(row.measure, {})
        cells = [by_peer.get(peer, {}).get(row.metric) for peer in peers]
        if any(cell is not None for cell in cells):
            lines.append([row.title, *("–" if cell is None else f"{cell:,.{row.digits}f}" for cell in cells)])
    return _table(["measure", *peers.values()], lines)


def _targets(report: Report) -> str:
    marks = {Verdict.MET.value: "met", Verdict.MISSED.value: "**missed**", Verdict.UNKNOWN.value: "not measured"}
    known = {(target.title, target.wanted()): target for target in TARGETS}

    def written(target: Mapping[str, Any]) -> str:
        if target["reached"] is None:
            return "–"
        same = known.get((target["target"], target["wanted"]))
        return f"{target['reached']:.2f}" if same is None else same.written(target["reached"])

    lines = [[t["target"], t["wanted"], written(t), marks[t["verdict"]]] for t in report["targets"]]
    return _table(["target", "must be", "reached", "verdict"], lines)


def failures(report: Report) -> list[str]:
    """Each failed sample in one line."""
    return [
        f"{s['measure']}, {s['peer']}, round {s['round']}: failed: {s['error'].splitlines()[0]}" for s in report["samples"] if "error" in s
    ]


def ceiling_warnings(report: Report) -> list[str]:
    """Where a peer came so near to the load generator's own rate that the generator may have been the limit."""
    warnings = []
    for row in ROWS:
        if row.less_is_better:
            continue
        by_peer = report["medians"].get(row.measure, {})
        ceiling = by_peer.get("direct", {}).get(row.metric)
        for peer, numbers in by_peer.items():
            value = numbers.get(row.metric)
            if peer != "direct" and ceiling and value and value > 0.7 * ceiling:
                warnings.append(f"{row.title}: {peer} reached {value / ceiling:.0%} of what the load generator can do at all")
    return warnings
