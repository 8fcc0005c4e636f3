"""Task: the command: which measures on which peers, in which order, and where the results go."""

import json
import os
import platform
import resource
import shlex
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import far, loadgen, measures, own_network, peer_fx, peer_nginx, peer_ssh, plot, report, web, web_peers
from benchmarks.loadgen import LoadGenerator
from benchmarks.measures import FULL, QUICK, Bench, Measure
from benchmarks.peers import Direct, Peer
from benchmarks.processes import BenchmarkError

PEERS: Final[list[Callable[[], Peer]]] = [
    peer_fx.usual,
    peer_nginx.Nginx,
    peer_ssh.with_tty,
    peer_ssh.plain,
    peer_ssh.with_aes128,
    peer_fx.without_resumption,
    peer_fx.with_aes128,
    web_peers.FxWeb,
    web_peers.NginxWeb,
    peer_fx.with_workers,
    peer_fx.with_two_links,
]
MEASURES: Final = (*measures.MEASURES, *far.MEASURES, *web.MEASURES)
RESULTS: Final = Path(__file__).resolve().parent / "results"
CLIENT_LIMIT_S: Final = 90
FILES_WANTED: Final = 16_000

Sample = dict[str, Any]


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "congestion_control": own_network.congestion_control(),
        "load_before": os.getloadavg()[0],
    }


def _raise_file_limit() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _one(bench: Bench, measure: Measure, peer: Peer, round_: int) -> Sample:
    """One measure of one peer; a failure is a result, too. The peer is stopped in any case."""
    sample: Sample = {"measure": measure.name, "peer": peer.name, "round": round_}
    try:
        sample["numbers"] = measure.run(bench, peer)
    except (BenchmarkError, OSError) as exc:
        sample["error"] = str(exc) or type(exc).__name__
    finally:
        peer.stop()
    return sample


def _interleaved(bench: Bench, chosen: Sequence[Measure], peers: Sequence[Peer], rounds: int, console: Console) -> tuple[list[Sample], str]:
    """Each measure on the load generator alone, then A B C A B C … so that a machine that drifts drifts for all.

    Returns the samples, and where Ctrl-C ended the run; empty if it came to its end.
    """
    direct = Direct()
    cells = []
    for measure in chosen:
        cells += [(measure, peer, 0) for peer in measure.peers([direct])]
        cells += [(measure, peer, number) for number in range(1, rounds + 1) for peer in measure.peers(peers)]
    samples: list[Sample] = []
    columns = TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(cells))
        for measure, peer, number in cells:
            turn = f"{measure.name}: {peer.label}, round {number}"
            progress.update(task, description=turn)
            try:
                sample = _one(bench, measure, peer, number)
            except KeyboardInterrupt:
                return samples, turn
            samples.append(sample)
            if "error" in sample:
                progress.console.print(f"{measure.name}, {peer.label}: {sample['error']}", style="red", markup=False)
            progress.advance(task)
    return samples, ""


def _chosen(text: str | None, names: Sequence[str], option: str) -> list[str]:
    chosen = [word.strip() for word in text.split(",")] if text else list(names)
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(names)}", param_hint=option)
    return chosen


def _write(results: Path, name: str, full: report.Report) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n")
    (results / f"{name}.md").write_text(report.markdown(full))
    (results / f"{name}.svg").write_text(plot.svg(full))


def _end(signal_number: int, _frame: object) -> None:
    raise SystemExit(128 + signal_number)  # so that every `finally` stops what it started


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 99), help="How often each peer gets its turn.")
@click.option("--only", metavar="NAMES", help=f"Measures, by comma: {', '.join(measure.name for measure in MEASURES)}.")
@click.option("--peer", metavar="NAMES", help=f"Peers, by comma: {', '.join(make().name for make in PEERS)}.")
@click.option("--quick", is_flag=True, help="Small sizes and one round: to see that it works, not to quote.")
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path, file_okay=False), help="Where results go.")
def main(rounds: int, only: str | None, peer: str | None, quick: bool, results: Path) -> None:
    """Measure FX Gateway side by side with nginx and OpenSSH on this machine.

    Writes latest.json, latest.md and latest.svg; quick.* or partial.* when not everything was measured. Ctrl-C ends the run and
    writes what was measured so far.
    """
    signal.signal(signal.SIGTERM, _end)
    own_network.leave_pacing_behind()
    console = Console()
    everyone = [make() for make in PEERS]
    names = _chosen(only, [measure.name for measure in MEASURES], "--only")
    wanted = _chosen(peer, [one.name for one in everyone], "--peer")
    if reason := loadgen.why_not():
        console.print(f"skipped: {reason}", markup=False)
        return
    skipped = {one.name: reason for one in everyone if one.name in wanted and (reason := one.why_not())}
    for name, reason in skipped.items():
        console.print(f"{name} skipped: {reason}", markup=False)
    peers = [one for one in everyone if one.name in wanted and one.name not in skipped]
    if (files := _raise_file_limit()) < FILES_WANTED:
        console.print(f"only {files} open files are allowed (ulimit -Hn): crowds of clients may fail; {FILES_WANTED} are needed")
    sizes, rounds = (QUICK, 1) if quick else (FULL, rounds)
    chosen = [measure for measure in MEASURES if measure.name in names]
    date, machine = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), _machine()
    load, requests = LoadGenerator.build(CLIENT_LIMIT_S), LoadGenerator.build(CLIENT_LIMIT_S, "webgen")
    with load.service() as service_port, requests.service() as web_port:
        samples, interrupted = _interleaved(Bench(load, service_port, sizes, requests, web_port), chosen, peers, rounds, console)
    medians = report.medians_of(samples)
    shown = [Direct(), *peers] if any("direct" in by_peer for by_peer in medians.values()) else peers
    full: dict[str, Any] = {
        "date": date,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "rounds": rounds,
        "machine": machine,
        "sizes": asdict(sizes),
        "peers": {one.name: {"label": one.label, "version": one.version()} for one in shown},
        "skipped": skipped,
        "interrupted": interrupted,
        "medians": medians,
        "targets": report.judge(medians),
        "samples": samples,
    }
    is_whole = len(chosen) == len(MEASURES) and len(wanted) == len(everyone) and not interrupted
    name = "quick" if quick else "latest" if is_whole else "partial"
    _write(results, name, full)
    console.print(report.markdown(full), markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {results / name}.json, .md, .svg", markup=False)
