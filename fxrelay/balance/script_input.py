"""Pure: the input of balancing scripts, as JSON text.

The clustering guide, "The Input Object", gives the shape: action, user, userGroups, isManager, isAdmin, local, servers, data. Server
objects stay the text they came as, so that the script process takes apart only those it has not seen before.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from fxrelay.balance.candidates import CandidateList, CandidateSubset
from fxrelay.balance.model import Action, Candidate, Request
from fxrelay.balance.sent_texts import Listed
from fxtunnel.model import RelayId

SECRET_WORDS: Final = ("password", "passwd", "passphrase", "token", "secret", "credential", "privatekey", "apikey")
SECRET_KEYS: Final = frozenset({"jwt", "otp", "pin", "cookie", "cookies", "authorization", "pass", "pwd"})
"""Scripts log, and run before a login: they do not get what `data` has under these keys, or under keys that hold one of the words.
Compared without case, `_`, `-` and `.`.
"""
MAX_DEPTH: Final = 16
MAX_SESSIONS: Final = 1_000
"""Entries of the FastX 4 form's session lists."""
_KEPT_NODES: Final = 16_384
_IGNORED: Final = str.maketrans("", "", "_-.")


@dataclass(frozen=True, slots=True)
class Count:
    """A server with placements on their way: its place in the list, its sessions with them, and how many they are."""

    index: int
    sessions: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class ScriptInput:
    """The input in parts: `base` is the object without `servers`, which are JSON texts as published, without what `counts` add."""

    base: str
    servers: Sequence[str]
    counts: tuple[Count, ...] = ()
    listed: Listed | None = None
    """In a script process: how the servers came here, in their stead."""

    def texts(self) -> Sequence[str]:
        """The servers, however they came."""
        return self.servers if self.listed is None else self.listed.meant()

    def whole(self) -> str:
        """The input object of the clustering guide."""
        servers = list(self.texts())
        for count in self.counts:
            servers[count.index] = _counted(servers[count.index], count)
        return f'{self.base[:-1]},"servers":[{",".join(servers)}]}}'


def script_input(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> ScriptInput:
    """What a script is to be told."""
    counts = [_count(index, each) for index, each in enumerate(candidates) if each.in_flight]
    return ScriptInput(_base(request, local_id), tuple([candidate.server.text for candidate in candidates]), tuple(counts))


def offered_input(request: Request, offered: CandidateList | CandidateSubset, local_id: RelayId) -> ScriptInput:
    """The same without the servers, which the script process knows, or is told: see `SentTexts.pack_offered`."""
    return ScriptInput(_base(request, local_id), (), tuple([_count(place, candidate) for place, candidate in offered.counted()]))


def _count(index: int, candidate: Candidate) -> Count:
    return Count(index, candidate.load_sessions, candidate.in_flight)


def _base(request: Request, local_id: RelayId) -> str:
    return json.dumps(
        {
            "action": request.action.value,
            "user": _user(request),
            "userGroups": list(request.groups),
            "isManager": request.is_manager,
            "isAdmin": request.is_admin,
            "local": {"serverId": local_id},
            "data": without_secrets(request.data),
        }
    )


def without_secrets(data: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy without the keys that name a secret, at any depth; what lies deeper than MAX_DEPTH is left out, and NaN is null."""
    if depth >= MAX_DEPTH:
        return {}
    return {key: _without_secrets(value, depth) for key, value in data.items() if not _is_secret(str(key))}


def _is_secret(key: str) -> bool:
    plain = key.lower().translate(_IGNORED)
    return plain in SECRET_KEYS or any(word in plain for word in SECRET_WORDS)


def _without_secrets(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value, depth + 1)
    if isinstance(value, list | tuple):
        return [_without_secrets(entry, depth + 1) for entry in value] if depth < MAX_DEPTH else []
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _user(request: Request) -> dict[str, Any]:
    """Before a login there is only what the client claims; for a start the login's claims come along. `serverId` is the one asked for."""
    user: dict[str, Any] = {**request.claims} if request.action is Action.START else {}
    wanted = request.data.get("serverId", user.get("serverId"))
    return {**user, "login": request.user, "serverId": wanted if isinstance(wanted, str) else "", "sessions": list(request.sessions)}


def _counted(text: str, count: Count) -> str:
    """A server object is never empty, and of two members with one name every reader takes the last one (ECMA-262, 25.5.1)."""
    return f'{text.rstrip()[:-1]},"sessions":{count.sessions},"inflight":{count.in_flight}}}'


def fastx4_input(given: ScriptInput) -> str:
    """The FastX 4 form: nodes and params. Nodes of server objects that were seen before are not made again.

    `jwt` is empty: scripts are not given a token that could act for the user.
    """
    servers = given.texts()
    nodes = [_node_text(server) for server in servers]
    for count in given.counts:
        nodes[count.index] = json.dumps(_node(json.loads(_counted(servers[count.index], count))))
    base = json.loads(given.base)
    params = json.dumps({"me": base["user"], "start": base["data"], "jwt": ""})
    return f'{{"nodes":[{",".join(nodes)}],"params":{params}}}'


@lru_cache(_KEPT_NODES)
def _node_text(server: str) -> str:
    return json.dumps(_node(json.loads(server)))


def _node(server: dict[str, Any]) -> dict[str, Any]:
    static_data = server.get("staticData")
    metadata = server.get("metadata")
    return {
        "id": server["serverId"],
        "nodeData": {
            "health": {
                "cpu": {"utilization": server.get("cpu", 0), "load1": (server.get("loadavg") or [0])[0]},
                "mem": {"free": server.get("availmem", 0), "total": server.get("totalmem", 0)},
                "os": {"hostname": server.get("hostname", ""), "uptime": server.get("uptime", 0)},
                "process": {"sessions": server.get("sessions", 0)},
                "client": {"version": (server.get("agent") or {}).get("version", "")},
                "net": {"ip": [server["address"]] if server.get("address") else []},
                "time": {"now": server.get("measuredAt", 0)},
            },
            "services": server.get("services", []),
            "sessions": _sessions(server),
        },
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), **(static_data if isinstance(static_data, dict) else {})},
    }


def _sessions(server: dict[str, Any]) -> list[Any]:
    """Scripts count these: a list that is shorter than the number of sessions is filled up with empty ones."""
    known = server.get("sessionList")
    listed = known[:MAX_SESSIONS] if isinstance(known, list) else []
    missing = min(server.get("sessions", 0), MAX_SESSIONS) - len(listed)
    return [*listed, *({} for _ in range(missing))]
