"""Fuzz the protocol: `python -m tests.fuzz --frames 1000000 --seed 7` offline, `--live 100000` on running daemons."""

import time

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz.cases import Tally, run_case
from tests.fuzz.live import MAX_GROWTH_BYTES as MAX_LIVE_GROWTH_BYTES
from tests.fuzz.live import attack

MAX_GROWTH_BYTES = 64 * 1_048_576
WARM_UP_FRAMES = 20_000
CHECK_EVERY_CASES = 500


@click.command()
@click.option("--frames", default=1_000_000, show_default=True, help="How many frames to send.")
@click.option("--seed", default=0, show_default=True, help="Another seed sends other frames.")
@click.option("--only", type=int, help="Repeat a single case.")
@click.option("--live", type=int, help="Send so many frames to running daemons instead.")
def main(frames: int, seed: int, only: int | None, live: int | None) -> None:
    """Send malformed, mutated and random frames to both ends of a session."""
    console = Console()
    if live is not None:
        _live(live, seed, console)
        return
    tally = Tally()
    if only is not None:
        run_case(seed, only, tally)
        console.print(f"case {only}: {tally.frames} frames, {dict(tally.ends)}")
        return
    started_s = time.monotonic()
    growth_bytes = _run(frames, seed, tally, console)
    table = Table("how it ended", "cases", title=f"{tally.frames:,} frames in {time.monotonic() - started_s:.0f} s, seed {seed}")
    for name, count in tally.ends.most_common():
        table.add_row(name, f"{count:,}")
    console.print(table)
    console.print(f"memory grew by {growth_bytes / 1_048_576:.1f} MiB (at most {MAX_GROWTH_BYTES // 1_048_576})")
    if growth_bytes > MAX_GROWTH_BYTES:
        raise click.ClickException("memory is not bounded")


def _live(total: int, seed: int, console: Console) -> None:
    columns = (TextColumn("attacking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        findings = attack(total, seed, lambda frames: progress.update(task, completed=frames))
    table = Table("link: how it ended", "links", title=f"{findings.frames:,} frames in {findings.took_s:.0f} s, seed {seed}")
    for name, count in findings.ends.most_common():
        table.add_row(name, f"{count:,}")
    console.print(table)
    growth = ", ".join(f"{name} {grown / 1_048_576:.1f} MiB" for name, grown in findings.growth_bytes.items())
    console.print(f"memory grew: {growth} (at most {MAX_LIVE_GROWTH_BYTES // 1_048_576}); {findings.log_lines} lines of log")
    console.print(f"the honest stream carried {findings.echoes} echoes meanwhile")


def _run(frames: int, seed: int, tally: Tally, console: Console) -> int:
    """Cases until enough frames were sent; returns by how much memory grew after a warm-up."""
    process = psutil.Process()
    base = highest = 0
    columns = (TextColumn("fuzzing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=frames)
        number = 0
        while tally.frames < frames:
            try:
                run_case(seed, number, tally)
            except Exception:
                progress.stop()
                console.print(f"[bold red]failed[/]; repeat with: python -m tests.fuzz --seed {seed} --only {number}")
                raise
            number += 1
            if number % CHECK_EVERY_CASES == 0:
                progress.update(task, completed=tally.frames)
                used = process.memory_info().rss
                if not base and tally.frames >= min(WARM_UP_FRAMES, frames // 4):
                    base = used
                highest = max(highest, used)
        progress.update(task, completed=frames)
    return highest - base if base else 0


if __name__ == "__main__":
    main()
