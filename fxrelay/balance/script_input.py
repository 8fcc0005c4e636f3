"""Pure: the input of balancing scripts, as JSON text.

The clustering guide, "The Input Object", gives the shape: action, user, userGroups, isManager, isAdmin, local, servers, data. Server
objects are spliced in as the text they came as; only those with placements on their way are taken apart, to count them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fxrelay.balance.model import Action, Candidate, Request
from fxtunnel.model import RelayId

SECRET_KEYS: Final = frozenset(
    {"password", "passwd", "passphrase", "authtoken", "token", "jwt", "secret", "otp", "pin", "privatekey", "cookie"}
)
"""Keys of `data` that scripts do not get, compared without case, `_` and `-`. Scripts log, and run before a login."""
MAX_DEPTH: Final = 16


def script_input(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> str:
    """The input object of the clustering guide."""
    head = json.dumps(
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
    servers = ",".join([candidate.server.text if not candidate.in_flight else _counted(candidate) for candidate in candidates])
    return f'{head[:-1]},"servers":[{servers}]}}'


def without_secrets(data: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy without the keys that name a secret, at any depth; what lies deeper than MAX_DEPTH is left out."""
    if depth >= MAX_DEPTH:
        return {}
    return {
        key: _without_secrets(value, depth)
        for key, value in data.items()
        if str(key).lower().replace("_", "").replace("-", "") not in SECRET_KEYS
    }


def _without_secrets(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value, depth + 1)
    if isinstance(value, list | tuple):
        return [_without_secrets(entry, depth + 1) for entry in value] if depth < MAX_DEPTH else []
    return value


def _user(request: Request) -> dict[str, Any]:
    """Before a login there is only what the client claims; for a start the login's claims come along."""
    user: dict[str, Any] = {**request.claims} if request.action is Action.START else {}
    return {**user, "login": request.user, "sessions": list(request.sessions)}


def _counted(candidate: Candidate) -> str:
    document = candidate.server.document()
    document["sessions"] = candidate.load_sessions
    document["inflight"] = candidate.in_flight
    return json.dumps(document)


def fastx4_input(text: str) -> str:
    """The FastX 4 form of an input object: nodes and params. Takes time for many servers: not for the trio thread.

    `jwt` is empty: scripts are not given a token that could act for the user.
    """
    found = json.loads(text)
    servers = found.pop("servers")
    return json.dumps({"nodes": [_node(server) for server in servers], "params": {"me": found["user"], "start": found["data"], "jwt": ""}})


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
            "sessions": server.get("sessionList", [{} for _ in range(min(server.get("sessions", 0), 1000))]),
        },
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), **(static_data if isinstance(static_data, dict) else {})},
    }
