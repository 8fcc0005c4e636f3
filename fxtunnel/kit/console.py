"""Task: what the commands of both daemons share: errors as lines and exit codes, the --config option, tables.

Imports nothing heavy: it is loaded for `--version` and for completion as well.
"""

import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from fxtunnel.errors import ConfigError, ConfigProblem, FxError, leaves

ASK_TIMEOUT_S: Final = 2.0
"""How long a command waits for the running daemon's answer."""
DRAIN_POLL_S: Final = 0.5
DRAIN_PATIENCE_S: Final = 10.0
"""How long watching a drain goes on without an answer: one of several processes may have died, and is started anew."""
CONTEXT: Final = {"help_option_names": ["-h", "--help"]}
LINK_COLUMNS: Final = ("up", "cuts", "rtt", "streams")
"""The headings of `link_cells`."""
_FAILED: Final = 1
_MISUSED: Final = 2

_CALLED_HERE: Final = {"status": "relays", "relays": "status", "start": "run", "serve": "run"}
"""What administrators of other daemons, or of the other one of ours, try first."""

_Json = dict[str, Any]
_Function = TypeVar("_Function", bound=Callable[..., object])


class Program(click.Group):
    """A command with the program's name. Errors that are meant for people become one line each, and the exit code.

    They arrive alone, or in groups out of a daemon's nurseries.
    """

    def invoke(self, ctx: click.Context) -> object:
        """See `click.Group`. Exits with 2 after a ConfigError, with 1 after another FxError or an OSError of the command's own."""
        code, result = 0, None
        try:
            result = self._invoke(ctx)
        except* ConfigError as group:
            for exc in leaves(group):
                self._say(*exc.problems)
            code = _MISUSED
        except* FxError as group:
            self._say(*leaves(group))
            code = code or _FAILED
        if code:
            ctx.exit(code)
        return result

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """See `click.Group`. Adds what the command for the same purpose is called here."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            named = _CALLED_HERE.get(args[0] if args else "")
            if named not in self.commands:
                raise
            raise click.UsageError(f"{exc.message.rstrip('.')}: it is called '{named}' here.", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Group`, which cuts what does not fit into a line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in self.list_commands(ctx)])

    def _invoke(self, ctx: click.Context) -> object:
        # Not one inside a group: what a daemon's task did not expect is a bug of ours, and keeps its traceback.
        try:
            return super().invoke(ctx)
        except OSError as exc:
            if isinstance(exc, BrokenPipeError) and not _has_reader():
                raise  # click ends quietly, with 1: whoever reads what we print has had enough of it, as `head` has
            raise FxError(str(exc)) from exc

    def _say(self, *lines: object) -> None:
        for line in lines:
            click.echo(f"{self.name}: {line}", err=True)


def _has_reader() -> bool:
    """Whether somebody reads our standard output, if it is a pipe."""
    poller = select.poll()
    try:
        poller.register(sys.stdout.fileno(), 0)  # an error is told without being asked for
    except OSError:
        return True
    return not poller.poll(0)


def config_option(file: str, variable: str, help_text: str) -> Callable[[_Function], _Function]:
    """The decorator that gives a command --config, as `config_path`; `variable` of the environment goes before the default `file`."""
    return click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        default=Path(file),
        show_default=True,
        envvar=variable,
        show_envvar=True,
        help=help_text,
    )


timeout_option = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop watching after so long, with exit code 1."
)
"""The decorator that gives a command --timeout, as `timeout_s`."""


@contextmanager
def reload_held() -> Iterator[None]:
    """For daemons, around everything: a SIGHUP that comes before one is ready waits for `watch_signals`; it would end the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def refuse(problems: Sequence[ConfigProblem]) -> None:
    """Nothing if there are none.

    Raises:
        ConfigError: with all of them.
    """
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class DrainAnswer:
    """What a daemon's /drain page tells: how many are left, below 0 for a relay that is not there, and which process says so."""

    left: int
    process: str

    @classmethod
    def of(cls, page: _Json) -> "DrainAnswer":
        """From the page's JSON object.

        Raises:
            FxError: it is something else's.
        """
        left, process = page.get("left"), page.get("process")
        if not (isinstance(left, int) and isinstance(process, str)):
            raise FxError("what answers is not a daemon of this version")
        return cls(left, process)


def watch_drain(began_by: str, look: Callable[[], DrainAnswer], what: str, timeout_s: float | None) -> None:
    """Show how many are left until none is: a line that renews itself on a terminal, else a line for each change.

    Raises:
        FxError: some are left after `timeout_s`, or when who watches has pressed Ctrl-C; another process than `began_by` answers, which
            does not drain; or what `look` raised, if it has not told anything for DRAIN_PATIENCE_S.
    """
    try:
        _watch_drain(began_by, look, what, timeout_s)
    except KeyboardInterrupt:
        click.echo()  # the terminal has written ^C into the line
        raise FxError("no longer watched; the drain goes on, and a restart ends it") from None


def _watch_drain(began_by: str, look: Callable[[], DrainAnswer], what: str, timeout_s: float | None) -> None:
    began = answered_at = time.monotonic()
    shown = -1
    is_terminal = sys.stdout.isatty()
    while True:
        try:
            answer = look()
        except FxError:
            now = time.monotonic()
            if now - answered_at >= DRAIN_PATIENCE_S or (timeout_s is not None and now - began >= timeout_s):
                raise
            time.sleep(DRAIN_POLL_S)
            continue
        if answer.process != began_by:
            raise FxError("restarted meanwhile, which has ended the drain: new ones are taken again")
        answered_at = time.monotonic()
        left = max(0, answer.left)
        if left != shown or is_terminal:
            text = f"{what} left: {left}, {duration(time.monotonic() - began)}"
            click.echo(f"\r{text:<60}" if is_terminal else text, nl=not is_terminal)
            sys.stdout.flush()
            shown = left
        if not left or (timeout_s is not None and time.monotonic() - began >= timeout_s):
            break
        time.sleep(DRAIN_POLL_S)
    if is_terminal:
        click.echo()
    if left:
        raise FxError(f"{what} left after {timeout_s:g} s: {left}; they go on, and nothing new comes")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings. On a terminal long cells are folded; in a pipe a row is a line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width: one line a row then, for grep.
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        # Text, not str: no markup. Peers chose some of these words, so nothing that a terminal would obey goes out.
        table.add_row(*(Text("".join(c if c.isprintable() else "?" for c in cell)) for cell in row))
    console.print(table)


def link_cells(links: list[_Json]) -> tuple[str, str, str, str]:
    """A row's cells about its data links (`LinkStatus` as JSON): how many work of how many, resumptions, shortest round trip, streams."""
    measured = [link["rtt_ms"] for link in links if link["rtt_ms"] is not None]
    return (
        f"{sum(link['up'] for link in links)}/{len(links)}",
        str(sum(link["resumed"] for link in links)),
        f"{min(measured):.1f} ms" if measured else "-",
        str(sum(link["streams"] for link in links)),
    )


def reasons(refused: dict[str, int]) -> str:
    """How often what was refused, for a cell."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items())) or "0"


def duration(seconds: float) -> str:
    """A span of time in the two units that matter."""
    whole = int(seconds)
    days, hours, minutes = whole // 86_400, whole // 3_600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
