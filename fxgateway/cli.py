"""Task: the `fxgateway` command. Heavy modules are imported by the command that needs them, so that help and completion are quick."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fxgateway.connect_cli import connect
from fxtunnel import __version__
from fxtunnel.errors import ConfigError, ConfigProblem, FxError
from fxtunnel.kit.console import (
    ASK_TIMEOUT_S,
    CONTEXT,
    LINK_COLUMNS,
    DrainAnswer,
    Program,
    config_option,
    duration,
    link_cells,
    print_table,
    reasons,
    refuse,
    reload_held,
    timeout_option,
    watch_drain,
)
from fxtunnel.model import RelayId

if TYPE_CHECKING:
    from fxgateway.settings import GatewaySettings
    from fxgateway.tunnels.identities import Identities

_EPILOG: Final = """\b
Examples:
  fxgateway init --dir /etc/fxgateway --public-url wss://gw.example.com:8443
  fxgateway check --config /etc/fxgateway/gateway.toml
  fxgateway run --config /etc/fxgateway/gateway.toml
  scp /etc/fxgateway/gateway.json node:
  fxrelay run --config relay.toml            # on the node; fxrelay --help has a relay.toml

\b
Exit codes: 0 done, 1 failure at run time, 2 wrong usage or configuration.
Any key of gateway.toml can be set in the environment: FXGATEWAY__TUNNEL__LISTEN=...
Shell completion: eval "$(_FXGATEWAY_COMPLETE=bash_source fxgateway)"   (or zsh_source, fish_source)
"""


_config_option = config_option("gateway.toml", "FXGATEWAY_CONFIG", "The gateway's configuration.")
_token_days_option = click.option(
    "--token-days", type=click.IntRange(1, 365), default=7, show_default=True, help="How long relays can enrol with the file."
)


@click.group("fxgateway", cls=Program, epilog=_EPILOG, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="fxgateway")
def main() -> None:
    """The gateway in the DMZ.

    It takes clients in on its doors and passes them down tunnels that relays have dialled. It never dials out itself.
    """


@main.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to write; made if absent.")
@click.option("--public-url", required=True, metavar="wss://HOST[:PORT]", help="How relays reach this gateway; without a port, at 443.")
@click.option("--force", is_flag=True, help="Replace what is there: a new authority, so every relay has to enrol again.")
@_token_days_option
def init(directory: Path, public_url: str, force: bool, token_days: int) -> None:
    """Make a gateway: configuration, authority, certificate, enrolment file.

    Writes gateway.toml, ca.pem, ca.key, server.pem, server.key, relays.json and gateway.json. Keys and enrolment file have mode 0600. Copy
    gateway.json to each relay; move ca.key off this host before the gateway runs (it is only needed to issue certificates).
    """
    from fxgateway import setup

    there = setup.existing(directory)
    if there and not force:
        raise ConfigError([ConfigProblem(str(path), "", "exists; nothing was written (--force replaces it)") for path in there])
    port = setup.write_gateway(directory, public_url, token_days, time.time())
    click.echo(f"wrote {', '.join(setup.FILES)} in {directory}")
    if port is not None:
        click.echo(f"{public_url} names no port: relays dial {port}, and gateway.toml listens there")
    click.echo("next: move ca.key to another machine, or as root at least out of the gateway's reach (certs/README.md):")
    click.echo(f"        {setup.move_key_away(directory)}")
    click.echo(f"      look at {directory / 'gateway.toml'}, then: fxgateway run --config {directory / 'gateway.toml'}")
    click.echo(f"      copy {directory / 'gateway.json'} to a relay; relays can enrol with it for {token_days} days")


@main.command()
@_config_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, allow_dash=True),
    help='Where to write; "-" is standard output.  [default: gateway.json beside the configuration]',
)
@_token_days_option
def invite(config_path: Path, out: Path | None, token_days: int) -> None:
    """Make a fresh enrolment file for further relays.

    Files made before stay good until they expire. The running gateway takes the new one at once.
    """
    from fxgateway import setup
    from fxtunnel.kit.files import write_secret

    settings = _load(config_path)
    path = config_path.parent / "gateway.json" if out is None else out
    to_stdout = str(path) == "-"
    if not to_stdout:
        setup.refuse_to_overwrite(path)
    content = setup.invite(settings, token_days, time.time()).encode()
    if to_stdout:
        click.echo(content, nl=False)
        return
    write_secret(path, content)
    click.echo(f"wrote {path}: copy it to a relay; relays can enrol with it for {token_days} days")


@main.command()
@_config_option
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--all", "is_all", is_flag=True, help="Every enrolment file that was ever made here.")
def withdraw(config_path: Path, file: Path | None, is_all: bool) -> None:
    """Void the token of an enrolment file (gateway.json), before it expires.

    Relays that are enrolled stay; nobody enrols with the file any more. The running gateway knows at once.
    """
    from fxgateway import setup

    if (file is None) is not is_all:
        raise click.UsageError("name FILE, or give --all")
    identities = _identities(_load(config_path))
    if file is None:
        click.echo(f"withdrawn: all tokens; {identities.withdraw_all_tokens()} had not expired. A fresh one: fxgateway invite")
    elif identities.withdraw_token(setup.token_in(file)):
        click.echo(f"withdrawn: nobody enrols with {file} any more")
    else:
        raise FxError(f"this gateway does not know the token of {file}: it was withdrawn before, or is of another gateway")


@main.command()
@_config_option
def run(config_path: Path) -> None:
    """Run the gateway in the foreground.

    Prints one line when it is ready. SIGTERM drains and stops, SIGHUP reads the configuration again.
    """
    with reload_held():
        settings = _load(config_path)
        refuse(_file_problems(settings, config_path))
        if settings.tunnel.workers > 1:
            from fxgateway.workers import parent

            sys.exit(parent.run(settings, config_path))
        from fxgateway import app

        sys.exit(app.run(settings, config_path))


@main.command()
@_config_option
def launch(config_path: Path) -> None:
    """Run the gateway below a small launcher: for service managers, and for upgrades that lose nothing.

    SIGTERM ends the launcher as soon as the gateway has let go of its addresses, if NOTIFY_SOCKET is set; what is open finishes beside the
    next one. Without a service manager SIGUSR2 starts a successor, and the old process finishes once that is ready.
    """
    from fxtunnel.kit.launcher import Launcher

    # -P: started in its state directory it would import what somebody who broke into the one before has written there.
    command = [sys.executable, "-P", "-m", "fxgateway.cli", "run", "--config", str(config_path)]
    sys.exit(Launcher("fxgateway", command, os.environ).run())


@main.command()
@_config_option
@click.option("--no-bind", is_flag=True, help="Do not try the addresses: for ports that a systemd .socket unit holds.")
def check(config_path: Path, no_bind: bool) -> None:
    """Check configuration, keys, certificate and addresses.

    Every problem is printed, one a line. Addresses that this gateway is listening on already are no problem, so a configuration can be
    checked before SIGHUP.
    """
    settings = _load(config_path)
    import datetime as dt

    from fxgateway.check import verify_authority, verify_listens, warnings

    problems = _file_problems(settings, config_path) + verify_authority(settings)
    if not no_bind:
        problems += verify_listens(settings, config_path, _held(settings))
    refuse(problems)
    for warning in warnings(settings, config_path, dt.datetime.now(dt.UTC)):
        click.echo(f"warning: {warning}", err=True)
    doors = ", ".join(f"{door.listen} -> {door.service or door.kind}" for door in settings.doors)
    click.echo(f"ok: {config_path}: relays on {settings.tunnel.listen}, doors {doors or 'none'}, admin on {settings.admin.listen}")


@main.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: gateway, relays, doors.")
def relays(config_path: Path, as_json: bool) -> None:
    """Show the relays: who is here, and since when; without a running gateway, who is enrolled."""
    from fxtunnel.kit.pages import fetch_json

    settings = _load(config_path)
    try:
        found = {"running": True, **fetch_json(settings.admin.listen, "/relays", ASK_TIMEOUT_S)}
    except FxError as exc:
        click.echo(f"fxgateway: the gateway does not answer: {exc}. What relays.json knows:", err=True)
        found = {"running": False, "relays": [], "doors": []}
    try:
        found["enrolled"] = _enrolled(settings)
    except ConfigError:
        # Whoever may ask the running gateway need not be allowed to read its files.
        if not found["running"]:
            raise
        found["enrolled"] = []
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_status(found)


@main.command()
@_config_option
@click.argument("relay_id")
def revoke(config_path: Path, relay_id: RelayId) -> None:
    """Turn a relay away for good. The running gateway closes its tunnels within 5 s.

    The token of the gateway.json that it enrolled with is void from then on, for other machines too.
    """
    withdrawn = _identities(_load(config_path)).revoke(relay_id)
    if withdrawn is None:
        raise FxError(_unknown(relay_id))
    click.echo(f"{relay_id} is revoked; to let it in again: fxgateway forget {relay_id}, then enrol it anew")
    if withdrawn:
        click.echo("the gateway.json it enrolled with is void too: nobody enrols with a copy of it. A fresh one: fxgateway invite")


@main.command()
@_config_option
@click.argument("relay_id")
def forget(config_path: Path, relay_id: RelayId) -> None:
    """Remove a relay and its key, so that a machine with a new key may enrol under that name."""
    if not _identities(_load(config_path)).forget(relay_id):
        raise FxError(_unknown(relay_id))
    click.echo(f"{relay_id} is forgotten; it can enrol again with a fresh gateway.json (fxgateway invite)")


@main.command()
@_config_option
@click.argument("relay_id", required=False)
@click.option("--undo", is_flag=True, help="Give RELAY_ID streams again.")
@timeout_option
def drain(config_path: Path, relay_id: str | None, undo: bool, timeout_s: float | None) -> None:
    """Take nothing new, and show what is left until nothing is: the whole gateway, or RELAY_ID only.

    For planned work. Nothing is cut, however long it takes: Ctrl-C only ends the watching. A restart of the gateway ends the drain.
    """
    from fxtunnel.kit.pages import fetch_json
    from fxtunnel.kit.settings import Address
    from fxtunnel.model import is_name

    if relay_id is not None and not is_name(relay_id):
        raise click.UsageError(f"{relay_id!r} is no relay's id")
    if undo and relay_id is None:
        raise click.UsageError("--undo needs RELAY_ID; a gateway that was drained is restarted")
    control = Address(path=_load(config_path).tunnel.steering_path)

    def ask(method: str) -> DrainAnswer:
        path = f"/drain/{relay_id}" if relay_id is not None else "/drain"
        try:
            return DrainAnswer.of(fetch_json(control, path, ASK_TIMEOUT_S, method))
        except FxError as exc:
            raise FxError(f"the gateway does not answer; is it running? {exc}") from exc

    if relay_id is not None and ask("GET").left < 0:
        raise FxError(f"no relay {relay_id} is here; `fxgateway relays` shows them")
    if undo:
        ask("DELETE")
        click.echo(f"{relay_id} gets streams again")
    else:
        what = "clients" if relay_id is None else f"streams of {relay_id}"
        watch_drain(ask("POST").process, lambda: ask("GET"), what, timeout_s)


def _load(config_path: Path) -> "GatewaySettings":
    from fxgateway.settings import load

    return load(config_path, os.environ)


def _identities(settings: "GatewaySettings") -> "Identities":
    from fxgateway.tunnels.identities import Identities

    return Identities(settings.tunnel.identities_path)


def _enrolled(settings: "GatewaySettings") -> list[dict[str, object]]:
    """What relays.json knows, which is all there is to say while the gateway does not run."""
    identities = _identities(settings)
    identities.load()
    return [
        {
            "relay_id": relay.relay_id,
            "state": "enrolled" if relay.revoked_unix is None else "revoked",
            "kids": relay.kids,
            "revoked_unix": relay.revoked_unix,
        }
        for relay in identities.known()
    ]


def _unknown(relay_id: RelayId) -> str:
    return f"no relay {relay_id} is enrolled here; `fxgateway relays` shows them"


def _file_problems(settings: "GatewaySettings", config_path: Path) -> list[ConfigProblem]:
    import datetime as dt

    from fxgateway.check import verify_files

    return verify_files(settings, config_path, dt.datetime.now(dt.UTC))


def _held(settings: "GatewaySettings") -> frozenset[str]:
    """The addresses that this very gateway is listening on now; none if it does not run."""
    from fxtunnel.kit.pages import fetch_json

    try:
        found = fetch_json(settings.admin.listen, "/relays", ASK_TIMEOUT_S)
    except FxError:
        return frozenset()
    gateway = found.get("gateway")
    if not isinstance(gateway, dict) or gateway.get("gateway_id") != settings.tunnel.gateway_id:
        return frozenset()
    listening = gateway.get("listening")
    return frozenset(str(address) for address in listening) if isinstance(listening, list) else frozenset()


def _print_status(found: "dict[str, Any]") -> None:
    rows = [
        (
            relay["relay_id"],
            relay["state"],
            relay["remote_address"],
            duration(relay["connected_s"]),
            *link_cells(relay["links"]),
            ", ".join(relay["services"]),
        )
        for relay in found["relays"]
    ]
    here = {relay["relay_id"] for relay in found["relays"]}
    rows += [
        (relay["relay_id"], relay["state"] if relay["revoked_unix"] is not None or not found["running"] else "absent", *[""] * 7)
        for relay in found["enrolled"]
        if relay["relay_id"] not in here
    ]
    print_table(("relay", "state", "from", "since", *LINK_COLUMNS, "services"), rows)
    if found["running"] and found["gateway"].get("workers"):
        processes = [
            (str(w["worker"]), str(w["pid"]), "up" if w["up"] else "away", str(w["relays"]), str(w["connections"]), str(w["restarts"]))
            for w in found["gateway"]["workers"]
        ]
        print_table(("worker", "pid", "state", "relays", "clients", "restarts"), processes)
    if found["running"]:
        doors = [
            (door["name"], door["listen"], door["service"], str(door["connections"]), str(door["accepted"]), reasons(door["refused"]))
            for door in found["doors"]
        ]
        print_table(("door", "listen", "service", "clients", "accepted", "refused"), doors)
        for reason in found.get("not_ready", []):
            click.echo(f"not ready: {reason}")


main.add_command(connect)

if __name__ == "__main__":
    main()
