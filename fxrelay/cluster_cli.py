"""Task: the commands of `fxrelay` that are about the cluster: nodes, pick, drain, disable, enable, forget, reservations, release, store."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from fxtunnel.errors import FxError, StoreError
from fxtunnel.kit.console import ASK_TIMEOUT_S, DrainAnswer, config_option, duration, print_table, timeout_option, watch_drain

if TYPE_CHECKING:
    from fxrelay.cluster.members import Control, Member
    from fxrelay.settings import RelaySettings

WATCH_S: Final = 2.0
NODE_COLUMNS: Final = (
    "node",
    "hostname",
    "sessions",
    "unique user sessions",
    "total logins",
    "unique user logins",
    "total memory",
    "load",
    "state",
    "age",
    "tunnels",
)
_GIB: Final = 1 << 30

_config_option = config_option("relay.toml", "FXRELAY_CONFIG", "A relay's configuration: it says where the cluster is kept.")


@click.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: every server object, with its state.")
@click.option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C.")
def nodes(config_path: Path, as_json: bool, watch: bool) -> None:
    """Show the nodes of the cluster, as the store has them."""
    from fxrelay.cluster.reading import cluster_of, describe, read_view
    from fxrelay.reserving.reading import holders_in

    settings = _load(config_path)
    with suppress(*[KeyboardInterrupt] if watch else []), cluster_of(settings) as (store, _):
        while True:
            try:
                view = read_view(settings, store)
                holders = holders_in(settings, store).users(view.now_ms)
            except StoreError as exc:
                if not watch:
                    raise
                click.echo(f"the store does not answer: {exc}", err=True)  # who watches wants to see it come back
                time.sleep(WATCH_S)
                continue
            members = sorted(view.everyone(), key=lambda member: member.server.server_id)
            if watch:
                click.clear()
            if as_json:
                found = [describe(member, view.now, holders.get(member.server.server_id)) for member in members]
                click.echo(json.dumps(found, indent=2))
            else:
                print_table(NODE_COLUMNS, [_row(member, view.now, holders.get(member.server.server_id, "")) for member in members])
                _print_rivals(members)
            if not watch:
                return
            time.sleep(WATCH_S)


@click.command()
@_config_option
@click.argument("service")
@click.option("--user", default="", help="Who logs in or starts a session.")
@click.option("--groups", default="", help="The user's groups, separated by commas.")
@click.option("--action", type=click.Choice(["user/login", "session/start"]), help="Default: the service's own.")
@click.option("--data", default="{}", help="What came with the request, as a JSON object.")
@click.option("--explain", is_flag=True, help="Say which filter or script dropped which server, and why.")
@click.option("--record", type=click.Path(path_type=Path, dir_okay=False), help="Write what the decision was made from to a file.")
@click.option("--replay", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Decide again from such a file.")
def pick(
    config_path: Path,
    service: str,
    user: str,
    groups: str,
    action: str | None,
    data: str,
    explain: bool,
    record: Path | None,
    replay: Path | None,
) -> None:
    """Show which node SERVICE would get now.

    Filters and balancing chain are run as the relay runs them, with the same scripts; nothing is placed. Placements that are on their way
    are known to running relays only, and are not counted here. Exit code 1 if no node is chosen.
    """
    from fxrelay.picking import Question, pick_node

    question = Question(service, user, tuple(filter(None, groups.split(","))), action, _object(data), record, replay)
    answer = pick_node(_load(config_path), config_path, os.environ, question)
    if explain:
        for line in answer.explanation:
            click.echo(line)
    if answer.server_id is not None:
        click.echo(answer.server_id)
    elif explain:  # which has said why
        raise SystemExit(1)
    else:
        raise FxError(answer.failure)


@click.command()
@_config_option
@click.argument("node", required=False)
@timeout_option
def drain(config_path: Path, node: str | None, timeout_s: float | None) -> None:
    """Send nothing new to NODE, on any relay; without NODE: let this relay's process take nothing new, and show what it has left.

    With NODE: what it has stays. `fxrelay enable NODE` ends it.

    Without NODE, for planned work: nothing is cut, however long it takes; Ctrl-C only ends the watching, and a restart of the relay ends
    the drain.
    """
    if node is None:
        _drain_process(config_path, timeout_s)
        return
    if timeout_s is not None:
        raise click.UsageError("with NODE nothing is watched: leave --timeout out; `fxrelay nodes --watch` shows its sessions")
    from fxrelay.cluster.members import Control

    _change(config_path, node, Control(draining=True))


@click.command()
@_config_option
@click.argument("node")
@click.option("--login", is_flag=True, help="No new logins.")
@click.option("--start", is_flag=True, help="No new sessions.")
def disable(config_path: Path, node: str, login: bool, start: bool) -> None:
    """Switch off new logins or new sessions on NODE. `fxrelay enable NODE` switches everything on again."""
    from fxrelay.cluster.members import Control

    if not (login or start):
        raise click.UsageError("say what to switch off: --login, --start or both")
    wanted = {"login"} if login else set()
    _change(config_path, node, Control(disable=frozenset(wanted | ({"start"} if start else set()))))


@click.command()
@_config_option
@click.argument("node")
def enable(config_path: Path, node: str) -> None:
    """Undo `drain` and `disable` for NODE. What the node switched off itself stays off."""
    _change(config_path, node, None)


@click.command()
@_config_option
@click.argument("node")
def forget(config_path: Path, node: str) -> None:
    """Take NODE, which is gone for good, out of the store now: its server object, what was switched off for it, its reservation.

    Nodes leave by themselves after `cluster.forget_after_s`. One that is at work is refused. Relays know within `cluster.resync_s`.
    """
    from fxrelay.cluster.reading import cluster_of
    from fxrelay.forgetting import forget_node

    settings = _load(config_path)
    with cluster_of(settings) as (found, transporter):
        gone = forget_node(settings, found, transporter, node)
    reserved = f", and was reserved for {gone.user}" if gone.user else ""
    click.echo(f"{node}: forgotten; it last reported {duration(gone.silent_s)} ago{reserved}")


@click.group()
def store() -> None:
    """Export and import the cluster's configuration."""


@store.command("export", short_help="Write the store's collections to DIRECTORY.")
@_config_option
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def store_export(config_path: Path, directory: Path) -> None:
    """Write the store's collections to DIRECTORY, one file each, as FastX's download tool does."""
    from fxrelay.cluster.reading import cluster_of
    from fxrelay.cluster.transfer import export_store

    with cluster_of(_load(config_path)) as (found, _):
        for collection, count in export_store(found, directory).items():
            click.echo(f"{collection}: {count} documents")


@store.command("import", short_help="Bring the files of DIRECTORY into the store.")
@_config_option
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
def store_import(config_path: Path, directory: Path, dry_run: bool) -> None:
    """Bring the files of DIRECTORY into the store, as FastX's upload tool does. May be repeated."""
    from fxrelay.cluster.reading import cluster_of
    from fxrelay.cluster.transfer import apply_import, plan_import, tell_controls

    with cluster_of(_load(config_path)) as (found, transporter):
        plan = plan_import(found, directory)
        for line in plan.lines():
            click.echo(line)
        if not dry_run:
            apply_import(found, plan)
            tell_controls(transporter, plan)


@click.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def reservations(config_path: Path, as_json: bool) -> None:
    """Show which nodes belong to whom, and where somebody is just logging in, as the store has it."""
    from fxrelay.cluster.reading import cluster_of
    from fxrelay.reserving.reading import read_reservations

    with cluster_of(_load(config_path)) as (store, _):
        found = read_reservations(_load(config_path), store)
    if as_json:
        click.echo(json.dumps([line.document() for line in found], indent=2))
    else:
        rows = [
            (
                line.server_id,
                line.user or "-",
                duration(line.since_s) if line.user else "-",
                str(line.logins),
                str(line.fence),
                str(line.entries),
            )
            for line in found
        ]
        print_table(("node", "user", "since", "logins", "epoch", "pending"), rows)


@click.command()
@_config_option
@click.argument("node")
def release(config_path: Path, node: str) -> None:
    """Take NODE from its user. His streams to it are reset, and the next login gets it. Also repairs a record that is damaged."""
    from fxrelay.cluster.reading import cluster_of
    from fxrelay.reserving.reading import release_node

    settings = _load(config_path)
    with cluster_of(settings) as (store, transporter):
        user = release_node(settings, store, transporter, node)
    click.echo(f"{node}: {f'was reserved for {user}, and is free' if user else 'was not reserved'}")


COMMANDS: Final = (nodes, pick, drain, disable, enable, forget, reservations, release, store)


def _load(config_path: Path) -> "RelaySettings":
    from fxrelay.settings import load

    return load(config_path, os.environ)


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise click.BadParameter(f"--data is no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise click.BadParameter("--data: expected a JSON object")
    return found


def _drain_process(config_path: Path, timeout_s: float | None) -> None:
    from fxtunnel.kit.pages import fetch_json

    status = _load(config_path).relay.status_address

    def ask(method: str) -> DrainAnswer:
        try:
            return DrainAnswer.of(fetch_json(status, "/drain", ASK_TIMEOUT_S, method))
        except FxError as exc:
            raise FxError(f"the relay does not answer; is it running? {exc}") from exc

    watch_drain(ask("POST").process, lambda: ask("GET"), "streams", timeout_s)


def _change(config_path: Path, node: str, change: "Control | None") -> None:
    from fxrelay.cluster.reading import change_control

    after = change_control(_load(config_path), node, change)
    off = [*(["everything new (draining)"] if after.draining else []), *sorted(after.disable)]
    click.echo(f"{node}: switched off: {', '.join(off) or 'nothing'}")


def _row(member: "Member", now: float, holder: str) -> tuple[str, ...]:
    server = member.server
    is_drained = member.is_drained or (server.draining and not server.has_ended)
    off = sorted(server.disable | member.disabled | ({"drain"} if is_drained else set()))
    return (
        server.server_id,
        server.hostname,
        str(server.sessions),
        str(server.unique_user_sessions),
        str(server.logins),
        str(server.unique_user_logins),
        f"{server.total_bytes / _GIB:.1f} GiB",
        f"{server.load1:.2f}",
        " ".join(filter(None, (member.standing, f"(off: {', '.join(off)})" if off else "", f"(reserved: {holder})" if holder else ""))),
        duration(now - member.heard_at),
        ", ".join(sorted(server.gateways)) or "-",
    )


def _print_rivals(members: "list[Member]") -> None:
    from fxrelay.cluster.reading import rivals_of

    for member in members:
        rivals = rivals_of(member)
        if rivals:
            click.echo(f"warning: {len(rivals) + 1} processes call themselves {member.server.server_id}; the newest is shown", err=True)
