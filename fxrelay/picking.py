"""Task: `fxrelay pick`: one decision outside the relay, explained, recorded, or made again from a record."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fxrelay.balance.chain import decide
from fxrelay.balance.chooser import ClusterEnvironment
from fxrelay.balance.entries import Scripts
from fxrelay.balance.filters import Sieve
from fxrelay.balance.holders import against
from fxrelay.balance.model import Action, Decision, Request
from fxrelay.balance.record import Recording, decode_recording, encode_recording, explain
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.balance.workers import ScriptLimits
from fxrelay.brain import pool_of
from fxrelay.cluster.ports import Store
from fxrelay.cluster.reading import cluster_of, read_view, sessions_of
from fxrelay.cluster.threads import Threads
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
    directory = config_path.absolute().parent
    scripts = Scripts(ScriptLimits(settings.cluster.script_timeout_s, settings.cluster.script_memory_bytes), directory)
    try:
        with cluster_of(settings) as (store, _):
            recording = _replayed(question.replay) if question.replay is not None else _observed(settings, store, question)
            if question.record is not None:
                write_atomic(question.record, encode_recording(recording).encode(), 0o600)
            chain = scripts.chain(recording.chain, recording.pool.service, environ)
            candidates, dropped = Sieve(recording.pool, recording.request.action).sift(
                recording.members, recording.request.user, recording.circumstances()
            )

            async def decided() -> Decision:
                environment = ClusterEnvironment(recording.local_id, store, Threads())
                return await decide(chain, recording.request, candidates, dropped, environment)

            decision = trio.run(decided)
    finally:
        scripts.close()
    failure = decision.failure
    return Answer(decision.server_id, f"{failure.name}: {failure.message}" if failure is not None else "", tuple(explain(decision)))


def _observed(settings: RelaySettings, store: Store, question: Question) -> Recording:
    section = next((section for section in settings.services if section.name == question.service and section.is_pool), None)
    if section is None:
        pools = ", ".join(section.name for section in settings.services if section.is_pool)
        raise FxError(f"there is no pool {question.service!r} in this configuration; pools are: {pools or 'none'}")
    view = read_view(settings, store)
    holders = holders_in(settings, store)
    relogin = OwnerRelogin(section.owner_relogin)
    request = Request(
        Action(question.action or ("user/login" if section.is_login else section.action)),
        question.service,
        question.user,
        sessions_of(view, question.user) if question.user else (),
        groups=question.groups,
        data=question.data,
    )
    return Recording(
        request,
        pool_of(section),
        section.balance,
        tuple(view.everyone()),
        {},
        RelayId(settings.relay.id),
        against(holders.users(view.now_ms), question.user, relogin),
        section.guard_start,
    )


def _replayed(path: Path) -> Recording:
    try:
        return decode_recording(path.read_text())
    except ValueError as exc:
        raise FxError(f"{path}: {exc}") from exc
