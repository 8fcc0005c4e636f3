"""Task: the rules of guarded services from the configuration: key files are read here. Blocking: for a worker thread."""

from pathlib import Path

from fxrelay.admitting.owner import owner_of
from fxrelay.admitting.quotas import StreamLimits
from fxrelay.admitting.stream_admission import EntryRules
from fxrelay.admitting.ticket import TicketRules
from fxrelay.balance.workers import ScriptLimits, Workers
from fxrelay.service_settings import ServiceSection, TicketSection
from fxrelay.settings import RelaySettings
from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.files import read_public
from fxtunnel.kit.signed_claims import Algorithm, KeySet, read_keys
from fxtunnel.model import ServiceName


def entry_rules(settings: RelaySettings, workers: Workers, directory: Path) -> dict[ServiceName, EntryRules]:
    """What the configuration asks of those who want each guarded service. `directory` is the configuration's.

    Raises:
        ConfigError: every key file and every owner script that cannot be used.
    """
    found: dict[ServiceName, EntryRules] = {}
    problems: list[ConfigProblem] = []
    for section in settings.services:
        if section.is_guarded:
            try:
                found[ServiceName(section.name)] = _rules(section, workers, directory)
            except ConfigError as exc:
                problems += exc.problems
    if problems:
        raise ConfigError(problems)
    return found


def load_keys(path: Path) -> KeySet:
    """The public keys of a file that nobody else may change.

    Raises:
        ConfigError: it cannot be read, others may write it, or it holds no usable public keys.
    """
    data = read_public(path)
    try:
        return read_keys(data.decode())
    except UnicodeDecodeError:
        raise ConfigError.one(path, "", "is no text") from None
    except ValueError as exc:
        raise ConfigError.one(path, "", str(exc)) from exc


def _rules(section: ServiceSection, workers: Workers, directory: Path) -> EntryRules:
    problems: list[ConfigProblem] = []
    owner = ticket = None
    try:
        owner = owner_of(section.owner, workers, directory) if section.owner is not None else None
    except ValueError as exc:
        problems.append(ConfigProblem(f"service {section.name}", "owner", str(exc)))
    try:
        ticket = _ticket_rules(section.ticket, section.name) if section.ticket is not None else None
    except ConfigError as exc:
        problems += exc.problems
    if problems:
        raise ConfigError(problems)
    limits = StreamLimits()
    if section.limits is not None:
        limits = StreamLimits(section.limits.per_user_streams, section.limits.per_address_streams)
    return EntryRules(ticket, owner, limits)


def _ticket_rules(ticket: TicketSection, service: str) -> TicketRules:
    keys = load_keys(ticket.keys)
    algorithms = tuple(Algorithm(name) for name in ticket.algorithms)
    if not keys.algorithms() & set(algorithms):
        there = ", ".join(sorted(keys.algorithms()))
        raise ConfigError.one(ticket.keys, "", f"its keys are for {there}; name that in ticket.algorithms of service {service}")
    return TicketRules(
        keys,
        ticket.audience or service,
        ticket.issuer,
        algorithms,
        ticket.max_life_s,
        ticket.leeway_s,
        ticket.required,
        ticket.without_store == "refuse",
    )


def owner_limits(settings: RelaySettings) -> ScriptLimits:
    """What an owner script may take: as much as a balancing script."""
    return ScriptLimits(settings.cluster.script_timeout_s, settings.cluster.script_memory_bytes)
