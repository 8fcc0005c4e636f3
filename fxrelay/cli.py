"""Task: the `fxrelay` command. Heavy modules are imported by the command that needs them, so that help and completion are quick."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fxrelay.cluster_cli import COMMANDS
from fxrelay.ticket_cli import ticket
from fxtunnel import __version__
from fxtunnel.errors import FxError
from fxtunnel.kit.console import (
    ASK_TIMEOUT_S,
    CONTEXT,
    LINK_COLUMNS,
    Program,
    config_option,
    duration,
    link_cells,
    print_table,
    reasons,
    refuse,
    reload_held,
)

if TYPE_CHECKING:
    from fxrelay.settings import RelaySettings

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


_config_option = config_option("relay.toml", "FXRELAY_CONFIG", "The relay's configuration.")


@click.group("fxrelay", cls=Program, epilog=_EPILOG, context_settings=CONTEXT)
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
    with reload_held():
        settings = _load(config_path)
        _refuse_bad_files(settings, config_path)
        from fxrelay import app

        sys.exit(app.run(settings, config_path))


@main.command()
@_config_option
def launch(config_path: Path) -> None:
    """Run the relay below a small launcher: for service managers, and for upgrades that lose nothing.

    SIGTERM ends the launcher as soon as the relay has made way, if NOTIFY_SOCKET is set; what is open finishes beside the next one.
    Without a service manager SIGUSR2 starts a successor, and the old process finishes once that is ready.
    """
    from fxtunnel.kit.launcher import Launcher

    command = [sys.executable, "-m", "fxrelay.cli", "run", "--config", str(config_path)]
    sys.exit(Launcher("fxrelay", command, os.environ).run())


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
    services = ", ".join(f"{service.name} -> {service.target or f'port {service.port} of its nodes'}" for service in settings.services)
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

    refuse(verify_files(settings, config_path))


def _print_status(found: "dict[str, Any]") -> None:
    draining = "; draining: nothing new until it is restarted" if found["relay"].get("is_draining") else ""
    click.echo(f"relay {found['relay']['relay_id']}, up for {duration(found['relay']['uptime_s'])}{draining}")
    uplinks = [
        (
            uplink["gateway_id"],
            uplink["url"],
            uplink["state"],
            duration(uplink["connected_s"]) if uplink["state"] == "up" else _next_try(uplink["next_try_s"]),
            *link_cells(uplink["links"]),
        )
        for uplink in found["uplinks"]
    ]
    if uplinks:
        print_table(("gateway", "url", "state", "since", *LINK_COLUMNS), uplinks)
    else:
        click.echo("no gateway: this node reports to its cluster, and others send it clients")
    errors = [
        (uplink["gateway_id"], uplink["last_error"]) for uplink in found["uplinks"] if uplink["last_error"] and uplink["state"] != "up"
    ]
    if errors:
        print_table(("gateway", "last error"), errors)
    services = [
        (
            service["name"],
            service["target"],
            str(service["streams"]),
            str(service["opened"]),
            reasons(service["refused"]),
            reasons(service["paths"]) if service["paths"] else "-",
        )
        for service in found["services"]
    ]
    print_table(("service", "target", "streams", "opened", "refused", "paths"), services)
    _print_cluster(found)


def _print_cluster(found: "dict[str, Any]") -> None:
    cluster = found["cluster"]
    nodes = ", ".join(f"{count} {state}" for state, count in cluster["nodes"].items() if count)
    click.echo(f"cluster: nodes {nodes or 'none'}; {cluster['in_flight']} placements on their way")
    if cluster["store_down_s"]:
        click.echo(
            f"the store has not answered for {duration(cluster['store_down_s'])}: {cluster['last_error']}; going on with what is known"
        )
    elif not cluster["live"]:
        click.echo(f"changes are not heard at once: {cluster['last_error']}")
    reserved = found["reservations"]
    if reserved["servers"] or reserved["events"]:
        waiting = sum(reserved["waiting"].values())
        click.echo(f"reservations: {reserved['servers']} servers; {reserved['held']} logins by this relay; {waiting} wait")
        if reserved["last_error"]:
            click.echo(f"reserved servers are given to nobody: {reserved['last_error']}")
    for server_id, words in cluster["switched_off"].items():
        click.echo(f"switched off on {server_id}: {', '.join(words)}")
    for server_id in cluster["quarrels"]:
        click.echo(f"warning: more than one process calls itself {server_id}")
    for problem in cluster["problems"]:
        click.echo(f"warning: {problem}")


def _next_try(seconds: float | None) -> str:
    return "-" if seconds is None else f"next in {seconds:.0f} s"


for _command in (*COMMANDS, ticket):
    main.add_command(_command)

if __name__ == "__main__":
    main()
