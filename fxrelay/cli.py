"""Task: the `fxrelay` command. Heavy modules are imported by the command that needs them, so that help and completion are quick."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fxtunnel import __version__
from fxtunnel.errors import ConfigError, FxError

if TYPE_CHECKING:
    from fxrelay.settings import RelaySettings

ASK_TIMEOUT_S: Final = 2.0
_FAILED: Final = 1
_MISUSED: Final = 2

_EPILOG: Final = """\b
Examples:
  fxrelay check --config /etc/fxrelay/relay.toml
  fxrelay run --config /etc/fxrelay/relay.toml
  fxrelay status --config /etc/fxrelay/relay.toml

\b
A small relay.toml, beside the gateway.json that `fxgateway init` made:
  [relay]
  id = "node-a"
  [[gateway]]
  file = "gateway.json"
  [[service]]
  name = "ssh"
  target = "127.0.0.1:22"

\b
Exit codes: 0 done, 1 failure at run time, 2 wrong usage or configuration.
Any key of relay.toml can be set in the environment: FXRELAY__RELAY__ID=...
Shell completion: eval "$(_FXRELAY_COMPLETE=bash_source fxrelay)"   (or zsh_source, fish_source)
"""


class _Command(click.Group):
    """Turns the errors that are meant for people into one line each, and into exit codes."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ConfigError as exc:
            for problem in exc.problems:
                click.echo(f"fxrelay: {problem}", err=True)
            ctx.exit(_MISUSED)
        except (FxError, OSError) as exc:
            click.echo(f"fxrelay: {exc}", err=True)
            ctx.exit(_FAILED)


_config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("relay.toml"),
    show_default=True,
    envvar="FXRELAY_CONFIG",
    show_envvar=True,
    help="The relay's configuration.",
)


@click.group(cls=_Command, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fxrelay")
def main() -> None:
    """The relay behind the firewall.

    It dials out to gateways and carries their clients to the services that its own configuration names, and nowhere else.
    """


@main.command()
@_config_option
def run(config_path: Path) -> None:
    """Run the relay in the foreground.

    Prints one line when it is ready. It dials again whenever a tunnel is lost, and stops by itself only where trying again is pointless.
    SIGTERM drains and stops, SIGHUP reads the configuration again.
    """
    settings = _load(config_path)
    _refuse_bad_files(settings, config_path)
    from fxrelay import app

    sys.exit(app.run(settings, config_path))


@main.command()
@_config_option
def check(config_path: Path) -> None:
    """Check configuration, enrolment files and keys.

    Every problem is printed, one a line. No gateway and no service is connected to.
    """
    settings = _load(config_path)
    _refuse_bad_files(settings, config_path)
    from fxrelay.check import warnings

    for warning in warnings(settings, time.time()):
        click.echo(f"warning: {warning}", err=True)
    services = ", ".join(f"{service.name} -> {service.target}" for service in settings.services)
    click.echo(f"ok: {config_path}: relay {settings.relay.id}, {len(settings.gateways)} gateway(s), services {services or 'none'}")


@main.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: relay, uplinks, services.")
def status(config_path: Path, as_json: bool) -> None:
    """Show the running relay: its gateways, its tunnels, its services."""
    from fxtunnel.kit.pages import fetch_json

    settings = _load(config_path)
    try:
        found = fetch_json(settings.relay.status_address, "/status", ASK_TIMEOUT_S)
    except FxError as exc:
        raise FxError(f"the relay does not answer; is it running? {exc}") from exc
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_status(found)


def _load(config_path: Path) -> "RelaySettings":
    from fxrelay.settings import load

    return load(config_path, os.environ)


def _refuse_bad_files(settings: "RelaySettings", config_path: Path) -> None:
    from fxrelay.check import verify_files

    problems = verify_files(settings, config_path)
    if problems:
        raise ConfigError(problems)


def _print_status(found: "dict[str, Any]") -> None:
    click.echo(f"relay {found['relay']['relay_id']}, up for {_duration(found['relay']['uptime_s'])}")
    uplinks = [
        (
            uplink["gateway_id"],
            uplink["url"],
            uplink["state"],
            _duration(uplink["connected_s"]) if uplink["state"] == "up" else _next_try(uplink["next_try_s"]),
            f"{sum(link['up'] for link in uplink['links'])}/{len(uplink['links'])}",
            str(sum(link["resumed"] for link in uplink["links"])),
            _round_trip(uplink["links"]),
            str(sum(link["streams"] for link in uplink["links"])),
        )
        for uplink in found["uplinks"]
    ]
    _print_table(("gateway", "url", "state", "since", "up", "cuts", "rtt", "streams"), uplinks)
    errors = [
        (uplink["gateway_id"], uplink["last_error"]) for uplink in found["uplinks"] if uplink["last_error"] and uplink["state"] != "up"
    ]
    if errors:
        _print_table(("gateway", "last error"), errors)
    services = [
        (service["name"], service["target"], str(service["streams"]), str(service["opened"]), _reasons(service["refused"]))
        for service in found["services"]
    ]
    _print_table(("service", "target", "streams", "opened", "refused"), services)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width: one line a row then, for grep.
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, not str: no markup. Gateways chose some of these words, so nothing that a terminal would obey goes out.
        table.add_row(*(Text("".join(c if c.isprintable() else "?" for c in cell)) for cell in row))
    console.print(table)


def _round_trip(links: "list[dict[str, Any]]") -> str:
    measured = [link["rtt_ms"] for link in links if link["rtt_ms"] is not None]
    return f"{min(measured):.1f} ms" if measured else "-"


def _next_try(seconds: float | None) -> str:
    return "-" if seconds is None else f"next in {seconds:.0f} s"


def _reasons(refused: "dict[str, int]") -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items())) or "0"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86_400, whole // 3_600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


if __name__ == "__main__":
    main()
