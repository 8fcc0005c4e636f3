"""Task: what can be known before the relay runs: its files, its state directory, its targets. Blocking, for the commands."""

import os
import socket
from pathlib import Path
from typing import Final

from fxrelay.settings import RelaySettings
from fxrelay.uplink.gateway_file import load_gateway_file
from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.files import make_private_dir, read_secret
from fxtunnel.kit.settings import Address

_DAY_S: Final = 86_400


def verify_files(settings: RelaySettings, config_path: Path) -> list[ConfigProblem]:
    """Everything wrong with enrolment files, broker.json, chains, state directory and status socket; empty if `run` can use them."""
    problems: list[ConfigProblem] = []
    for gateway in settings.gateways:
        try:
            load_gateway_file(gateway.file)
        except ConfigError as exc:
            problems += exc.problems
    return (
        problems
        + _cluster_problems(settings, config_path)
        + _web_problems(settings)
        + _entry_problems(settings, config_path)
        + _state_problems(settings, config_path)
    )


def _web_problems(settings: RelaySettings) -> list[ConfigProblem]:
    """Certificates, cookie keys and token keys of HTTP services. Imported here as well."""
    from fxrelay.logins.composing import verify_login_files
    from fxrelay.web.composing import verify_web_files

    return verify_web_files(settings) + verify_login_files(settings)


def _entry_problems(settings: RelaySettings, config_path: Path) -> list[ConfigProblem]:
    """Keys of tickets and owner scripts. Imported here as well."""
    from fxrelay.admitting.composing import entry_rules
    from fxrelay.balance.workers import ScriptLimits, Workers

    directory = config_path.absolute().parent
    workers = Workers(ScriptLimits(), directory)  # starts nothing by itself
    try:
        entry_rules(settings, workers, directory)
    except ConfigError as exc:
        return list(exc.problems)
    return []


def _cluster_problems(settings: RelaySettings, config_path: Path) -> list[ConfigProblem]:
    """Nothing is connected to and no script runs. Imported here: `--help` does without it."""
    from fxrelay.balance.entries import Scripts
    from fxrelay.balance.workers import ScriptLimits
    from fxrelay.cluster.opening import open_cluster
    from fxrelay.cluster.static_data import site_environment

    problems: list[ConfigProblem] = []
    try:
        store, transporter = open_cluster(settings.cluster, settings.relay.state_dir)
        transporter.close()
        store.close()
    except ConfigError as exc:
        problems += exc.problems
    scripts = Scripts(ScriptLimits(), config_path)
    try:
        environ = site_environment(settings.node, os.environ)
    except ConfigError as exc:
        problems += exc.problems
        environ = dict(os.environ)
    try:
        for section in settings.services:
            if section.is_pool:
                try:
                    scripts.chain(section.balance, section.name, environ)
                except ConfigError as exc:
                    problems += exc.problems
    finally:
        scripts.close()
    return problems


def warnings(settings: RelaySettings, now_unix: float) -> list[str]:
    """What works, but is probably not meant, or does not work at the moment. Resolves the targets' names, which may take a while.

    Raises:
        ConfigError: see `verify_files`.
    """
    found = []
    for gateway in settings.gateways:
        file = load_gateway_file(gateway.file)
        is_noted = (settings.relay.state_dir / f"enrolled-{file.gateway_id}.json").exists()
        if file.enrolment is not None and file.enrolment.expires_unix < now_unix and not is_noted:
            days = (now_unix - file.enrolment.expires_unix) / _DAY_S
            found.append(f"{file.path}: its token expired {days:.1f} days ago; unless this relay is enrolled already, get a new file")
    if not settings.services:
        found.append("there is no [[service]]: this relay has nothing to offer")
    for service in settings.services:
        why = _why_unreachable(service.target) if service.target is not None else None
        if why:
            found.append(f"service {service.name}: {why}")
    return found


def _state_problems(settings: RelaySettings, config_path: Path) -> list[ConfigProblem]:
    relay = settings.relay
    problems: list[ConfigProblem] = []
    if os.path.lexists(relay.state_dir):
        # A directory that is there is only looked at; one that is not, `run` makes.
        try:
            make_private_dir(relay.state_dir)
        except ConfigError as exc:
            problems += exc.problems
        for key in sorted(relay.state_dir.glob("*.key")):
            try:
                read_secret(key)
            except ConfigError as exc:
                problems += exc.problems
    elif not os.access(_nearest(relay.state_dir), os.W_OK | os.X_OK):
        message = f"{relay.state_dir} cannot be made by uid {os.geteuid()}; run: install -d -m 700 -o USER {relay.state_dir}"
        problems.append(ConfigProblem(str(config_path), "relay.state_dir", message))
    return problems


def _nearest(path: Path) -> Path:
    """The first directory upwards that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _why_unreachable(target: Address) -> str:
    if target.path is not None:
        return "" if target.path.is_socket() else f"{target.path} is not a socket at the moment"
    try:
        socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as exc:
        return f"{target.host} does not resolve: {exc.strerror or exc}"
    return ""
