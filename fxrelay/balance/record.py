"""Pure: the recorded input of a decision, so that it can be replayed elsewhere; and a decision explained to people."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fxrelay.balance.filters import FilterContext, Pool
from fxrelay.balance.holders import prefer
from fxrelay.balance.model import Action, Candidate, Chosen, Decision, Failed, Narrowed, Passed, Request, Verdict
from fxrelay.balance.reservations import OwnerRelogin
from fxrelay.cluster.members import Member, MemberState
from fxrelay.cluster.server import BadServer, parse_server
from fxtunnel.model import RelayId

VERSION: Final = 1
_SHOWN: Final = 8
_DETAIL_LINES: Final = 40
"""Of a traceback, the last ones."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The whole input of a decision, except for what scripts look up by themselves.

    `numbers` are the next values of the cluster's counters. `reserves`: every server of the pool is reserved by its user; `wanted` are the
    servers at which somebody is logging in.
    """

    request: Request
    pool: Pool
    chain: tuple[str, ...]
    members: tuple[Member, ...]
    in_flight: Mapping[RelayId, int]
    local_id: RelayId
    holders: Mapping[RelayId, str] = field(default_factory=dict)
    guards_start: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)
    reserves: bool = False
    relogin: OwnerRelogin = OwnerRelogin.PREFER
    wanted: frozenset[RelayId] = frozenset()

    def circumstances(self) -> FilterContext:
        """The part that the filters need."""
        return FilterContext(self.in_flight, holders=self.holders, guards_start=self.guards_start)

    def preferred(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates from which a login should get its server."""
        is_login = self.request.action is Action.LOGIN
        if not is_login or not any(self.reserves or candidate.server.enable_reservations for candidate in candidates):
            return candidates
        return prefer(candidates, self.request.user, self.holders, self.wanted, self.relogin)


def encode_recording(recording: Recording) -> str:
    """The recording as JSON for a file. Keep it private: it holds the request's `data`, secrets included."""
    request, pool = recording.request, recording.pool
    return json.dumps(
        {
            "version": VERSION,
            "local": recording.local_id,
            "chain": list(recording.chain),
            "pool": {
                "service": pool.service,
                "nodes": sorted(pool.nodes) if pool.nodes is not None else "*",
                "where": dict(pool.where or {}),
            },
            "request": {
                "action": request.action.value,
                "service": request.service,
                "user": request.user,
                "sessions": list(request.sessions),
                "claims": dict(request.claims),
                "groups": list(request.groups),
                "isManager": request.is_manager,
                "isAdmin": request.is_admin,
                "data": dict(request.data),
            },
            "inFlight": dict(recording.in_flight),
            "holders": dict(recording.holders),
            "guardsStart": recording.guards_start,
            "numbers": dict(recording.numbers),
            "reserves": recording.reserves,
            "ownerRelogin": recording.relogin.value,
            "wanted": sorted(recording.wanted),
            "members": [
                {
                    "state": member.state.value,
                    "drained": member.is_drained,
                    "disabled": sorted(member.disabled),
                    "server": member.server.document(),
                }
                for member in recording.members
            ],
        },
        indent=1,
    )


def decode_recording(text: str) -> Recording:
    """The recording in a text that `encode_recording` made.

    Raises:
        ValueError: it is not a recording; the message says what is wrong.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']!r}, not {VERSION}")
        request, pool = found["request"], found["pool"]
        members = tuple(_member(entry) for entry in found["members"])
        if len({member.server.server_id for member in members}) < len(members):
            raise ValueError("it has a server twice")
        return Recording(
            Request(
                Action(request["action"]),
                str(request["service"]),
                str(request["user"]),
                tuple(request["sessions"]),
                dict(request["claims"]),
                tuple(map(str, request["groups"])),
                bool(request["isManager"]),
                bool(request["isAdmin"]),
                dict(request["data"]),
            ),
            Pool(
                str(pool["service"]), None if pool["nodes"] == "*" else frozenset(map(RelayId, pool["nodes"])), dict(pool["where"]) or None
            ),
            tuple(map(str, found["chain"])),
            members,
            {RelayId(key): int(value) for key, value in found["inFlight"].items()},
            RelayId(str(found["local"])),
            {RelayId(key): str(value) for key, value in found.get("holders", {}).items()},
            bool(found.get("guardsStart", False)),
            {str(key): int(value) for key, value in found.get("numbers", {}).items()},
            bool(found.get("reserves", False)),
            OwnerRelogin(found.get("ownerRelogin", OwnerRelogin.PREFER.value)),
            frozenset(map(RelayId, found.get("wanted", ()))),
        )
    except KeyError as exc:
        raise ValueError(f"not a recorded decision: {exc} is missing") from exc
    except (TypeError, AttributeError, RecursionError) as exc:
        raise ValueError(f"not a recorded decision: {type(exc).__name__} {exc}") from exc
    except BadServer as exc:
        raise ValueError(f"a server object in it is wrong: {exc}") from exc


def _member(entry: Mapping[str, Any]) -> Member:
    server = parse_server(json.dumps(entry["server"]))
    return Member(server, MemberState(entry["state"]), 0.0, bool(entry["drained"]), frozenset(map(str, entry["disabled"])))


def explain(decision: Decision) -> list[str]:
    """One line for each server that was filtered out, for each entry of the chain (with a script's traceback below), and for a failure."""
    lines = [f"filtered out  {dropped.server_id}: {dropped.reason}" for dropped in decision.dropped]
    for step in decision.steps:
        lines.append(f"{_printable(step.entry)}  among {step.candidates}: {_told(step.verdict)}  ({step.seconds * 1e3:.1f} ms)")
        if isinstance(step.verdict, Failed):
            lines += [f"    {_printable(line)}" for line in step.verdict.detail.splitlines()[-_DETAIL_LINES:] if line.strip()]
    if decision.failure is not None:
        lines.append(f"no server: {_printable(decision.failure.name)}: {_printable(decision.failure.message)}")
    return lines


def _told(verdict: Verdict) -> str:
    match verdict:
        case Chosen(server_id):
            return f"chose {server_id}"
        case Narrowed(server_ids):
            more = f" and {len(server_ids) - _SHOWN} more" if len(server_ids) > _SHOWN else ""
            return f"left {len(server_ids)}: {', '.join(server_ids[:_SHOWN])}{more}" if server_ids else "left none"
        case Passed():
            return "no opinion"
        case Failed(name, message, _, is_refusal):
            return f"{'refused' if is_refusal else 'failed'}: {_printable(name)}: {_printable(message)}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:2_000]
