"""Task: `fxrelay pick`: one decision outside the relay, explained, recorded, or made again from a record."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from fxrelay.balance.chain import ROUND_ROBIN, counter_of, decide
from fxrelay.balance.entries import Scripts, chain_meant
from fxrelay.balance.filters import CandidateFilter
from fxrelay.balance.holders import against
from fxrelay.balance.model import Action, Narrowed, Request, Step
from fxrelay.balance.record import Recording, decode_recording, encode_recording, explain
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.balance.workers import ScriptLimits
from fxrelay.cluster.members import sessions_of
from fxrelay.cluster.ports import Store
from fxrelay.cluster.reading import cluster_of, read_view
from fxrelay.cluster.static_data import site_environment
from fxrelay.cluster_agent import pool_of
from fxrelay.reserving.reading import holders_in
from fxrelay.settings import RelaySettings
from fxtunnel.errors import FxError
from fxtunnel.kit.files import write_atomic
from fxtunnel.model import RelayId


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for; `record` and `replay` are files."""

    service: str
    user: str
    groups: tuple[str, ...]
    action: str | None
    data: Mapping[str, Any]
    record: Path | None
    replay: Path | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The node, or why there is none; and how it came to that, line by line."""

    server_id: RelayId | None
    failure: str
    explanation: tuple[str, ...]


def pick_node(settings: RelaySettings, config_path: Path, environ: Mapping[str, str], question: Question) -> Answer:
    """Decide as a running relay with this configuration would, without placing anything. Blocks.

    Raises:
        StoreError: the cluster cannot be read.
        ConfigError: a script of the chain cannot be used.
        FxError: no such pool, or the file to replay is no record.
    """
    scripts = Scripts(ScriptLimits(settings.cluster.script_timeout_s, settings.cluster.script_memory_bytes), config_path)
    try:
        environ = site_environment(settings.node, environ)
        if question.replay is not None:
            recording = _replayed(question.replay)
        else:
            with cluster_of(settings) as (store, _):
                recording = _observed(settings, store, question, environ)
        if question.record is not None:
            write_atomic(question.record, encode_recording(recording).encode(), 0o600)
        chain = scripts.chain(recording.chain, recording.pool.service, environ)
        request = recording.request
        candidates, dropped = CandidateFilter(recording.pool, request.action).apply(
            recording.members, request.user, recording.circumstances()
        )
        preferred = recording.preferred(candidates)
        environment = _Recorded(recording.local_id, recording.numbers)
        decision = trio.run(decide, chain, request, preferred, dropped, environment)
        if len(preferred) < len(candidates):
            narrowed = Step("reservations", len(candidates), Narrowed(tuple(candidate.server_id for candidate in preferred)), 0.0)
            decision = replace(decision, steps=(narrowed, *decision.steps))
    finally:
        scripts.close()
    failure = decision.failure
    return Answer(decision.server_id, f"{failure.name}: {failure.message}" if failure is not None else "", tuple(explain(decision)))


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Implements `Environment` with what was recorded: looking takes no number from the relays."""

    local_id: RelayId
    numbers: Mapping[str, int]

    async def next_number(self, counter: str) -> int:
        """See `Environment`."""
        await trio.lowlevel.checkpoint()
        return self.numbers.get(counter, 1)


def _observed(settings: RelaySettings, store: Store, question: Question, environ: Mapping[str, str]) -> Recording:
    section = next((section for section in settings.services if section.name == question.service and section.is_pool), None)
    if section is None:
        pools = ", ".join(section.name for section in settings.services if section.is_pool)
        raise FxError(f"there is no pool {question.service!r} in this configuration; pools are: {pools or 'none'}")
    view = read_view(settings, store)
    holders = holders_in(settings, store)
    users = holders.users(view.now_ms)
    relogin = OwnerRelogin(section.owner_relogin)
    chain = chain_meant(section.balance, environ)
    counter = counter_of(section.name)
    request = Request(
        Action(question.action or ("user/login" if section.is_login else section.action)),
        question.service,
        question.user,
        sessions_of(view.everyone(), question.user),
        groups=question.groups,
        data=question.data,
    )
    return Recording(
        request,
        pool_of(section),
        chain,
        tuple(view.everyone()),
        {},
        RelayId(settings.relay.id),
        against(users, question.user, relogin) if request.action is Action.LOGIN else users,
        section.guard_start,
        {counter: store.add(counter, 0) + 1} if ROUND_ROBIN in chain else {},
        section.reservations,
        relogin,
        holders.wanted(view.now_ms),
    )


def _replayed(path: Path) -> Recording:
    try:
        return decode_recording(path.read_text())
    except ValueError as exc:
        raise FxError(f"{path}: {exc}") from exc
