"""Play faults: `python -m tests.chaos [--only NAMES] [--short] [--minutes M]`."""

import resource
import signal
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.chaos.every import FAULTS
from tests.chaos.figures import RESULTS, Outcome, keep
from tests.chaos.stage import Fault, Scale, Unplayable, play


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # so that everything that was started is stopped


def _chosen(names: str | None) -> list[Fault]:
    known = {fault.name: fault for fault in FAULTS}
    wanted = [name.strip() for name in names.split(",")] if names else list(known)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(known)}", param_hint="--only")
    return [known[name] for name in wanted]


def _table(outcomes: list[Outcome], skipped: dict[str, str]) -> Table:
    table = Table("fault", "expected", "figure", "value", "bound", "s", title="Faults", show_lines=False)
    for outcome in outcomes:
        head = [f"[{'green' if outcome.is_good else 'bold red'}]{outcome.name}[/]", outcome.expected]
        for number, figure in enumerate(outcome.figures):
            value = f"{figure.value:,.2f}" if isinstance(figure.value, float) else f"{figure.value:,}"
            colour = "default" if figure.is_kept else "bold red"
            took = f"{outcome.took_s:.0f}" if not number else ""
            table.add_row(*(head if not number else ["", ""]), figure.what, f"[{colour}]{value}[/]", figure.bound, took)
        if outcome.error:
            table.add_row(*(head if not outcome.figures else ["", ""]), f"[bold red]{outcome.error[-400:]}[/]", "", "", "")
        table.add_section()
    for name, reason in skipped.items():
        table.add_row(name, f"not played: {reason}", "", "", "", "")
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="NAMES", help=f"By comma: {', '.join(fault.name for fault in FAULTS)}.")
@click.option(
    "--short", "scale", flag_value=Scale.SHORT, type=Scale, help="As the tests play them, in seconds; results go to chaos-short.json."
)
@click.option("--minutes", default=20.0, show_default=True, help="How long `steady` takes.")
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path, file_okay=False), help="Where figures are kept.")
def main(only: str | None, scale: Scale | None, minutes: float, results: Path) -> None:
    """Hurt running daemons in every way we promise to survive, and print what came of it. Figures go to chaos.json and chaos.md."""
    signal.signal(signal.SIGTERM, _end)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    scale = scale or Scale.FULL
    console = Console()
    outcomes: list[Outcome] = []
    skipped: dict[str, str] = {}
    path = results / ("chaos.json" if scale is Scale.FULL else "chaos-short.json")
    columns = TextColumn("{task.description:<52}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        for fault in _chosen(only):
            task = progress.add_task(fault.name, total=1.0)

            def show(text: str, done: float, task=task, name=fault.name) -> None:
                progress.update(task, description=f"{name}: {text}"[:52], completed=done)

            try:
                outcome = play(fault, scale, show, minutes)
            except Unplayable as exc:
                skipped[fault.name] = str(exc)
                progress.update(task, description=f"{fault.name}: not played", completed=1.0)
                continue
            outcomes.append(outcome)
            keep([outcome], path)
            progress.update(task, description=f"{fault.name}: {'as expected' if outcome.is_good else 'NOT as expected'}", completed=1.0)
    console.print(_table(outcomes, skipped))
    console.print(f"kept in {path} and .md", highlight=False, soft_wrap=True)
    sys.exit(any(not outcome.is_good for outcome in outcomes))


if __name__ == "__main__":
    main()
